"""The calls as a trace that ui.perfetto.dev opens: Chrome's JSON trace events.

A process is a rank, a thread one of its groups.  Calls of a group that were under way at the
same time would overlap on one thread, where a viewer shows only what nests: they go to further
threads of the same name.
"""

from __future__ import annotations

from typing import Any

from .clocks import Offset
from .recordings import Entry, Group, Recordings

Event = dict[str, Any]


def events(recordings: Recordings, offsets: dict[int, Offset | None]) -> list[Event]:
    """Return the trace's events, in microseconds from the earliest call of any rank."""
    found: list[Event] = []
    entries = {rank: _of(recordings, rank) for rank in recordings.processes}
    start = min((e.called for rank in entries.values() for _, es in rank for e in es), default=0.0)
    for rank, process in sorted(recordings.processes.items()):
        name = f"rank {rank} ({process.host})"
        if offsets[rank] is None:
            name += ", clock not aligned"
        found.append(_name("process_name", rank, 0, name))
        found.append({**_name("process_sort_index", rank, 0, ""), "args": {"sort_index": rank}})
        thread = 1
        for group, listed in entries[rank]:
            for row in _rows(listed, process.written):
                found.append(_name("thread_name", rank, thread, f"group {group.key}"))
                for entry in row:
                    until = process.written if entry.ended is None else entry.ended
                    # Whole nanoseconds, so that what follows something begins no earlier.
                    begin, end = round((entry.called - start) * 1e9), round((until - start) * 1e9)
                    found.append(
                        {
                            "ph": "X",
                            "name": entry.kind,
                            "cat": entry.state,
                            "pid": rank,
                            "tid": thread,
                            "ts": begin / 1000,
                            "dur": max(0, end - begin) / 1000,
                            "args": _arguments(entry),
                        }
                    )
                thread += 1
    return found


def _of(recordings: Recordings, rank: int) -> list[tuple[Group, list[Entry]]]:
    found = []
    for group in recordings.groups.values():
        entries = [by_rank[rank] for by_rank in group.calls.values() if rank in by_rank]
        entries += [entry for entry in group.messages if entry.rank == rank]
        if entries:
            found.append((group, sorted(entries, key=lambda entry: entry.called)))
    return found


def _rows(entries: list[Entry], written: float) -> list[list[Entry]]:
    """Deal calls out to rows in which none overlaps another."""
    rows: list[list[Entry]] = []
    ends: list[float] = []
    for entry in entries:
        row = next((i for i, end in enumerate(ends) if end <= entry.called), len(rows))
        if row == len(rows):
            rows.append([])
            ends.append(0.0)
        rows[row].append(entry)
        ends[row] = written if entry.ended is None else entry.ended
    return rows


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _arguments(entry: Entry) -> dict[str, Any]:
    said = {
        "seq": entry.seq,
        "dtype": entry.dtype,
        "shape": entry.shape,
        "op": entry.op,
        "root": entry.root,
        "state": entry.state,
        "at": entry.place,
    }
    if entry.is_message:
        said |= {"peer": entry.peer, "tag": entry.tag}
    if entry.error:
        said["error"] = entry.error
    return said
