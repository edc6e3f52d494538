"""The current group of a thread, as `_dist2` has one: that of the innermost with-block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from .group import ProcessGroup


class _Current(threading.local):
    group: ProcessGroup | None = None


_current = _Current()


def current_process_group() -> ProcessGroup | None:
    """Return the group of the innermost `process_group` block of this thread, or None.  Local."""
    return _current.group


@contextlib.contextmanager
def process_group(pg: ProcessGroup) -> Iterator[ProcessGroup]:
    """Make a group the current one of this thread, inside a with-block.  Blocks nest.  Local.

    Example::

        with mc.process_group(pg):
            assert mc.current_process_group() is pg
    """
    before = _current.group
    _current.group = pg
    try:
        yield pg
    finally:
        _current.group = before
