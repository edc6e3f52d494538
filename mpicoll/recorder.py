"""The flight recorder: a ring of a group's last calls, their states and times."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

CAPACITY = 1000

_NAMES = ("seq", "kind", "dtype", "count", "op", "root", "state", "called", "ended", "error")
_STATE, _ENDED, _ERROR = 6, 8, 9

Entry = list[Any]


class Recorder:
    """The last `CAPACITY` calls of one group on this rank.  It keeps no buffer alive."""

    def __init__(self) -> None:
        self._ring: deque[Entry] = deque(maxlen=CAPACITY)
        self.last_finished = "nothing"

    def note(self, seq: int, kind: str, dtype: str, count: int, op: str, root: int) -> Entry:
        """Enter a call at its start."""
        entry = [seq, kind, dtype, count, op, root, "called", time.time(), None, None]
        self._ring.append(entry)
        return entry

    def end(self, entry: Entry, error: BaseException | None) -> None:
        """Enter how a call ended."""
        entry[_ENDED] = time.time()
        if error is None:
            entry[_STATE] = "finished"
            self.last_finished = f"{entry[1]} #{entry[0]}"
        else:
            entry[_STATE] = "failed"
            entry[_ERROR] = f"{type(error).__name__}: {error}"

    def entries(self) -> list[dict[str, Any]]:
        """Return the calls, oldest first, as dictionaries that JSON can hold."""
        return [dict(zip(_NAMES, entry, strict=True)) for entry in self._ring]
