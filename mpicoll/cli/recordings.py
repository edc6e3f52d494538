"""What the ranks of a job have recorded: their files, read, and their calls, put side by side.

A call of a group is the same call on all members that gave it the same number.  A group is the
same on all ranks that say so: by its name, its members, and its ordinal among those alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..engine import kinds
from ..engine.call import said_of_message
from ..engine.recorder import VERSION


class Unreadable(Exception):
    """There is nothing to read, and why."""


class GroupKey(NamedTuple):
    """What the members of a group agree on without a word."""

    name: str
    ranks: tuple[int, ...]  # of the world
    ordinal: int

    def __str__(self) -> str:
        again = f" #{self.ordinal + 1}" if self.ordinal else ""
        return f"{self.name!r}{again}, {in_ranges(self.ranks)}"


@dataclass(slots=True)
class Entry:
    """One call on one rank.  Times are seconds of the epoch, at first by the rank's own clock."""

    rank: int  # of the world
    seq: int
    kind: str
    dtype: str
    count: int
    shape: list[int]
    op: str
    root: int
    peer: int
    tag: int
    state: str  # called, finished, failed
    called: float
    ended: float | None
    error: str | None
    file: str
    line: int

    @property
    def place(self) -> str:
        """Where the user's program made the call."""
        return f"{self.file}:{self.line}" if self.file else ""

    @property
    def leaves(self) -> bool:
        """Whether this is no call of the user's, but what a rank does when its program ends."""
        return self.kind == kinds.SHUTDOWN.name and not self.file

    @property
    def is_message(self) -> bool:
        """Whether it is a send or a receive, which has no number."""
        return not kinds.named(self.kind).queued

    def describe(self) -> str:
        """Say the call as a person would write it."""
        if self.leaves:
            return "the end of the program"
        said = []
        if self.dtype:
            said.append(f"{self.dtype}[{'uneven' if self.count < 0 else self.count}]")
        if self.op:
            said.append(f"op={self.op}")
        if self.root >= 0:
            said.append(f"root={self.root}")
        if self.is_message:
            said.append(said_of_message(kinds.named(self.kind), self.peer, self.tag))
        return f"{self.kind}({', '.join(said)})"


@dataclass
class Group:
    """One group as its members recorded it.

    Attributes:
        calls: the collectives: by number, then by rank of the world.
        messages: sends and receives, which have no number.
        checks: how far the group compares calls.
    """

    key: GroupKey
    checks: str
    calls: dict[int, dict[int, Entry]] = field(default_factory=dict)
    messages: list[Entry] = field(default_factory=list)

    def before(self, rank: int, seq: int) -> Entry | None:
        """Return the last collective with a number below `seq` that a rank called."""
        numbers = [number for number, by in self.calls.items() if number < seq and rank in by]
        return self.calls[max(numbers)][rank] if numbers else None

    def first(self, rank: int) -> int:
        """Return the number of the first collective that a rank still remembers; 0 if none."""
        return min((seq for seq, by in self.calls.items() if rank in by), default=0)


@dataclass
class Process:
    """One rank's process.  `written` is when it wrote its file, by its own clock."""

    rank: int
    host: str
    pid: int
    started: float
    written: float


@dataclass
class Recordings:
    """All files of a folder.  `notes` says what was left out, and why."""

    processes: dict[int, Process]
    groups: dict[GroupKey, Group]
    notes: list[str]

    @property
    def absent(self) -> list[int]:
        """The ranks of the world that the others know of, but that left no file."""
        known = {rank for key in self.groups for rank in key.ranks if rank >= 0}
        return sorted(known - set(self.processes))


def read(folder: Path) -> Recordings:
    """Read the files ``rank-<number>.json`` of a folder.

    Raises:
        Unreadable: there is no such folder, or no file in it can be read.
    """
    if not folder.is_dir():
        raise Unreadable(f"{folder} is not a folder: give the one that MPICOLL_TRACE_DIR named")
    named = [
        (int(m[1]), p) for p in folder.iterdir() if (m := re.match(r"rank-(\d+)\.json$", p.name))
    ]
    if not named:
        raise Unreadable(
            f"{folder} holds no rank-*.json: run the job with MPICOLL_TRACE_DIR={folder}"
        )
    files, notes = [], []
    for _, path in sorted(named):
        try:
            files.append(_load(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path.name} is left out: {_why(error)}")
    if not files:
        raise Unreadable(f"no file in {folder} can be read; {'; '.join(notes)}")
    # All processes of a job run at the same time; what was written before that is not of the job.
    begin = max(process.started for process, _ in files)
    begun = next(process for process, _ in files if process.started == begin)
    found = Recordings({}, {}, notes)
    for process, groups in files:
        if process.written < begin:
            notes.append(
                f"rank-{process.rank}.json is left out: it was written "
                f"{begin - process.written:.1f} s before rank {begun.rank} started, so by an "
                "earlier run"
            )
            continue
        found.processes[process.rank] = process
        _add(found, process.rank, groups)
    return found


def _load(path: Path) -> tuple[Process, list[tuple[Group, list[Entry]]]]:
    told = json.loads(path.read_text())
    if told["version"] != VERSION:
        raise ValueError(f"its version is {told['version']}, and this mpicoll reads {VERSION}")
    rank = int(told["world_rank"])
    if path.name != f"rank-{rank}.json":
        raise ValueError(f"it is the file of rank {rank}")
    process = Process(
        rank, str(told["host"]), int(told["pid"]), float(told["started"]), float(told["written"])
    )
    groups = []
    for group in told["groups"]:
        key = GroupKey(group["group"], tuple(map(int, group["ranks"])), int(group["ordinal"]))
        groups.append((Group(key, group["checks"]), [_entry(rank, c) for c in group["calls"]]))
    return process, groups


def _entry(rank: int, call: dict[str, Any]) -> Entry:
    entry = Entry(rank=rank, **call)
    for number in (entry.called, entry.ended or 0.0, entry.seq, entry.line):
        if not isinstance(number, (int, float)):
            raise TypeError(f"{number!r} is not a number")
    return entry


def _why(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"it is not whole, or no JSON ({error})"
    if isinstance(error, KeyError):
        return f"it is no recording of mpicoll: it lacks {error}"
    return str(error)


def _add(found: Recordings, rank: int, groups: Iterable[tuple[Group, list[Entry]]]) -> None:
    for group, entries in groups:
        known = found.groups.setdefault(group.key, group)
        for entry in entries:
            if entry.is_message:
                known.messages.append(entry)
            else:
                known.calls.setdefault(entry.seq, {})[rank] = entry


def in_ranges(ranks: Iterable[int]) -> str:
    """Say ranks shortly: ``rank 3``, ``ranks 0-2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    said = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return (
        f"rank{'s' if len(runs) > 1 or (runs and runs[0][0] != runs[0][1]) else ''} "
        + ", ".join(said)
    )
