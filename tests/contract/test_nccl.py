"""What is asked of NCCL, in which order, and that it makes up the collectives: no GPU is needed.

The calls are noted and carried out by mpi4py on host memory; see replay.py.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll import ReduceOp
from mpicoll.engine import kinds
from mpicoll.engine.arrival import BoardArrival
from mpicoll.engine.background import Background, background
from mpicoll.engine.call import Call
from mpicoll.engine.once import Once
from mpicoll.engine.progress import Engine, engine
from mpicoll.engine.recorder import Recorder
from mpicoll.engine.tasks import GroupState, Task
from mpicoll.errors import (
    CollectiveTimeoutError,
    GroupBrokenError,
    InvalidCallError,
    MpicollError,
    TransportError,
    UnsupportedError,
)
from mpicoll.runtime.library import IDLE, PROGRESSED, pause
from mpicoll.transports import select
from mpicoll.transports.cuda.nccl import NcclTransport, Turns
from mpicoll.transports.tuning import Tuning
from tests.contract.arrays import Kind, data, reduced
from tests.contract.conftest import _groups, meet
from tests.contract.on_gpus import *  # noqa: F403
from tests.contract.replay import QUEUE, Communicator, Queue
from tests.contract.staging import STREAM, Elsewhere, ElsewhereKind
from tests.contract.test_dtypes import (  # noqa: F401
    test_every_pair_is_right_or_refused,
    test_nan_wins_with_the_same_bits_everywhere,
    test_the_other_reductions_agree_with_allreduce,
)

pytestmark = pytest.mark.mpi


TURNS = Turns()


def queue_of(pg: mc.ProcessGroup, tuning: Tuning = select.tuning) -> Queue:
    if not isinstance(pg._caller.transport, NcclTransport):
        queue = Queue(pg.comm.Dup())
        nccl = Communicator(queue)
        pg._caller.transport = NcclTransport(pg._caller.transport, queue, nccl, TURNS, tuning)
        pg._caller.group_state.channel._transport = pg._caller.transport
    return pg._caller.transport._gpu


@pytest.fixture
def pg() -> mc.ProcessGroup:
    pg = _groups(group_name="nccl", progress="thread")
    queue_of(pg)
    return pg


@pytest.fixture
def fresh(tuning) -> Iterator[mc.ProcessGroup]:
    pg = mc.new_group(timeout=20, progress="thread")
    queue_of(pg, tuning)
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
    background()._stay = False
    background()._wake.set()


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
        ("all_reduce", 5, 7, 0),
        ("mark", QUEUE),
        ("hold", 1, (STREAM,)),
    ]


def test_what_is_in_place_is_not_sent_to_oneself(fresh):
    n, me = fresh.size(), fresh.rank()
    x, y = (ELSEWHERE.full(5 * n, 1) for _ in range(2))
    inputs, outputs = ([a[5 * r : 5 * r + 5] for r in range(n)] for a in (x, y))
    outputs[me] = inputs[me]
    fresh.alltoall(outputs, inputs).wait()
    moves = [entry[0] for entry in queue_of(fresh).log if entry[0] in ("send", "recv")]
    assert sorted(moves) == ["recv"] * (n - 1) + ["send"] * (n - 1)


def test_what_waits_for_a_call_is_the_stream_that_orders_the_array_by_then(fresh):
    """The one of the call may be gone; to make other streams wait would hold up what they do."""
    queue = queue_of(fresh)
    queue.open = False
    x = ELSEWHERE.full(5, 1)
    work = fresh.allreduce(x)
    x.stream = 8
    work.wait()
    assert ("queue_after", ("user", 0)) in queue.log and queue.log[-1] == ("hold", 1, (8,))


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
    meet(world)
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
    meet(world)
    if world.rank == 0:
        fresh._caller.transport._nccl.error = RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
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
    assert not {"all_reduce", "hold"} & set(names(queue)) and "to_host" in names(queue)


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
    assert names(queue).count("all_reduce") == 3 and queue.given == 1
    assert ("group", 3) in queue.log


def test_a_call_that_is_one_of_nccls_is_no_group_of_them(fresh):
    queue, n = queue_of(fresh), fresh.size()
    x, y = ELSEWHERE.full(6 * n, 1), ELSEWHERE.full(6, 1)
    fresh.allreduce(x).synchronize()
    fresh.broadcast(x, 0).synchronize()
    fresh.reduce(x, 0).synchronize()
    fresh.reduce_scatter_single(y, x).synchronize()
    fresh.all_gather_single(x, y).synchronize()
    assert "group" not in names(queue) and queue.given == 5


def test_all_ranks_make_the_same_calls_wherever_their_arrays_lie(fresh, world):
    """One rank's blocks lie in a row, another's apart."""
    queue, n, me = queue_of(fresh), fresh.size(), fresh.rank()
    rows = np.zeros((n, 50), np.float32)
    apart = [np.zeros(50, np.float32) for _ in range(n)]
    blocks = [Elsewhere(block) for block in (rows if me == 0 else apart)]
    fresh.allgather(blocks, ELSEWHERE.full(50, me)).synchronize()
    assert all((block.values == i).all() for i, block in enumerate(blocks))
    into = ELSEWHERE.full(50, 0)
    fresh.reduce_scatter(into, blocks).synchronize()
    assert (into.values == n * me).all()
    meet(world)
    said = world.allgather([entry for entry in queue.log if entry[0] in dir(Communicator)])
    assert said[0] and all(other == said[0] for other in said)


def test_the_factor_of_a_sum_is_given_back(fresh):
    x, comm = ELSEWHERE.full(5, 1), fresh._caller.transport._nccl
    fresh.allreduce(x, ReduceOp.PREMUL_SUM(0.5)).synchronize()
    assert (x.values == fresh.size() / 2).all()
    assert comm.made > 1000 and not comm.factors


@pytest.fixture
def two() -> Iterator[tuple[mc.ProcessGroup, mc.ProcessGroup]]:
    made = [mc.new_group(timeout=20, progress="thread") for _ in range(2)]
    for pg in made:
        queue_of(pg)
    yield tuple(made)
    for pg in made:
        queue_of(pg).open = True
        pg.abort()


def held_up(pg: mc.ProcessGroup, seconds: float) -> None:
    """Let the next arrivals in a group take longer."""
    arrival = pg._caller.arrival
    meet = arrival.meet

    def later(call, seq):
        yield from pause(seconds)
        return (yield from meet(call, seq))

    arrival.meet, arrival.all_here = later, lambda call, seq: False


def test_who_comes_last_goes_on_at_once(fresh, world):
    """There is nobody to wait for, so it takes the short way."""
    arrival, last = fresh._caller.arrival, world.size - 1
    if type(arrival) is not BoardArrival or not last:
        pytest.skip("needs two ranks on one node")
    x = ELSEWHERE.full(5, 1)
    fresh.allreduce(x).synchronize()
    if world.rank == last:
        meet(world)
        arrival.meet = None
        fresh.allreduce(x).synchronize()
    else:
        work = fresh.allreduce(x)
        meet(world)
        work.synchronize()
    assert (x.values == world.size**2).all()


def test_calls_of_two_groups_are_enqueued_in_the_order_of_the_program(two, world):
    """Whichever group's ranks have arrived first: NCCL wants one order on all ranks."""
    order: list[int] = []
    for i, pg in enumerate(two):
        pg._caller.transport._nccl._note = lambda name, stream, *what, i=i: order.append(i)
    if world.rank == 0:
        held_up(two[0], 0.1)
    arrays = [ELSEWHERE.full(5, 1) for _ in range(6)]
    works = [two[i % 2].allreduce(x) for i, x in enumerate(arrays)]
    mc.wait_all(works, timeout=10)
    assert order == [0, 1] * 3
    assert all((x.values == world.size).all() for x in arrays)


def test_a_call_that_never_comes_so_far_holds_up_no_other(two, world):
    """Refused here, refused by the comparison, dropped with its group: each has had its turn."""
    one, other = two
    x, y = ELSEWHERE.full(5, 1), ELSEWHERE.full(5, 1)
    queue_of(one).open = False
    work = one.allreduce(x)
    with pytest.raises(InvalidCallError, match=r"wait\(\) for that first"):
        one.allreduce(x)
    queue_of(one).open = True
    work.synchronize()
    if world.size > 1:
        with pytest.raises(MpicollError, match="differs"):
            one.allreduce(ELSEWHERE.full(5 + world.rank, 1)).wait()
    other.allreduce(y).synchronize()
    held_up(one, 1000)
    one.allreduce(x)
    waiting = other.allreduce(y)
    time.sleep(0.05)
    assert not waiting.is_completed()
    meet(world)  # the abort of one rank is heard by the others
    one.abort()
    waiting.synchronize()
    assert (y.values == world.size**2).all()


def test_where_a_peer_never_connects_the_deadline_holds_and_others_go_on(two, world):
    stuck, other = two
    stuck._caller.transport._nccl.opened = False
    begin = time.monotonic()
    work = stuck.allreduce(ELSEWHERE.full(5, 1), timeout=0.5)
    with pytest.raises(MpicollError) as caught:
        work.wait()
    assert time.monotonic() - begin < 5 and caught.value.breaks_group
    assert ("abort",) in queue_of(stuck).log
    meet(world)
    errors = world.allgather(type(caught.value).__name__)
    assert CollectiveTimeoutError.__name__ in errors
    x = ELSEWHERE.full(5, 1)
    other.allreduce(x).synchronize()
    assert (x.values == world.size).all()


def test_the_first_of_its_kind_connects_and_the_next_is_enqueued_in_one_go(fresh):
    queue, comm = queue_of(fresh), fresh._caller.transport._nccl
    for size in (5, 8):
        fresh.allreduce(ELSEWHERE.full(size, 1)).synchronize()
    assert len(comm.warm) == 2
    comm.opened = False  # whatever would connect now would never settle
    for size in (4, 7, 8, 15):
        fresh.allreduce(ELSEWHERE.full(size, 1)).synchronize()
    assert queue.given == 6


@pytest.fixture
def own() -> Engine:
    """An engine beside that of the groups."""
    return Engine()


@pytest.fixture
def keeper(own) -> Iterator[Background]:
    """What keeps its deadlines; its threads end with the test."""
    made = Background(own)
    made.keep_deadlines()
    yield made
    made.stop()


def task_in(state: GroupState, seq: int, timeout: float) -> Task:
    return Task(state, Call(kinds.ALLREDUCE), seq, timeout, Recorder(state.name, 0, [0]))


def stuck(own: Engine, free: threading.Event, how: str) -> Iterator[int]:
    """Steps of which one blocks until it is freed, as where NCCL blocks but should not."""
    if how == "later":  # the keeper takes it
        yield IDLE
    own.inside = free.set
    assert free.wait(20)
    own.inside = None
    if how == "raises":
        raise RuntimeError("NCCL was aborted")
    if how == "goes on":
        yield PROGRESSED


@pytest.mark.parametrize("how", ["raises", "returns", "goes on", "later"])
def test_a_step_that_is_stuck_past_its_deadline_is_freed(own, keeper, how):
    """Whichever thread has taken it; what it returns then is no success."""
    state, free = GroupState("stuck", MPI.COMM_SELF, own.active), threading.Event()
    task = task_in(state, 1, 0.2)
    own.launch(task, stuck(own, free, how))
    limit = time.monotonic() + 10
    while not task.done:
        assert time.monotonic() < limit
        time.sleep(0.01)
    assert isinstance(task.error, CollectiveTimeoutError) and state.broken is task.error


def test_a_step_that_is_long_is_left_alone_outside_of_nccl(own, keeper):
    state = GroupState("slow", MPI.COMM_SELF, own.active)
    state.channel.abort = pytest.fail
    task = task_in(state, 1, 0.1)

    def steps() -> Iterator[int]:
        time.sleep(0.5)
        yield from ()

    own.launch(task, steps())
    assert task.done and task.error is None


def test_a_busy_group_keeps_no_other_from_its_deadline(own):
    busy, quiet = (
        GroupState("busy", MPI.COMM_SELF, own.active),
        GroupState("quiet", MPI.COMM_SELF, own.active),
    )

    def forever(mood: int) -> Iterator[int]:
        while True:
            yield mood

    own.launch(task_in(busy, 1, 60), forever(PROGRESSED))
    task = task_in(quiet, 1, 0.2)
    own.launch(task, forever(IDLE))
    limit = time.monotonic() + 10
    while not task.done:
        assert time.monotonic() < limit
        own.test()
    assert isinstance(task.error, CollectiveTimeoutError)


def test_a_call_that_was_enqueued_just_now_is_not_asked_for(own):
    """The GPU has hardly begun with it, and each question is a call of CUDA."""
    state, asked = GroupState("new", MPI.COMM_SELF, own.active), []

    def steps(task: Task) -> Iterator[int]:
        task.call.enqueued = task
        yield PROGRESSED
        asked.append(task.seq)

    first, second = (task_in(state, n, 60) for n in (1, 2))
    own.launch(first, steps(first))
    assert not asked and not first.done
    own.launch(second, steps(second))
    assert asked == [1] and first.done and not second.done
    own.test()
    assert asked == [1, 2] and not own.busy


def test_an_abort_that_fails_leaves_no_call_without_an_end(own):
    state = GroupState("failing", MPI.COMM_SELF, own.active)
    state.channel.abort = lambda: 1 / 0
    tasks = [task_in(state, n, 60) for n in (1, 2, 3)]
    for task in tasks:
        own.launch(task, iter([IDLE] * 10**6))
    own.fail_all(state, TransportError("planted"))
    assert all(task.done and task.error is not None for task in tasks) and not own.busy


def test_whatever_is_asked_of_cuda_can_be_freed_at_the_deadline(fresh):
    """Each call of CUDA may block behind another thread's wait for the whole GPU."""
    queue, seen = queue_of(fresh), []

    def noted(name: str, call: Callable[[object], object], given: object) -> object:
        seen.append((name, engine().inside is not None))
        return call(given)

    for name in ("mark", "queue_after", "is_done"):
        setattr(queue, name, partial(noted, name, getattr(queue, name)))
    x = ELSEWHERE.full(5, 1)
    for _ in range(2):  # the first one connects
        fresh.allreduce(x).synchronize()
    at_the_call = [("mark", False)] * 2  # by the user's thread, which holds no lock then
    asked = [entry for entry in seen if not entry[1]]
    assert asked == at_the_call and {name for name, _ in seen} == {"mark", "queue_after", "is_done"}
    assert engine().inside is None


def test_only_the_oldest_call_on_the_stream_is_asked_for(fresh):
    queue = queue_of(fresh)
    queue.open = False
    works = [fresh.allreduce(ELSEWHERE.full(5, 1)) for _ in range(20)]
    for work in works:
        work.wait()
    for _ in range(50):
        works[-1].is_completed()
    assert queue.asked == {1}
    queue.open = True
    mc.wait_all(works, timeout=10)
    assert queue.asked == {*range(1, 21)}


@pytest.mark.parametrize("first, second", [(9.0, 0.3), (0.3, 9.0)])
def test_the_deadline_of_a_younger_call_holds_too(fresh, first, second):
    queue = queue_of(fresh)
    queue.open = False
    begin = time.monotonic()
    works = [fresh.allreduce(ELSEWHERE.full(5, 1), timeout=t) for t in (first, second)]
    for work in works:
        work.wait()
    while not any(work.is_completed() for work in works):
        assert time.monotonic() - begin < 5
    assert time.monotonic() - begin > 0.25 and ("abort",) in queue.log


@pytest.fixture
def ahead(fresh) -> mc.ProcessGroup:
    fresh._caller.once = fresh._caller.group_state.once = Once()
    fresh._core = None  # as such groups have none
    return fresh


def test_a_call_that_was_compared_once_does_not_wait_for_the_peers(ahead, world):
    x, y = ELSEWHERE.full(5, 1), ELSEWHERE.full(6, 0)
    ahead.allreduce(x).wait()
    if world.rank == 0:
        for _ in range(10):
            assert ahead.allreduce(x).wait()  # though nobody else is there yet
    meet(world)
    if world.rank != 0:
        for _ in range(10):
            ahead.allreduce(x).wait()
    ahead.barrier().wait()
    ahead.allreduce(y).synchronize()  # unknown so far: compared
    assert (x.values == float(world.size) ** 11).all()
    kinds = [entry["kind"] for entry in ahead._caller.recorder.report()["calls"]]
    assert kinds.count("allreduce") == 12


def test_which_calls_go_without_does_not_hang_on_when_peers_come(ahead, world):
    """Several alike under way before the first of them is compared, as in a first iteration."""
    for late in range(min(2, world.size)):
        size = 5 + 10 * late
        if world.rank == late:
            time.sleep(0.2)
        arrays = [ELSEWHERE.full(size, 1) for _ in range(3)]
        for work in [ahead.allreduce(x) for x in arrays]:
            work.synchronize()
        ahead.barrier().wait()
        assert all(ELSEWHERE.same(x, np.full(size, world.size, np.float32)) for x in arrays)


def test_a_refused_call_after_some_that_went_without_leaves_the_group_usable(ahead, world):
    x = ELSEWHERE.full(5, 1)
    for _ in range(3):
        ahead.allreduce(x).wait()
    if world.rank == 0:
        with pytest.raises(InvalidCallError):
            ahead.allreduce("nonsense")
    else:
        with pytest.raises(MpicollError) as caught:
            ahead.barrier().wait()
        assert not caught.value.breaks_group
    ahead.barrier().wait()


def test_calls_that_were_not_compared_are_counted_in_the_next_that_is(ahead, world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    queue = queue_of(ahead)
    x, y = ELSEWHERE.full(5, 1), ELSEWHERE.full(5, 1)
    ahead.allreduce(x).synchronize()
    ahead.allreduce(y, ReduceOp.PRODUCT).synchronize()
    first, second = (ReduceOp.SUM, ReduceOp.PRODUCT)[:: 1 if world.rank else -1]
    for op in (first, second):  # NCCL would give wrong data, and say nothing
        ahead.allreduce(x, op).wait()
    queue.open = False
    with pytest.raises(MpicollError, match="after 2 calls that were not compared, the last") as e:
        ahead.barrier().wait()
    assert e.value.breaks_group


def test_one_rank_that_went_without_and_one_that_did_not(ahead, world):
    """Where the others have nothing to say of the kind, they learn it from the first's words."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    queue_of(ahead).open = False
    ahead.allreduce(ELSEWHERE.full(5, 1)).wait()
    if world.rank == 0:
        ahead.allreduce(ELSEWHERE.full(5, 1)).wait()
    with pytest.raises(MpicollError) as caught:
        ahead.barrier().wait()
    assert caught.value.breaks_group


def test_a_mismatch_before_anything_went_without_leaves_the_group_usable(ahead, world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    with pytest.raises(MpicollError) as caught:
        ahead.allreduce(ELSEWHERE.full(5 + world.rank, 1)).wait()
    assert not caught.value.breaks_group
    ahead.allreduce(ELSEWHERE.full(5, 1)).synchronize()


def test_after_so_many_calls_all_meet_again(ahead, world, monkeypatch):
    monkeypatch.setattr(Once, "AGAIN", 10)
    x, number = ELSEWHERE.full(5, 0), ahead._caller.group_state.seq
    for _ in range(45):
        ahead.allreduce(x).wait()
    assert ahead._caller.group_state.seq - number == 5, "the first, and each eleventh"


def test_the_deadline_names_what_the_peers_say_where_nothing_was_compared(ahead, world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    queue = queue_of(ahead)
    x = ELSEWHERE.full(5, 1)
    ahead.allreduce(x).synchronize()
    queue.open = False
    if world.rank == 0:
        with pytest.raises(CollectiveTimeoutError, match=r"not compared.*rank 1 .*allgather") as e:
            ahead.allreduce(x, timeout=1).synchronize()
        assert e.value.breaks_group
    else:
        with pytest.raises(MpicollError):
            ahead.allgather_object(3)


def test_nobody_goes_ahead_of_the_peers_while_a_communicator_is_given_up(ahead):
    """NCCL then waits for the whole GPU, and the host behind it for peers that may wait for it."""
    comm = ahead._caller.transport._nccl
    x = ELSEWHERE.full(5, 1)
    ahead.allreduce(x).synchronize()
    comm.quiet = False
    work = ahead.allreduce(x)
    time.sleep(0.05)
    assert not work.is_completed() and queue_of(ahead).given == 1
    comm.quiet = True
    work.synchronize()
    comm.quiet = False
    y = ELSEWHERE.full(6, 1)
    ahead.allreduce(y).synchronize()  # all ranks are known to come, so this one needs no such care
    assert (y.values == ahead.size()).all()


@pytest.mark.parametrize("tuning", [replace(select.tuning, nccl_ahead=4)], ids=["4"])
def test_only_so_many_calls_are_ahead_of_the_gpu(ahead):
    """Else CUDA would block the host, where no deadline is kept."""
    queue = queue_of(ahead)
    queue.open = False
    x = ELSEWHERE.full(5, 0)
    works = [ahead.allreduce(x)]
    works[0].wait()
    for _ in range(3):
        works.append(ahead.allreduce(x))
        works[-1].wait()
    works.append(ahead.allreduce(ELSEWHERE.full(5, 0)))
    time.sleep(0.05)
    assert queue.given == 4 and not works[-1].is_completed()
    queue.open = True
    mc.wait_all(works, timeout=10)
    assert queue.given == 5


# ---- CUDA graphs ----


def test_a_captured_call_is_over_when_the_stream_has_waited_for_it(fresh):
    """Nobody tells when the GPU passes it, or how often."""
    queue = queue_of(fresh)
    x = ELSEWHERE.full(5, 1)
    fresh.allreduce(x).synchronize()
    queue.capturing.add(STREAM)
    queue.open = False
    del queue.log[:]
    queue.asked.clear()
    work = fresh.allreduce(x)
    with pytest.raises(InvalidCallError, match="captured in a CUDA graph"):
        work.synchronize()
    work.wait(timeout=5)
    assert [entry[0] for entry in queue.log][-1] == "hold"
    while not work.is_completed():
        pass
    assert work.is_success() and not queue.asked, "CUDA refuses to be asked for such a mark"
    queue.capturing.clear()
    queue.open = True
    fresh.allreduce(x).synchronize()


def test_what_was_not_made_before_cant_be_captured(fresh):
    """NCCL connects then, which no stream may capture."""
    queue = queue_of(fresh)
    x = ELSEWHERE.full(5, 1)
    queue.capturing.add(STREAM)
    with pytest.raises(UnsupportedError, match="make it outside of the graph first"):
        fresh.allreduce(x).wait()
    assert {"all_reduce", "queue_after"}.isdisjoint(names(queue)), "or the graph would be spoilt"
    queue.capturing.clear()
    fresh.allreduce(x).synchronize()


def test_what_the_host_takes_part_in_cant_be_captured(fresh):
    queue = queue_of(fresh)
    queue.capturing.add(STREAM)
    x = ELSEWHERE.full(5, 1)
    with pytest.raises(UnsupportedError, match="can't be captured in a CUDA graph"):
        fresh.allreduce(x, ReduceOp.MAX)
    with pytest.raises(UnsupportedError, match="can't be captured in a CUDA graph"):
        fresh.send(x, 0)
    queue.capturing.clear()
    fresh.allreduce(x).synchronize()


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


def test_a_broken_group_lets_go_of_the_peers(fresh, world):
    fresh.allreduce(ELSEWHERE.full(5, 1)).synchronize()
    meet(world)  # or who is slower would hear of the abort in its call
    fresh.abort()
    assert queue_of(fresh).log[-1] == ("abort",)


def split(
    fresh: mc.ProcessGroup, members: list[int]
) -> tuple[Communicator | None, mc.ProcessGroup]:
    """Split a group and, in the same way, its communicator of NCCL."""
    part = fresh.split_group(members)
    resources = select.Resources(
        fresh.comm, gpu=queue_of(fresh), nccl=fresh._caller.transport._nccl
    )
    made, steps = None, select.split_nccl(resources, part and part.comm)
    while True:
        try:
            with engine()._lock:  # or the group's thread would look at the queue in between
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
        assert made is None and queue.log[-1] == ("split", -1, 0)
        return
    key = members.index(fresh.rank())
    assert queue.log[-1] == ("split", members[0], key) and queue.passed == 1
    assert (made.comm.rank, made.comm.size) == (key, len(members)) == (part.rank(), part.size())
    part._caller.transport = NcclTransport(
        part._caller.transport, made.q, made, TURNS, select.tuning
    )
    x = ELSEWHERE.full(5, fresh.rank())
    part.allreduce(x).synchronize()
    assert (x.values == sum(members)).all()


def test_where_one_rank_cant_split_all_do_without(fresh, world):
    communicator = fresh._caller.transport._nccl
    # NCCL's own split waits for the rank that fails, or not; this doesn't.
    communicator.comm = MPI.COMM_SELF
    if world.rank == 0:
        communicator.error = RuntimeError("NCCL_ERROR_SYSTEM_ERROR")
    made, part = split(fresh, [*range(world.size)])
    assert made is None and part.size() == world.size


def test_a_good_end_destroys_the_communicator():
    pg = mc.new_group(timeout=20, progress="thread")
    queue = queue_of(pg)
    pg.allreduce(ELSEWHERE.full(5, 1)).wait()
    pg.shutdown()
    assert queue.log[-1] == ("close",) and not queue.pending
