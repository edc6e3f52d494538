"""Staging does what the host transport does: its contract, through late copies of host memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    InvalidCallError,
    UnsupportedError,
)
from mpicoll.transports import select
from mpicoll.transports.cuda import staged
from mpicoll.transports.cuda.staged import StagedTransport
from tests.contract.arrays import NUMPY, Kind, data, reduced
from tests.contract.conftest import BACKENDS, _groups
from tests.contract.on_gpus import *  # noqa: F403
from tests.contract.staging import STREAM, ElsewhereKind, LateCopies
from tests.contract.test_dtypes import (  # noqa: F401
    test_every_pair_is_right_or_refused,
    test_half_precision_is_rounded_once,
    test_nan_wins_with_the_same_bits_everywhere,
    test_the_other_reductions_agree_with_allreduce,
)
from tests.contract.test_p2p import (  # noqa: F401
    test_any_source,
    test_tags_are_told_apart_whatever_the_order,
)

pytestmark = pytest.mark.mpi
ELSEWHERE = ElsewhereKind()
PIECE = 32 * 1024  # so that the arrays of the tests go in several pieces
TUNING = replace(select.tuning, staged_piece=PIECE)


@pytest.fixture(params=BACKENDS)
def pg(request) -> mc.ProcessGroup:
    """A group over each backend in turn, whose arrays are staged."""
    pg = _groups(backend=request.param, group_name="staged")
    if not isinstance(pg._caller.transport, StagedTransport):
        pg._caller.transport = StagedTransport(pg._caller.transport, LateCopies(), TUNING)
    return pg


@pytest.fixture
def fresh() -> Iterator[mc.ProcessGroup]:
    pg = mc.new_group(timeout=20)
    pg._caller.transport = StagedTransport(pg._caller.transport, LateCopies(), TUNING)
    yield pg
    pg.shutdown()


@pytest.fixture
def kind() -> Kind:
    return ELSEWHERE


def test_host_arrays_go_as_ever(pg):
    parts = [data(r, 1000) for r in range(pg.size())]
    x = parts[pg.rank()].copy()
    pg.allreduce(x).wait()
    assert NUMPY.same(x, reduced("SUM", parts))
    assert pg.allgather_object(pg.rank()) == list(range(pg.size()))
    pg.barrier().wait()
    assert (pg.empty(5) + 1).size == 5


def test_both_kinds_of_calls_alternate(pg):
    parts = [data(r, 20_000) for r in range(pg.size())]
    for _ in range(3):
        for kind in (ELSEWHERE, NUMPY):
            x = kind.array(parts[pg.rank()])
            pg.allreduce(x).wait()
            assert kind.same(x, reduced("SUM", parts))


def test_several_works_are_under_way(pg):
    parts = [[data(r, 30_000, seed=i) for r in range(pg.size())] for i in range(4)]
    mine = [ELSEWHERE.array(rows[pg.rank()]) for rows in parts]
    mc.wait_all([pg.allreduce(x) for x in mine])
    assert all(ELSEWHERE.same(x, reduced("SUM", rows)) for x, rows in zip(mine, parts))


def test_pieces_overlap_and_rooms_are_few(fresh):
    copies = fresh._caller.transport._copies
    pieces = 6
    fresh.allreduce(ELSEWHERE.array(data(fresh.rank(), pieces * PIECE // 4))).wait()
    ways = [entry[0] for entry in copies.log]
    assert ways.count("to_host") == ways.count("to_device") == pieces
    assert ways.count("pinned") == staged.ROOMS
    moved = [way for way in ways if way.startswith("to_")]
    assert moved[:3] == ["to_host", "to_host", "to_device"], "a piece is copied while one is moved"


def test_copies_come_after_what_the_arrays_streams_were_given(fresh):
    n, log = fresh.size(), fresh._caller.transport._copies.log
    output, source = ELSEWHERE.full(n * 5, 0), ELSEWHERE.full(5, 1)
    work = fresh.all_gather_single(output, source)
    assert log[0] == ("mark", STREAM), "noted at the call, not when it starts"
    assert [entry[0] for entry in log].count("mark") == 1, "once for each stream"
    work.wait()
    first = next(i for i, entry in enumerate(log) if str(entry[0]).startswith("to_"))
    assert ("after", ("mark", 1)) in log[:first]


def test_so_do_those_of_a_coalesced_call(fresh):
    fresh.allreduce_coalesced([ELSEWHERE.full(n, 1) for n in (5, 6)]).wait()
    log = fresh._caller.transport._copies.log
    assert [entry[0] for entry in log].count("mark") == 1
    first = next(i for i, entry in enumerate(log) if str(entry[0]).startswith("to_"))
    assert ("after", ("mark", 1)) in log[:first]


def test_reading_and_writing_are_left_out_where_nothing_is_read_or_written(fresh):
    log = fresh._caller.transport._copies.log
    fresh.broadcast(ELSEWHERE.full(5, 1), 0).wait()
    ways = {entry[0] for entry in log if str(entry[0]).startswith("to_")}
    assert ways == ({"to_host"} if fresh.rank() == 0 else {"to_device"})


def test_host_and_gpu_arrays_in_one_call_of_a_rank(pg):
    with pytest.raises(InvalidCallError, match="output and input must lie in the same memory"):
        pg.all_gather_single(ELSEWHERE.full(5 * pg.size(), 0), NUMPY.full(5, 0))
    pg.barrier().wait()


def test_host_arrays_on_one_rank_and_gpu_arrays_on_another(pg):
    if pg.size() == 1:
        pytest.skip("needs two ranks")
    kind = ELSEWHERE if pg.rank() == 0 else NUMPY
    with pytest.raises(CollectiveMismatchError, match=r"float32\[5\] in GPU memory"):
        pg.allreduce(kind.full(5, 1)).wait()
    pg.barrier().wait()


def test_an_array_on_another_gpu(pg, monkeypatch):
    monkeypatch.setattr(LateCopies, "device", 4)
    with pytest.raises(InvalidCallError, match=r"^tensor lies on GPU 3.*on GPU 4.*cuda:3"):
        pg.allreduce(ELSEWHERE.full(5, 1))
    monkeypatch.undo()
    pg.barrier().wait()


def test_a_group_on_host_memory_refuses_gpu_arrays(world):
    group = _groups(backend="auto")
    with pytest.raises(UnsupportedError, match=r'^tensor must lie in host.*device="cuda"'):
        group.allreduce(ELSEWHERE.full(5, 1))
    with pytest.raises(UnsupportedError, match=r"^tensor must lie in host"):
        group.send(ELSEWHERE.full(5, 1), 0)
    group.barrier().wait()


def test_messages_keep_their_order_whatever_memory_they_come_from(pg):
    right, left = (pg.rank() + 1) % pg.size(), (pg.rank() - 1) % pg.size()
    kinds = [ELSEWHERE, NUMPY, ELSEWHERE, ELSEWHERE, NUMPY, NUMPY]
    sent = [kind.full(20_000, i) for i, kind in enumerate(kinds)]
    got = [kind.full(20_000, -1) for kind in reversed(kinds)]
    works = [pg.send(x, right, tag=1) for x in sent]
    works += [pg.recv(x, left, tag=1) for x in got]
    mc.wait_all(works)
    for i, (x, kind) in enumerate(zip(got, reversed(kinds))):
        assert kind.same(x, np.full(20_000, i, np.float32))


def test_an_expired_receive_is_cancelled(pg, world):
    x = ELSEWHERE.full(5, 1)
    with pytest.raises(CollectiveTimeoutError, match="no matching message"):
        pg.recv(x, tag=9, timeout=0.2).wait()
    assert ELSEWHERE.same(x, np.full(5, 1, np.float32))
    pg.barrier().wait()


def test_a_message_of_another_size(pg):
    right, left = (pg.rank() + 1) % pg.size(), (pg.rank() - 1) % pg.size()
    work = pg.send(ELSEWHERE.full(4, 1), right, tag=3)
    with pytest.raises(CollectiveMismatchError, match=r"sent float32\[4\]"):
        pg.recv(ELSEWHERE.full(5, 1), left, tag=3).wait()
    work.wait()
    pg.barrier().wait()


POINT = np.dtype([("id", "i4"), ("at", "f8", 2), ("seen", "M8[s]")])


@pytest.mark.parametrize("dtype", ["M8[s]", "S5", POINT], ids=str)
def test_what_is_in_no_table_of_dtypes_moves(pg, dtype):
    n, me = pg.size(), pg.rank()
    parts = [np.arange(r, r + 3000).astype("i8").astype("M8[s]") for r in range(n)]
    if dtype == "S5":
        parts = [part.astype("i8").astype("S5") for part in parts]
    elif dtype is POINT:
        parts = [np.rec.fromarrays([p.astype("i4"), np.ones((3000, 2)), p], POINT) for p in parts]
        parts = [np.asarray(part).view(POINT) for part in parts]
    outputs = [ELSEWHERE.array(np.zeros(3000, dtype)) for _ in range(n)]
    pg.allgather(outputs, ELSEWHERE.array(parts[me])).wait()
    assert all((out.values == part).all() for out, part in zip(outputs, parts, strict=True))
    if dtype == "M8[s]":
        x = ELSEWHERE.array(parts[me])
        pg.allreduce(x, mc.ReduceOp.MAX).wait()
        assert (x.values == parts[-1]).all()


def test_wide_elements_are_refused(pg):
    x = ELSEWHERE.array(np.zeros(3, "S33"))
    with pytest.raises(UnsupportedError, match=r"more than 32 bytes.*tensor\.view\(np\.uint8\)"):
        pg.broadcast(x, 0)
    pg.broadcast(ELSEWHERE.array(x.values.view(np.uint8)), 0).wait()
