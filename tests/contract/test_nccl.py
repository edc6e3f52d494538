"""What is asked of NCCL, in which order, and that it makes up the collectives: no GPU is needed.

The calls are noted and carried out by mpi4py on host memory; see replay.py.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll import ReduceOp, backends
from mpicoll.errors import (
    CollectiveTimeoutError,
    GroupBrokenError,
    InvalidCallError,
    MpicollError,
    TransportError,
)
from mpicoll.progress import engine
from mpicoll.transports.nccl import NcclTransport
from tests.contract.arrays import Kind, data, reduced
from tests.contract.conftest import _groups
from tests.contract.on_gpus import *  # noqa: F403
from tests.contract.replay import QUEUE, Communicator, Queue
from tests.contract.staging import STREAM, ElsewhereKind
from tests.contract.test_dtypes import (  # noqa: F401
    test_every_pair_is_right_or_refused,
    test_nan_wins_with_the_same_bits_everywhere,
    test_the_other_reductions_agree_with_allreduce,
)

pytestmark = pytest.mark.mpi


def queue_of(pg: mc.ProcessGroup) -> Queue:
    if not isinstance(pg._transport, NcclTransport):
        queue = Queue(pg.comm.Dup())
        pg._transport = NcclTransport(pg._transport, queue, Communicator(queue))
        pg._lane.abort = pg._transport.abort
    return pg._transport._gpu


@pytest.fixture
def pg() -> mc.ProcessGroup:
    pg = _groups(group_name="nccl", progress="thread")
    queue_of(pg)
    return pg


@pytest.fixture
def fresh() -> Iterator[mc.ProcessGroup]:
    pg = mc.new_group(timeout=20, progress="thread")
    queue_of(pg)
    yield pg
    queue_of(pg).open = True
    pg.abort()


@pytest.fixture
def kind(pg) -> Kind:
    return ElsewhereKind(queue_of(pg).settle)


@pytest.fixture(scope="module", autouse=True)
def no_thread_stays_behind() -> Iterator[None]:
    """The tests that follow are to run without one again."""
    yield
    engine._stay = False
    engine._wake.set()


ELSEWHERE = ElsewhereKind()


def names(queue: Queue) -> list[object]:
    return [entry[0] for entry in queue.log]


def test_streams_before_and_after_a_call(fresh):
    queue = queue_of(fresh)
    queue.open = False  # or the call might be over before `wait`, which has nothing to hold then
    x = ELSEWHERE.full(5, 1)
    work = fresh.allreduce(x)
    assert queue.log[0] == ("mark", STREAM), "noted at the call"
    work.wait()
    assert queue.log[1:] == [
        ("queue_after", ("user", 0)),
        ("allReduce", 5, 7, 0),
        ("mark", QUEUE),
        ("hold", 1, (STREAM,)),
    ]


def test_wait_leaves_the_rest_to_the_gpu(fresh):
    queue = queue_of(fresh)
    queue.open = False
    x = ELSEWHERE.full(5, 1)
    work = fresh.allreduce(x)
    with pytest.raises(InvalidCallError, match="under way"):
        work.result()
    assert work.wait() is True and not work.is_completed()
    assert (x.values == 1).all() and work.result() == [x]
    after = fresh.allreduce(x)  # the stream keeps the order, so it may be used again
    assert after.wait()
    queue.open = True
    work.synchronize()
    after.synchronize()
    assert (x.values == fresh.size() ** 2).all()
    assert work.is_success() and after.is_success()


def test_an_array_that_nobody_waited_for_is_in_use(fresh):
    queue = queue_of(fresh)
    queue.open = False
    x = ELSEWHERE.full(5, 1)
    work = fresh.allreduce(x)
    with pytest.raises(InvalidCallError, match=r"wait\(\) for that first"):
        fresh.allreduce(x)
    queue.open = True
    work.synchronize()


def test_arrays_live_until_the_gpu_has_passed_the_call(fresh):
    queue = queue_of(fresh)
    queue.open = False
    x = ELSEWHERE.full(5, 1)
    seen = weakref.ref(x)
    work = fresh.allreduce(x)
    work.wait()
    del x, work
    gc.collect()
    assert seen() is not None
    queue.open = True
    fresh.allreduce(ELSEWHERE.full(3, 1)).synchronize()
    limit = time.monotonic() + 5
    while seen() is not None and time.monotonic() < limit:
        gc.collect()
    assert seen() is None


def test_wait_with_a_timeout_blocks_and_aborts(fresh, world):
    queue = queue_of(fresh)
    queue.open = False
    begin = time.monotonic()
    # One rank's error reaches the others, who may hear of it first.
    with pytest.raises(MpicollError) as caught:
        fresh.allreduce(ELSEWHERE.full(5, 1)).wait(timeout=0.3)
    assert time.monotonic() - begin < 5 and caught.value.breaks_group
    assert ("abort",) in queue.log
    errors = world.allgather(type(caught.value).__name__)
    assert CollectiveTimeoutError.__name__ in errors


def test_the_deadline_holds_for_who_never_waits(fresh):
    """As for a user who synchronises the stream instead: the abort sets the GPU free."""
    queue = queue_of(fresh)
    queue.open = False
    work = fresh.allreduce(ELSEWHERE.full(5, 1), timeout=0.3)
    work.wait()
    limit = time.monotonic() + 5
    while ("abort",) not in queue.log and time.monotonic() < limit:
        time.sleep(0.01)
    assert ("abort",) in queue.log
    with pytest.raises(GroupBrokenError):
        fresh.allreduce(ELSEWHERE.full(5, 1))


def test_an_error_of_nccl_is_a_transport_error(fresh, world):
    queue = queue_of(fresh)
    queue.open = False
    work = fresh.allreduce(ELSEWHERE.full(5, 1))
    work.wait()
    world.Barrier()
    if world.rank == 0:
        fresh._transport._nccl.error = RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
    with pytest.raises(MpicollError) as caught:
        work.synchronize()
    if world.rank == 0:
        assert isinstance(caught.value, TransportError)
        assert "NCCL_ERROR_SYSTEM_ERROR" in str(caught.value)
    assert ("abort",) in queue.log


def test_what_nccl_does_not_do_is_staged(fresh):
    queue = queue_of(fresh)
    settle = ElsewhereKind(queue.settle)
    for op, dtype in [("MAX", "f4"), ("BXOR", "i4"), ("SUM", "i2"), ("SUM", "?")]:
        parts = [data(r, 100, dtype) for r in range(fresh.size())]
        x = settle.array(parts[fresh.rank()])
        fresh.allreduce(x, getattr(ReduceOp, op)).wait()
        assert settle.same(x, reduced(op, parts))
    assert not {"allReduce", "hold"} & set(names(queue)) and "to_host" in names(queue)


def test_staged_calls_come_after_nccls_on_the_same_array(fresh):
    settle = ElsewhereKind(queue_of(fresh).settle)
    x = settle.full(1000, 1)
    for _ in range(3):
        fresh.allreduce(x).wait()
        fresh.allreduce(x, ReduceOp.MAX).wait()
    assert settle.same(x, np.full(1000, fresh.size() ** 3, np.float32))


def test_a_coalesced_call_is_one_group_of_nccls(fresh):
    queue = queue_of(fresh)
    fresh.allreduce_coalesced([ELSEWHERE.full(n, 1) for n in (3, 4, 5)]).synchronize()
    assert names(queue).count("allReduce") == 3 and queue.given == 1


def test_many_calls_are_queued_before_the_first_is_done(fresh):
    queue = queue_of(fresh)
    queue.open = False
    arrays = [ELSEWHERE.full(5, i) for i in range(20)]
    works = [fresh.allreduce(x) for x in arrays]
    for work in works:
        work.wait()
    assert queue.given == 20 and queue.passed == 0
    queue.open = True
    mc.wait_all(works, timeout=10)
    assert all((x.values == fresh.size() * i).all() for i, x in enumerate(arrays))


def test_a_broken_group_lets_go_of_the_peers(fresh):
    fresh.allreduce(ELSEWHERE.full(5, 1)).synchronize()
    fresh.abort()
    assert queue_of(fresh).log[-1] == ("abort",)


def split(
    fresh: mc.ProcessGroup, members: list[int]
) -> tuple[Communicator | None, mc.ProcessGroup]:
    """Split a group and, in the same way, its communicator of NCCL."""
    part = fresh.split_group(members)
    ground = backends.Ground(fresh.comm, gpu=queue_of(fresh), nccl=fresh._transport._nccl)
    made, steps = None, backends.split_nccl(ground, part and part.comm, time.monotonic() + 20)
    while True:
        try:
            with engine._lock:  # or the group's thread would look at the queue in between
                next(steps)
        except StopIteration as stop:
            made = stop.value
            break
    return made, part


def test_a_part_is_split_off_when_the_gpu_has_passed_all_calls(fresh):
    queue = queue_of(fresh)
    fresh.allreduce(ELSEWHERE.full(5, 1)).wait()
    members = [*range(fresh.size())][::-1][: max(1, fresh.size() - 1)]
    made, part = split(fresh, members)
    if fresh.rank() not in members:
        assert made is None and queue.log[-1] == ("commSplit", -1, 0)
        return
    key = members.index(fresh.rank())
    assert queue.log[-1] == ("commSplit", members[0], key) and queue.passed == 1
    assert (made.comm.rank, made.comm.size) == (key, len(members)) == (part.rank(), part.size())
    part._transport = NcclTransport(part._transport, made.q, made)
    x = ELSEWHERE.full(5, fresh.rank())
    part.allreduce(x).synchronize()
    assert (x.values == sum(members)).all()


def test_where_one_rank_cant_split_all_do_without(fresh, world):
    nccl = fresh._transport._nccl
    nccl.comm = (
        MPI.COMM_SELF
    )  # NCCL's own split waits for the rank that fails, or not; this doesn't
    if world.rank == 0:
        nccl.error = RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
    made, part = split(fresh, [*range(world.size)])
    assert made is None and part.size() == world.size


def test_a_good_end_destroys_the_communicator():
    pg = mc.new_group(timeout=20, progress="thread")
    queue = queue_of(pg)
    pg.allreduce(ELSEWHERE.full(5, 1)).wait()
    pg.shutdown()
    assert queue.log[-1] == ("destroy",) and not queue.pending
