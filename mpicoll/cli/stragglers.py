"""Who came last to how many collectives, and how long the others waited.

A collective begins when its last rank calls it.  Only those count that all ranks of the group are
known to have called, and in which who came last is not within the uncertainty of the clocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .clocks import Offset
from .recordings import Entry, Group, GroupKey, Recordings


@dataclass
class Straggler:
    """A rank, and what the others waited for it, in seconds.

    Attributes:
        last: the number of collectives to which it came last.
        total: summed over these and over all others of the group.
        longest: the longest that one rank waited, in the call `worst` of `group`.
    """

    rank: int
    last: int = 0
    total: float = 0.0
    longest: float = 0.0
    worst: Entry | None = None
    group: GroupKey | None = None


@dataclass
class Stragglers:
    """Of `compared` collectives, `close` were too close to tell who came last."""

    ranks: list[Straggler]
    compared: int
    close: int


def stragglers(recordings: Recordings, offsets: dict[int, Offset | None]) -> Stragglers:
    """Return every rank's account, the one that was waited for longest first."""
    known = {rank: offset for rank, offset in offsets.items() if offset is not None}
    found = {rank: Straggler(rank) for rank in known}
    compared = close = 0
    for group, calls in _complete(recordings, known):
        compared += 1
        *others, last = sorted(calls, key=lambda entry: entry.called)
        doubt = known[last.rank].uncertainty + known[others[-1].rank].uncertainty
        if last.called - others[-1].called <= doubt:
            close += 1
            continue
        straggler = found[last.rank]
        waits = [last.called - entry.called for entry in others]
        straggler.last += 1
        straggler.total += sum(waits)
        if waits[0] > straggler.longest:
            straggler.longest, straggler.worst, straggler.group = waits[0], last, group.key
    ranked = sorted(found.values(), key=lambda straggler: (-straggler.total, straggler.rank))
    return Stragglers(ranked, compared, close)


def _complete(
    recordings: Recordings, known: dict[int, Offset]
) -> Iterator[tuple[Group, list[Entry]]]:
    """Yield the collectives that all ranks of a group called, on clocks that are aligned."""
    for group in recordings.groups.values():
        members = set(group.key.ranks)
        if len(members) > 1 and members <= set(known):
            for by_rank in group.calls.values():
                if len(by_rank) == len(members) and len({e.kind for e in by_rank.values()}) == 1:
                    yield group, list(by_rank.values())
