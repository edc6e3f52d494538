"""The flight recorder: rings of the groups' last calls, their states, times and places.

It is always on, and stands in the way of every call, so an entry is a list made in one go: what
it means is worked out when somebody reads it.  It keeps no buffer alive, and of the caller's
frame only the code and the position in it.

`python -m mpicoll trace` reads the files that `write` makes, one per rank.  It tells groups apart
by their names, members, and how many groups of that name and members were made before, which
every member counts for itself.  So the members agree without a word, as long as they make such
groups in one order: two threads that make groups of one name and one set of members at the same
time could count them differently.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from sys import _getframe
from types import CodeType
from typing import Any, Protocol

from ..errors import interrupts
from ..runtime.digests import blake2b
from ..runtime.process import monotonic, process
from ..runtime.settings import trace_folder
from .call import Call

CAPACITY = 1000  # calls of a group
CLOSED = 16  # groups that are kept after they were closed
VERSION = 1  # of the files

# An entry's fields.
_SEQ, _KIND, _DTYPE, _COUNT, _SHAPE, _OP, _ROOT, _PEER, _TAG = range(9)
_CALLED, _ENDED, _ERROR, _CODE, _AT = range(9, 14)


class Entry(Protocol):
    """A list of these fields; or what the compiled core keeps in its place."""

    def __getitem__(self, field: int, /) -> Any: ...
    def __setitem__(self, field: int, value: Any, /) -> None: ...


LIBRARY = os.path.dirname(os.path.dirname(__file__)) + os.sep
COMMANDS = os.path.join(LIBRARY, "cli") + os.sep  # they use the library as anybody does
_TORCH = os.sep.join(["-packages", "torch", ""])  # PyTorch calls it for the user
PLACES = LIBRARY, COMMANDS, _TORCH


def is_ours(file: str) -> bool:
    """Return whether a file of code is the library's."""
    return file.startswith(LIBRARY) and not file.startswith(COMMANDS)


class _Ours(dict[str, bool]):
    """Whether a file of code belongs to the library, or to PyTorch; found out once per file."""

    def __missing__(self, file: str) -> bool:
        found = self[file] = is_ours(file) or _TORCH in file
        return found


_ours = _Ours()
_started = time.time()  # of this process, as good as


class Recordings:
    """The recorders of one rank.

    Attributes:
        open, closed: those of groups that are open, and the last that were closed.
        made: how many there were, by names and members.
        complained: whether it was said that they can't be written.
    """

    def __init__(self) -> None:
        self.open: dict[Recorder, None] = {}
        self.closed: deque[Recorder] = deque(maxlen=CLOSED)
        self.made: Counter[bytes] = Counter()
        self.complained = False


def recordings() -> Recordings:
    """Return this rank's."""
    return process().the(Recordings)


class Recorder:
    """The last `CAPACITY` calls of one group on this rank.

    Args:
        name: the group's.
        rank: this process's in the group.
        ranks: the members, as ranks of the world.
        checks: how far calls are compared; see `new_group`.
        frames: the least number of the library's frames between `note` and the user's.
    """

    def __init__(
        self,
        name: str,
        rank: int,
        ranks: Sequence[int],
        *,
        checks: str = "full",
        frames: int = 3,
    ) -> None:
        self.name = name
        self.rank = rank
        self.ranks = ranks
        self.checks = checks
        self.ring: deque[Entry] = deque(maxlen=CAPACITY)
        self._up = frames + 1
        alike = blake2b(repr((name, *ranks)).encode(), 16)
        made = recordings().made
        self.ordinal = made[alike]
        self.mark = f"{alike.hex()}-{self.ordinal}"  # the same on all members
        made[alike] += 1
        self.open()

    def note(self, seq: int, call: Call, now: float) -> Entry:
        """Enter a call at its start, at `now` on the monotonic clock."""
        code: CodeType | None
        try:
            frame: Any = _getframe(self._up)  # going up one by one costs 0.1 us each
            while _ours[frame.f_code.co_filename]:
                frame = frame.f_back
            code, at = frame.f_code, frame.f_lasti
        except (ValueError, AttributeError):  # at the end of the process no frame is the user's
            code, at = None, 0
        blocks = call.send
        if blocks is None:
            blocks = call.recv
            if blocks is None and call.parts:
                blocks = call.parts[0].send
        if blocks is None:
            dtype = shape = None
        else:
            dtype, shape = blocks.dtype, blocks.buffers[0].shape
        entry: Entry = [
            seq,
            call.kind,
            dtype,
            call.count,
            shape,
            call.op,
            call.root,
            call.peer,
            call.tag,
            now,
            None,
            call.refused or None,
            code,
            at,
        ]
        self.ring.append(entry)
        return entry

    def open(self) -> None:
        """Have the group's calls written until it is closed."""
        kept = recordings()
        with contextlib.suppress(ValueError):
            kept.closed.remove(self)
        kept.open[self] = None

    def close(self) -> None:
        """Keep the group's calls only until `CLOSED` others were closed."""
        kept = recordings()
        if self in kept.open:
            del kept.open[self]
            kept.closed.append(self)

    def report(self, epoch: float | None = None) -> dict[str, Any]:
        """Return the group and its `entries` as a dictionary that JSON can hold."""
        return {
            "group": self.name,
            "ordinal": self.ordinal,
            "rank": self.rank,
            "size": len(self.ranks),
            "world_rank": self.ranks[self.rank],
            "ranks": list(self.ranks),
            "checks": self.checks,
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "calls": self.entries(epoch),
        }

    def entries(self, epoch: float | None = None) -> list[dict[str, Any]]:
        """Return the calls, oldest first, as dictionaries that JSON can hold.

        Times are seconds of the epoch; `epoch` is what the monotonic clock's 0 is there.
        """
        if epoch is None:
            epoch = _epoch()
        return [_in_words(entry, epoch) for entry in self.ring.copy()]


def number(entry: Entry, seq: int) -> None:
    """Enter the number of a call that was given one later."""
    entry[_SEQ] = seq


def end(entry: Entry, error: BaseException | None) -> None:
    """Enter how a call ended."""
    if error is not None:
        entry[_ERROR] = f"{type(error).__name__}: {error}"
    entry[_ENDED] = monotonic()


def place(entry: Entry) -> tuple[str, int]:
    """Return the file and line of the user's that made a call; "" and 0 if none is known."""
    code: CodeType | None = entry[_CODE]
    return ("", 0) if code is None else (code.co_filename, _line(code, entry[_AT]))


def _epoch() -> float:
    return time.time() - monotonic()


def _in_words(entry: Entry, epoch: float) -> dict[str, Any]:
    dtype, op, ended, error = entry[_DTYPE], entry[_OP], entry[_ENDED], entry[_ERROR]
    file, line = place(entry)
    return {
        "seq": entry[_SEQ],
        "kind": entry[_KIND].name,
        "dtype": "" if dtype is None else dtype.name,
        "count": entry[_COUNT],
        "shape": list(entry[_SHAPE] or ()),
        "op": "" if op is None else op.name,
        "root": entry[_ROOT],
        "peer": entry[_PEER],
        "tag": entry[_TAG],
        "state": "called" if ended is None else "finished" if error is None else "failed",
        "called": entry[_CALLED] + epoch,
        "ended": None if ended is None else ended + epoch,
        "error": error,
        "file": file,
        "line": line,
    }


def _line(code: CodeType, at: int) -> int:
    """Return the line of the instruction at byte `at` of a function."""
    for start, end, line in code.co_lines():
        if start <= at < end and line is not None:
            return line
    return code.co_firstlineno


# ---- the whole process, in a file ----


def leave_trace() -> None:
    """Write what this process has recorded into MPICOLL_TRACE_DIR, if that is set."""
    folder = trace_folder()
    if folder is not None:
        write(folder)


def write(folder: str) -> None:
    """Write what this process has recorded to the file ``rank-<world rank>.json`` of a folder.

    The file is its owner's alone, and there whole or not at all.  Nothing is raised: where it
    can't be written, a line on standard error says so, once.
    """
    kept = recordings()
    try:
        recorders = [*kept.closed, *kept.open]
        if recorders:
            _put(folder, recorders)
    except Exception as error:
        if interrupts(error):
            raise
        if not kept.complained:
            kept.complained = True
            with contextlib.suppress(Exception):  # standard error may be closed
                said = f"mpicoll: the trace can't be written to {folder}: {error}"
                print(said, file=sys.stderr, flush=True)


def _put(folder: str, recorders: Sequence[Recorder]) -> None:
    now, epoch = time.time(), _epoch()  # one epoch: the clocks are compared by it
    world_rank = recorders[0].ranks[recorders[0].rank]
    told = {
        "version": VERSION,
        "world_rank": world_rank,
        "host": os.uname().nodename,
        "pid": os.getpid(),
        "started": _started,
        "written": now,
        "groups": [recorder.report(epoch) for recorder in recorders],
    }
    os.makedirs(folder, mode=0o700, exist_ok=True)
    import tempfile

    handle, part = tempfile.mkstemp(prefix=f".rank-{world_rank}-", dir=folder)
    try:
        with open(handle, "w") as file:
            file.write(json.dumps(told))  # ten times as fast as json.dump
        os.replace(part, os.path.join(folder, f"rank-{world_rank}.json"))
    except BaseException:
        os.unlink(part)
        raise
