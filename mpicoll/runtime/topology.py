"""Which ranks of a group share a node: one picture, the same on all ranks.

A node is a place in the group's order of nodes (by lowest rank) and the ranks there; a rank's
place is its position among them.  Ranks of one place, below the size of the smallest node, form a
stripe: what nodes exchange, they exchange stripe by stripe.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes of one group.

    Attributes:
        members: the group's ranks on each node, in order; nodes are in order of their lowest.
    """

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, keys: Sequence[int]) -> Nodes:
        """Return the nodes of ranks that are on one where their keys are equal."""
        found: dict[int, list[int]] = {}
        for rank, key in enumerate(keys):
            found.setdefault(key, []).append(rank)
        return cls(tuple(map(tuple, found.values())))

    @property
    def stripes(self) -> int:
        """Ranks on the smallest node."""
        return min(map(len, self.members))

    def locate(self, rank: int) -> tuple[int, int]:
        """Return the node of a rank and its place there."""
        for node, ranks in enumerate(self.members):
            if rank in ranks:
                return node, ranks.index(rank)
        raise ValueError(f"rank {rank} is on no node")

    def by_stripe(self) -> list[list[list[int]]]:
        """Return the ranks that each stripe serves on each node: those of its place, in turn."""
        return [
            [list(ranks[stripe :: self.stripes]) for ranks in self.members]
            for stripe in range(self.stripes)
        ]


def shares(count: int, parts: int) -> list[int]:
    """Divide a count as evenly as can be; no part is more than one larger than another."""
    bounds = [count * i // parts for i in range(parts + 1)]
    return [high - low for low, high in itertools.pairwise(bounds)]


def spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Return where parts of these counts begin and end when they lie one after the other."""
    return list(itertools.pairwise((0, *itertools.accumulate(counts))))
