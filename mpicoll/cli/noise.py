"""Whether what was measured in turns can tell two ways apart, or the machine was too noisy.

Neighbouring calls share their noise, so the spread of single calls promises too much.  They are cut
into 8 blocks, one after the other.  If the median is as likely to be missed upwards as downwards by
each block's, it lies between their second lowest and their second highest in 93 of 100 cases (the
sign test: 1 - 2 (1 + 8) / 2^8).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

BLOCKS = 8


class Interval(NamedTuple):
    """Where the median of something lies, in 93 of 100 cases."""

    low: float
    high: float

    def tells(self, even: float, apart: float) -> bool:
        """Whether it is on one side of `even`, or within `apart` of it."""
        return not self.low <= even <= self.high or self.high - self.low <= apart


def interval(count: int, median_of: Callable[[slice], float]) -> Interval:
    """Return where the median of `count` values lies, of which it is told the median of a part."""
    blocks = min(BLOCKS, count)
    edges = [count * i // blocks for i in range(blocks + 1)]
    medians = sorted(median_of(slice(a, b)) for a, b in pairwise(edges))
    spare = 1 if blocks == BLOCKS else 0  # with fewer values than blocks, all count
    return Interval(medians[spare], medians[-1 - spare])
