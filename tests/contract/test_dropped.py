"""Arrays that the program lets go of while a call uses them: the Work keeps them, or the group.

On bare mpi4py each of these is a segmentation fault, or someone else's data overwritten.
"""

from __future__ import annotations

import gc

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from tests.contract.arrays import KINDS
from tests.contract.test_property import KIND_OF, TORCH, Step
from tests.soak import soak

pytestmark = [pytest.mark.mpi, pytest.mark.limit(soak(1800, 60))]

ASYNCHRONOUS = sorted(KIND_OF.keys() - {"allgather_object"})
# Elements, and how often: of 4 bytes, and of what takes one path after the other.
OFTEN = soak(200 if MPI.COMM_WORLD.size == 2 else 20, 3)
SIZES = {1: OFTEN, 250: OFTEN, 75_000: soak(OFTEN, 1)} | soak({1_100_000: 3}, {})


def step(kind, count, turn, n):
    """A call of `count` float32; roots, neighbours and values change from turn to turn."""
    return Step(
        kind=kind,
        dtype=np.dtype("f4"),
        shape=(count,),
        op="SUM",
        root=turn % n,
        seed=turn % 10,
        extra=tuple((turn + r) % 4 for r in range(n)),
        arrays=0,
        group=0,
        wait=0,
        delays=(0,) * n,
    )


def start(pg, count, turn, kind):
    """Start every kind of call; nobody but the Works holds what they read."""
    started = []
    for name in ASYNCHRONOUS:
        works, results = KIND_OF[name](pg, step(name, count, turn, pg.size()), kind.array)
        started.append((name, works if isinstance(works, list) else [works], results))
    return started


@pytest.mark.parametrize("dropped", ["input", "output", "both"])
@pytest.mark.parametrize("count", SIZES)
def test_dropped_while_in_flight(pg, count, dropped):
    for turn in range(SIZES[count]):
        kind = KINDS[turn % 2 if TORCH else 0]
        started = start(pg, count, turn, kind)
        if dropped == "output":
            started = [(name, works, []) for name, works, _ in started]
        elif dropped == "both":  # and the Works with them
            del started
            started = []
        gc.collect(1)  # all this is young
        junk = [np.full(count, 7, np.float32) for _ in range(4 * pg.size() + 20)]
        for name, works, results in started:
            mc.wait_all(works)
            for got, expected in results:
                assert kind.same(got, expected), (name, turn)
        pg.barrier().wait()
        assert all((x == 7).all() for x in junk), turn


def test_these_are_all_asynchronous_calls():
    """A collective that is added to groups has its place here."""
    returns_work = {
        name
        for name, method in vars(mc.ProcessGroup).items()
        if not name.startswith("_")
        and getattr(method, "__annotations__", {}).get("return") == "Work"
    }
    others = {"send", "recv", "recv_anysource"}  # tried by `ring`
    assert returns_work == {*ASYNCHRONOUS, *others} - {"ring"}
