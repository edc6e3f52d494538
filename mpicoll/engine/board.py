"""What a group's ranks on one node show each other in its memory, beside their data.

`NodeBoard` knows the group's ranks, where the memory counts the places of its users.  A `Board` is
that of a rank that shares no memory: nothing is seen there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..runtime.memory import NodeMemory
from .kinds import KINDS
from .records import KIND, ROOT, SEQ


class Board:
    """Nothing is seen of other ranks.

    Attributes:
        ranks: the group's ranks of this node, in the order of their places.
        locked: whether deaths are seen.
    """

    ranks: Sequence[int] = ()
    locked = False

    def leave(self, seq: int) -> None:
        """Show that this rank makes call `seq`, and all later ones, no more."""

    def finish(self, seq: int) -> None:
        """Show that this rank has finished a call."""

    def post_notice(self, seq: int, text: bytes) -> bool:
        """Leave a notice about a call; return whether the node can see it."""
        return False

    def notice(self, rank: int, seq: int) -> str:
        """Return what a rank of this node has left about a call; nothing if there is none."""
        return ""

    def has_arrived(self, rank: int, seq: int) -> bool:
        """Return whether a rank's record of call `seq` is seen to be there."""
        return False

    def has_died(self, rank: int) -> bool:
        """Return whether a rank of this node is seen to have died."""
        return False

    def last_seen(self, rank: int) -> str:
        """Say what a rank of this node is doing, as far as that is seen."""
        return ""


NO_BOARD = Board()


class NodeBoard(Board):
    """What is seen in the memory of a node.

    Args:
        memory: what the ranks of the node share.
        ranks: those ranks, as ranks of the group, in the order of their places in the memory.
    """

    def __init__(self, memory: NodeMemory, ranks: Sequence[int]) -> None:
        self.memory = memory
        self.ranks = ranks
        self.locked = memory.locked
        self._places = {rank: place for place, rank in enumerate(ranks)}
        self._finished = memory.finished[memory.rank]

    def leave(self, seq: int) -> None:
        self.memory.leave(seq)

    def post_notice(self, seq: int, text: bytes) -> bool:
        return self.memory.post_notice(seq, text)

    def finish(self, seq: int) -> None:
        self.memory.words[self._finished] = seq

    def notice(self, rank: int, seq: int) -> str:
        return self.memory.notice(self._places[rank], seq).decode()

    def has_arrived(self, rank: int, seq: int) -> bool:
        place = self._places.get(rank)
        return place is not None and self.memory.has_posted(place, seq)

    def has_died(self, rank: int) -> bool:
        return self.memory.has_died(self._places[rank])

    def last_seen(self, rank: int) -> str:
        place = self._places.get(rank)
        if place is None:
            return ""
        finished = self.memory.words[self.memory.finished[place]]
        rows = [self.memory.records(seq)[place] for seq in (0, 1)]  # its last two
        row = max(rows)
        if row[SEQ] > finished:
            root = f", root {row[ROOT]}" if row[ROOT] >= 0 else ""
            return f"it is in {KINDS[row[KIND]]} #{row[SEQ]}{root}"
        if not finished:
            return "it has made no call yet"
        kinds = {r[SEQ]: KINDS[r[KIND]] for r in rows}
        return f"last finished {kinds.get(finished, 'call')} #{finished}"
