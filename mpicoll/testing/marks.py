"""What the plugin for pytest and the ranks at work under it both read of a test."""

from __future__ import annotations

import pytest

NAME = "mpicoll.testing.plugin"
RANKS = f"{NAME}.ranks"  # the name of the plugin that is there where there are several


def ranks_of(item: pytest.Item) -> int | None:
    """Return on how many ranks a test is to run; None: on all."""
    call = getattr(item, "callspec", None)
    return None if call is None else call.params.get("_ranks")
