"""No false alarms: long random programs of right calls, the same on all ranks, raise nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tests.contract.arrays import KINDS
from tests.contract.test_property import DTYPES, KIND_OF, ORDERED, REDUCING, Step, run
from tests.soak import soak

CALLS = soak(10_000, 200)
pytestmark = [pytest.mark.mpi, pytest.mark.limit(soak(1200, 60))]


def step(dice, n):
    """One call of any kind and of 0 to 70,000 elements, small ones being the most frequent."""
    kind = dice.choice(sorted(KIND_OF))
    op = dice.choice(["SUM", "PRODUCT", "MIN", "MAX"])
    ordered = KIND_OF[kind] in REDUCING and op in ("MIN", "MAX")
    size = int(70_001 ** dice.random()) - 1
    rows = dice.choice([0, 1, 2, 3, 7])
    return Step(
        kind=kind,
        dtype=np.dtype(dice.choice(ORDERED if ordered else DTYPES)),
        shape=(rows, size // rows) if rows else (size,),
        op=op,
        root=dice.randrange(n),
        seed=dice.randrange(10),
        extra=tuple(dice.randrange(4) for _ in range(n)),
        arrays=dice.randrange(len(KINDS)),
        group=0,
        wait=dice.choice([0, 0, 1, 1, 1, 4]),  # Works that stay in flight come to a dozen or so
        delays=(0,) * n,
    )


def test_right_calls_raise_nothing(pg):
    dice = random.Random(pg.name())
    run([pg], (step(dice, pg.size()) for _ in range(CALLS)))
