"""How the ranks' clocks differ, found from the calls alone.

Nobody finishes a collective before all ranks of its group have called it.  So of a call that
finished on both, a rank's end came after the reference's call, and the reference's end after the
rank's call.  That bounds the offset between their clocks from both sides, as a request and its
answer do for NTP (RFC 5905, section 8); the tightest bounds of all common calls count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from .recordings import Recordings


class Offset(NamedTuple):
    """How far a rank's clock is ahead of the reference's, in seconds, give or take."""

    seconds: float
    uncertainty: float


def align(recordings: Recordings) -> dict[int, Offset | None]:
    """Set all times to the clock of the lowest rank; return the offsets that they had.

    A rank without a finished call in common with the lowest is left as it is: its offset is None.
    """
    reference = min(recordings.processes)
    offsets = {rank: _offset(recordings, rank, reference) for rank in recordings.processes}
    for group in recordings.groups.values():
        entries = [entry for by_rank in group.calls.values() for entry in by_rank.values()]
        for entry in entries + group.messages:
            offset = offsets[entry.rank]
            if offset is not None:
                entry.called -= offset.seconds
                if entry.ended is not None:
                    entry.ended -= offset.seconds
    for rank, process in recordings.processes.items():
        offset = offsets[rank]
        if offset is not None:
            process.started -= offset.seconds
            process.written -= offset.seconds
    return offsets


def _offset(recordings: Recordings, rank: int, reference: int) -> Offset | None:
    if rank == reference:
        return Offset(0.0, 0.0)
    low, high = -math.inf, math.inf
    for group in recordings.groups.values():
        if group.checks != "full":
            continue  # there a broadcast's root, say, need not wait for the other nodes
        for by_rank in group.calls.values():
            mine, other = by_rank.get(rank), by_rank.get(reference)
            if mine is None or other is None or not mine.state == other.state == "finished":
                continue
            assert mine.ended is not None and other.ended is not None
            low = max(low, mine.called - other.ended)
            high = min(high, mine.ended - other.called)
    if math.isinf(low):
        return None
    # Clocks that drift apart can bring low above high; they are then uncertain by as much.
    return Offset((low + high) / 2, abs(high - low) / 2)
