"""Moves by addresses, as a CUDA-aware MPI library takes them; here they are of host memory.

The messages are MPI's own.  What reduces is staged, through late copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.arrays.device import DeviceArray
from mpicoll.errors import CollectiveMismatchError, CollectiveTimeoutError, GroupBrokenError
from mpicoll.runtime.library import exchange_tag
from mpicoll.transports import select
from mpicoll.transports.cuda.aware import AwareTransport
from mpicoll.transports.tuning import Tuning
from tests.contract.arrays import NUMPY, Kind, data, reduced
from tests.contract.conftest import BACKENDS, _groups, meet
from tests.contract.on_gpus import *  # noqa: F403
from tests.contract.staging import LOOKS, STREAM, ElsewhereKind, LateCopies, at

pytestmark = pytest.mark.mpi
ELSEWHERE = ElsewhereKind()


class Device(LateCopies):
    """Keeps `mpicoll.transports.cuda.aware.Device`: a mark is passed at the fourth look."""

    def __init__(self) -> None:
        super().__init__()
        self.looks: dict[Any, int] = {}

    def within(self, source: DeviceArray, into: DeviceArray) -> Callable[[], bool]:
        assert source.nbytes == into.nbytes and self.active_now
        return self._start("within", at(into.address, into.nbytes), at(source.address, into.nbytes))

    def is_done(self, mark: Any) -> bool:
        assert self.active_now
        self.looks[mark] = self.looks.get(mark, 0) + 1
        return self.looks[mark] >= LOOKS


def device_of(pg: mc.ProcessGroup, tuning: Tuning = select.tuning) -> Device:
    if not isinstance(pg._caller.transport, AwareTransport):
        pg._caller.transport = AwareTransport(pg._caller.transport, Device(), pg.comm, tuning)
    return pg._caller.transport._gpu


@pytest.fixture(params=BACKENDS)
def pg(request) -> mc.ProcessGroup:
    pg = _groups(backend=request.param, group_name="aware")
    # Both ways of a broadcast are gone, and the arrays go in several messages.
    device_of(pg, replace(select.tuning, aware_whole=2000, aware_message=1000))
    return pg


@pytest.fixture
def fresh() -> Iterator[mc.ProcessGroup]:
    pg = mc.new_group(timeout=20)
    device_of(pg)
    yield pg
    pg.abort()


@pytest.fixture
def kind() -> Kind:
    return ELSEWHERE


def test_what_only_moves_is_not_copied(fresh):
    device, p = device_of(fresh), fresh.size()
    fresh.broadcast(ELSEWHERE.full(5, 1), 0).wait()
    fresh.all_gather_single(ELSEWHERE.full(5 * p, 0), ELSEWHERE.full(5, 1)).wait()
    fresh.all_to_all_single(ELSEWHERE.full(p, 0), ELSEWHERE.full(p, 1), None, None).wait()
    assert {entry[0] for entry in device.log} == {"mark", "within"}
    assert [entry[0] for entry in device.log].count("within") == 2, "a rank's own blocks"
    fresh.allreduce(ELSEWHERE.full(5, 1)).wait()
    assert "to_host" in {entry[0] for entry in device.log}


def test_what_is_in_place_is_not_copied_onto_itself(fresh):
    device, n, me = device_of(fresh), fresh.size(), fresh.rank()
    x = ELSEWHERE.full(5 * n, me)
    fresh.all_gather_single(x, x[5 * me : 5 * me + 5]).wait()
    assert {entry[0] for entry in device.log} == {"mark"}
    assert NUMPY.same(x.values, np.repeat(np.arange(n, dtype="f4"), 5))


def test_mpi_sees_no_address_before_its_stream_is_done(fresh):
    device = device_of(fresh)
    fresh.broadcast(ELSEWHERE.full(5, 1), 0).wait()
    assert device.log == [("mark", STREAM)]
    assert list(device.looks.values()) == [LOOKS]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 1001])
def test_broadcast_from_each_root(pg, count):
    for root in range(pg.size()):
        x = ELSEWHERE.array(data(pg.rank() + 1, count))
        pg.broadcast(x, root).wait()
        assert ELSEWHERE.same(x, data(root + 1, count))


def test_host_arrays_and_reductions_in_turn(pg):
    parts = [data(r, 3000) for r in range(pg.size())]
    for kind, root in itertools.product((ELSEWHERE, NUMPY), range(pg.size())):
        x, y = kind.array(parts[pg.rank()]), kind.array(parts[pg.rank()])
        pg.allreduce(x).wait()
        pg.broadcast(y, root).wait()
        assert kind.same(x, reduced("SUM", parts)) and kind.same(y, parts[root])


def test_several_works_are_under_way(pg):
    parts = [[data(r, 3000, seed=i) for r in range(pg.size())] for i in range(4)]
    mine = [ELSEWHERE.array(rows[pg.rank()]) for rows in parts]
    mc.wait_all([pg.broadcast(x, i % pg.size()) for i, x in enumerate(mine)])
    roots = [rows[i % pg.size()] for i, rows in enumerate(parts)]
    assert all(ELSEWHERE.same(x, root) for x, root in zip(mine, roots, strict=True))


def test_a_mismatch_leaves_it_usable(pg):
    if pg.size() == 1:
        pytest.skip("needs two ranks")
    x = ELSEWHERE.full(4 + (pg.rank() == 0), 1)
    with pytest.raises(CollectiveMismatchError):
        pg.broadcast(x, 0).wait()
    pg.broadcast(ELSEWHERE.full(4, 1), 0).wait()


def test_a_rank_that_stops_in_the_middle(fresh, world):
    """It has arrived, but sends nothing; what the others posted is kept, and their GPU let go."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    if world.rank == 0:
        fresh._caller.transport._move = lambda call: iter(())
        fresh.broadcast(ELSEWHERE.full(50, 0), 0).wait()
        meet(world)
        for rank in range(1, world.size):  # or MPI could not be finalized
            fresh.comm.Send([b"", MPI.BYTE], rank, exchange_tag())
        return
    try:
        with pytest.raises(CollectiveTimeoutError):
            fresh.broadcast(ELSEWHERE.full(50, 0), 0, timeout=0.3).wait()
        with pytest.raises(GroupBrokenError):
            fresh.barrier()
        assert not device_of(fresh).active_now
    finally:
        meet(world)
