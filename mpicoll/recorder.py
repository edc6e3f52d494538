"""The flight recorder: a ring of a group's last calls, their states and times."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from .calls import Call

CAPACITY = 1000

_NAMES = ("seq", "kind", "dtype", "count", "op", "root", "state", "called", "ended", "error")
_STATE, _ENDED, _ERROR = 6, 8, 9

Entry = list[Any]


class Recorder:
    """The last `CAPACITY` calls of one group on this rank.  It keeps no buffer alive."""

    def __init__(self) -> None:
        self._ring: deque[Entry] = deque(maxlen=CAPACITY)

    def note(self, seq: int, call: Call, now: float) -> Entry:
        """Enter a call at its start, at `now` on the monotonic clock."""
        count, op, root = call.count, call.op, call.root
        entry = [seq, call.kind, call.dtype, count, op, root, "called", now, None, None]
        self._ring.append(entry)
        return entry

    def end(self, entry: Entry, error: BaseException | None) -> None:
        """Enter how a call ended."""
        entry[_ENDED] = time.monotonic()
        if error is None:
            entry[_STATE] = "finished"
        else:
            entry[_STATE] = "failed"
            entry[_ERROR] = f"{type(error).__name__}: {error}"

    def entries(self) -> list[dict[str, Any]]:
        """Return the calls, oldest first, as dictionaries that JSON can hold."""
        return [_in_words(entry) for entry in self._ring]


def _in_words(entry: Entry) -> dict[str, Any]:
    said = dict(zip(_NAMES, entry, strict=True))
    epoch = time.time() - time.monotonic()
    for name in ("called", "ended"):
        said[name] = None if said[name] is None else said[name] + epoch
    for name in ("dtype", "op"):
        said[name] = "" if said[name] is None else said[name].name
    return said
