"""How often: a few times in every run of the tests, in full with `scripts/test --soak`."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")

SOAK = os.environ.get("MPICOLL_SOAK") == "1"


def soak(in_full: T, normally: T) -> T:
    """Choose a count, or a limit in seconds."""
    return in_full if SOAK else normally
