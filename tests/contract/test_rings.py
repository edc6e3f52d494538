"""Messages through rings in the node's shared memory: both ways of them, and what lies between."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.engine.progress import engine
from mpicoll.errors import (
    CallInterruptedError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    InvalidCallError,
)
from mpicoll.transports.shm import cma, rings
from tests.contract.arrays import KINDS, data
from tests.contract.conftest import GROUP_TIMEOUT
from tests.soak import soak

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(MPI.COMM_WORLD.size == 1, reason="a message to oneself goes by MPI"),
]

RING, SLOTS = rings.sizes(MPI.COMM_WORLD.size)
PACKED = RING // 4 // 4  # float32: the most that goes through a ring
LARGE = 100_000  # elements that never do


@pytest.fixture
def direct(fresh):
    """A group whose messages go through rings."""
    if fresh._rings is None:
        pytest.skip("messages go by MPI here")
    return fresh


@pytest.fixture(params=["direct", "general", "some direct", "without reading"])
def any_way(direct, request, monkeypatch, world):
    """The same, where some or all ranks leave messages to the general way, or to MPI if large."""
    if request.param == "without reading":
        with monkeypatch.context() as patched:
            if world.rank == world.size - 1:
                patched.setattr(cma, "can_read", lambda *_: False)
            pg = mc.new_group(timeout=GROUP_TIMEOUT)
        request.addfinalizer(pg.shutdown)
        return pg
    if request.param == "general" or (request.param == "some direct" and direct.rank() % 2):
        direct._rings = None
    return direct


def neighbours(pg):
    return (pg.rank() - 1) % pg.size(), (pg.rank() + 1) % pg.size()


def by_and_by(works):
    """Wait for Works in the opposite order."""
    mc.wait_all(reversed(works))


# ---- rings that are full ----


@pytest.mark.parametrize("first", ["receives", "sends"])
@pytest.mark.parametrize("size", [1, PACKED])
def test_many_more_messages_than_there_is_room_for(any_way, size, first):
    """Both directions at once, before any receive."""
    left, right = neighbours(any_way)
    many = 3 * RING // max(4 * size, 64) + 10
    sent = data(any_way.rank(), (many, size))
    came = np.zeros_like(sent)
    sends = [any_way.send(row, right) for row in sent]
    if first == "sends":
        mc.wait_all(sends)  # small messages need no receiver, but one that looks
    mc.wait_all([any_way.recv(row, left) for row in came])
    mc.wait_all(sends)
    assert (came == data(left, (many, size))).all()


def test_sends_that_wait_for_room_go_on_while_the_receiver_is_in_a_collective(any_way):
    left, right = neighbours(any_way)
    many = 3 * RING // 64
    if any_way.rank() == 0:
        mc.wait_all([any_way.send(np.full(2, i), right) for i in range(many)])
    any_way.barrier().wait()
    if any_way.rank() == 1:
        x = np.zeros(2, int)
        for i in range(many):
            any_way.recv(x, left).wait()
            assert (x == i).all()


def test_more_large_messages_than_there_are_slots(any_way):
    left, right = neighbours(any_way)
    sent = data(any_way.rank(), (3 * SLOTS, PACKED + 1))
    came = np.zeros_like(sent)
    sends = [any_way.send(row, right, tag=i % 3) for i, row in enumerate(sent)]
    works = [any_way.recv(row, left, tag=i % 3) for i, row in enumerate(came)]
    by_and_by(works)
    by_and_by(sends)
    assert (came == data(left, sent.shape)).all()


# ---- order, tags, sources ----


def test_sizes_around_what_is_packed_keep_their_order(any_way):
    left, right = neighbours(any_way)
    edges = [0, 1, 5, 6, 7, 21, 22, 23, PACKED - 1, PACKED, PACKED + 1, 20_000]
    sizes = [edges[i] for i in np.random.default_rng(7).integers(len(edges), size=400)]
    sends = [any_way.send(data(any_way.rank(), s, seed=i), right) for i, s in enumerate(sizes)]
    for i, size in enumerate(sizes):
        x = data(9, size)
        any_way.recv(x, left).wait()
        assert np.array_equal(x, data(left, size, seed=i)), i
    mc.wait_all(sends)


def test_any_source_takes_each_senders_messages_in_order(any_way):
    me, n, many = any_way.rank(), any_way.size(), 200
    if me > 0:
        mc.wait_all([any_way.send(np.array([me, i]), 0, tag=5) for i in range(many)])
    else:
        seen = {rank: [] for rank in range(1, n)}
        for _ in range(many * (n - 1)):
            x = np.zeros(2, int)
            work = any_way.recv(x, tag=5)
            work.wait()
            assert work.source_rank() == x[0]
            seen[x[0]].append(x[1])
        assert all(numbers == list(range(many)) for numbers in seen.values())
    any_way.barrier().wait()


def test_receives_of_one_tag_are_matched_in_their_order(any_way):
    """One from the rank, one from any, and so on: each takes the next message."""
    left, right = neighbours(any_way)
    came = np.zeros(40)
    works = [any_way.recv(came[i : i + 1], left if i % 2 else mc.ANY_SOURCE) for i in range(40)]
    any_way.barrier().wait()
    sends = [any_way.send(np.array([float(i)]), right) for i in range(40)]
    by_and_by(works)
    mc.wait_all(sends)
    assert (came == range(40)).all()


def play(pg, world, seed):
    """Exchange random messages in a random order, with all that can lie between."""
    me, n = pg.rank(), pg.size()
    plan, mine = np.random.default_rng(seed), np.random.default_rng([seed, me])
    messages = []  # from whom, to whom, tag, size: the same on all ranks
    for _ in range(60):
        size = int(plan.choice([0, 1, 7, 30, PACKED, PACKED + 1, 5000, 40_000]))
        messages.append((*map(int, plan.integers(n, size=2)), int(plan.integers(3)), size))
    between = int(plan.integers(60))
    works, checks = [], []
    order = {}
    for i, (source, target, tag, size) in enumerate(messages):
        if i == between:
            x = np.ones(3)
            pg.allreduce(x).wait()
            assert (x == n).all()
        if me == source:
            works.append(pg.send(data(me, size, seed=i), target, tag=tag))
        if me == target:
            order.setdefault((source, tag), []).append((i, size))
        if mine.random() < 0.3 and order:  # receive one, of those whose turn it is
            receive(pg, order, mine, works, checks)
        if mine.random() < 0.1 and works:
            works[int(mine.integers(len(works)))].is_completed()
        if mine.random() < 0.1 and len(checks) > 1:
            checks[int(mine.integers(len(checks)))][0].is_success()
        if mine.random() < 0.05:
            time.sleep(mine.random() * 2e-4)
        if mine.random() < 0.05:
            pg.probe(tag=int(mine.integers(3)))
    while order:
        receive(pg, order, mine, works, checks)
    for i in mine.permutation(len(works)):
        works[i].wait()
    for work, x, source, i in checks:
        assert work.is_success() and work.source_rank() == source
        assert np.array_equal(x, data(source, x.size, seed=i)), (seed, i)
    assert world.allreduce(1) == n
    assert not engine().busy


def receive(pg, order, mine, works, checks):
    source, tag = list(order)[int(mine.integers(len(order)))]
    i, size = order[source, tag].pop(0)
    if not order[source, tag]:
        del order[source, tag]
    x = data(9, size)
    work = pg.recv(x, source, tag=tag)
    works.append(work)
    checks.append((work, x, source, i))
    if mine.random() < 0.2 and i == -1:
        work.wait()


@pytest.mark.parametrize("seed", range(soak(2000, 40)))
def test_random_messages(any_way, world, seed):
    play(any_way, world, seed)


# ---- what a Work answers ----


@pytest.mark.parametrize("array", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [3, LARGE])
def test_works_answer_as_any_other(direct, array, size):
    array.require()
    left, right = neighbours(direct)
    x, y = array.array(data(direct.rank(), size)), array.full(size, 9)
    receiving = direct.recv(y, left, tag=4)
    with pytest.raises(InvalidCallError, match="under way"):
        receiving.result()
    with pytest.raises(InvalidCallError, match="under way"):
        receiving.source_rank()
    assert f"recv(float32[{size}], src={left}, tag=4) #0, under way" in repr(receiving)
    direct.barrier().wait()
    sending = direct.send(x, right, tag=4)
    assert receiving.wait() and receiving.wait(5) and sending.wait(timeout=5) and sending.wait()
    for work in (receiving, sending):
        assert isinstance(work, mc.Work) and work.is_completed() and work.is_success()
        assert work.exception() is None and ", done>" in repr(work)
        work.synchronize()
    assert receiving.result()[0] is y and sending.result()[0] is x
    assert receiving.get_future().result(5)[0] is y
    assert receiving.source_rank() == left
    with pytest.raises(InvalidCallError, match="source_rank"):
        sending.source_rank()
    with pytest.raises(InvalidCallError, match="timeout"):
        receiving.wait(timeout=-1)
    assert array.same(y, data(left, size))


def test_a_future_of_a_receive_that_waits(direct):
    left, right = neighbours(direct)
    y = np.zeros(3)
    future = direct.recv(y, left).get_future()
    direct.barrier().wait()
    direct.send(np.full(3, 7.0), right).wait()
    assert future.result(10)[0] is y and (y == 7).all()


def test_polling_ends(direct):
    left, right = neighbours(direct)
    for size in (3, LARGE):
        y = np.zeros(size)
        receiving = direct.recv(y, left)
        assert receiving.is_completed() in (True, False)
        sending = direct.send(np.ones(size), right)
        while not (receiving.is_completed() and sending.is_completed()):
            pass
        assert receiving.is_success() and sending.is_success() and (y == 1).all()


def test_the_recorder_shows_messages_where_they_were_called(direct):
    left, right = neighbours(direct)
    receiving = direct.recv(np.zeros((2, 3)), left, tag=8)
    entry = json.loads(direct.dump())["calls"][-1]
    assert entry["state"] in ("called", "finished") and entry["kind"] == "recv"
    direct.send(np.ones((2, 3)), right, tag=8).wait()
    receiving.wait()
    calls = [call for call in json.loads(direct.dump())["calls"] if call["tag"] == 8]
    assert [call["kind"] for call in calls] == ["recv", "send"]
    for call, peer in zip(calls, (left, right), strict=True):
        assert (call["seq"], call["peer"], call["root"], call["count"]) == (0, peer, -1, 6)
        assert (call["dtype"], call["shape"], call["state"]) == ("float64", [2, 3], "finished")
        assert call["called"] <= call["ended"] and call["error"] is None
        assert os.path.basename(call["file"]) == "test_rings.py"


def test_works_that_are_dropped_go_on(any_way):
    left, right = neighbours(any_way)
    for size in (3, LARGE):
        y = np.zeros(size)
        any_way.recv(y, left)
        any_way.send(np.full(size, 5.0), right)
        gc.collect(0)
        any_way.barrier().wait()
        end = time.monotonic() + 10
        while engine().busy and time.monotonic() < end:
            engine().test()
        assert (y == 5).all()


# ---- memory that is in use ----


def test_memory_of_a_message_under_way_is_refused(any_way):
    left, right = neighbours(any_way)
    x, big = np.zeros(8), np.ones(LARGE)
    receiving = any_way.recv(x[:4], left)
    with pytest.raises(InvalidCallError, match="overlaps one that an unfinished Work"):
        any_way.recv(x[3:], left)
    with pytest.raises(InvalidCallError, match="overlaps one that an unfinished Work"):
        any_way.send(x[2:3], right)
    with pytest.raises(InvalidCallError, match="overlaps one that an unfinished Work"):
        any_way.scan(x)
    any_way.recv(x[4:], mc.PROC_NULL).wait()
    any_way.barrier().wait()  # which heard of the refused call
    sending = any_way.send(big, right)
    again = any_way.send(big[5:], right)  # both only read
    with pytest.raises(InvalidCallError, match="overlaps one that an unfinished Work"):
        any_way.recv(big[9:], left)
    any_way.send(np.ones(4), right, tag=1).wait()
    mc.wait_all([any_way.recv(np.zeros(4), left, tag=1)])
    y, z = np.zeros(LARGE), np.zeros(LARGE - 5)
    with pytest.raises(CollectiveMismatchError, match=rf"sent float64\[{LARGE}\]"):
        receiving.wait()
    mc.wait_all([any_way.recv(z, left), sending, again])
    assert (z == 1).all() and (x == 0).all() and (y == 0).all()


def test_memory_of_a_message_that_is_over_is_free(direct):
    """Nothing asked the first Works: their ends are seen all the same."""
    left, right = neighbours(direct)
    x, y = np.ones(3), np.zeros(3)
    for i in range(300):
        works = [direct.recv(y, left), direct.send(x, right)]
        works[i % 2].wait()
        works[1 - i % 2].wait()
        y[:] = 0
    assert not engine().busy


# ---- what goes wrong ----


@pytest.mark.parametrize("size", [5, LARGE])
def test_a_message_of_another_size_is_an_error_whenever_it_is_seen(direct, size):
    left, right = neighbours(direct)
    for late in (False, True):
        y = np.full(4, 9.0)
        if late:
            sending = direct.send(np.ones(size), right)
            direct.barrier().wait()
            receiving = direct.recv(y, left)
        else:
            receiving = direct.recv(y, left)
            sending = direct.send(np.ones(size), right)
        text = rf"rank {left} sent float64\[{size}\], but the array is float64\[4\]"
        with pytest.raises(CollectiveMismatchError, match=text):
            receiving.wait()
        sending.wait()
        assert (y == 9).all() and isinstance(receiving.exception(), CollectiveMismatchError)
        direct.barrier().wait()


def test_an_error_that_nobody_asks_for_is_raised_by_the_next_call(direct):
    left, right = neighbours(direct)
    direct.send(np.zeros(3), right).wait()
    MPI.COMM_WORLD.Barrier()
    direct.recv(np.zeros(2), left)
    with pytest.raises(CollectiveMismatchError, match="but the array is"):
        for _ in range(3):
            direct.recv(np.zeros(1), mc.PROC_NULL).wait()
    MPI.COMM_WORLD.Barrier()
    direct.barrier().wait()


def test_an_expired_receive_leaves_the_message_to_the_next(any_way):
    left, right = neighbours(any_way)
    y = np.zeros(3)
    for receiving in (any_way.recv(y, left, timeout=0.05), any_way.recv(y[:0], left, timeout=0.05)):
        with pytest.raises(CollectiveTimeoutError, match="no matching message came"):
            receiving.wait()
    with pytest.raises(CollectiveTimeoutError, match="no matching message came"):
        any_way.recv(y, left).wait(timeout=0.05)
    any_way.barrier().wait()
    any_way.send(np.full(3, 4.0), right).wait()
    any_way.recv(y, left).wait()
    assert (y == 4).all()


def test_an_interrupted_wait_leaves_the_message_to_the_same_receive(any_way):
    left, right = neighbours(any_way)
    y = np.zeros(3)

    def strike(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(soak(300, 10)):
            receiving = any_way.recv(y, left)
            with pytest.raises((KeyboardInterrupt, CallInterruptedError)):
                signal.setitimer(signal.ITIMER_REAL, 2e-3)
                while True:
                    receiving.wait()
            # If it struck before wait() had begun, the receive is still there.
            with pytest.raises((CallInterruptedError, CollectiveTimeoutError)):
                receiving.wait(timeout=1e-3)
            MPI.COMM_WORLD.Barrier()
            receiving = any_way.recv(y, left)
            any_way.send(np.full(3, 4.0), right).wait()
            receiving.wait()
            assert (y == 4).all()
            y[:] = 0
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_threads_have_messages_of_their_own(direct):
    left, right = neighbours(direct)
    wrong = []

    def exchange(tag):
        x, y = np.zeros(3), np.zeros(3)
        for i in range(soak(20_000, 300)):
            size = 1 + i % 3
            x[:size] = i
            works = [direct.recv(y[:size], left, tag=tag), direct.send(x[:size], right, tag=tag)]
            mc.wait_all(works)
            if not (y[:size] == i).all():
                wrong.append((tag, i))

    threads = [threading.Thread(target=exchange, args=(tag,)) for tag in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- who has rings ----


def test_ranks_have_rings_all_or_none(monkeypatch, world):
    """Where one of them has no compiled core, messages go by MPI."""
    with monkeypatch.context() as patched:
        if world.rank == world.size - 1:
            patched.setenv("MPICOLL_NATIVE", "0")
        pg = mc.new_group(timeout=GROUP_TIMEOUT)
    assert pg._rings is None
    left, right = neighbours(pg)
    x = np.zeros(LARGE)
    mc.wait_all([pg.recv(x, left), pg.send(np.ones(LARGE), right)])
    assert (x == 1).all()
    pg.shutdown()


def test_a_group_that_is_closed_has_no_rings(direct):
    left, right = neighbours(direct)
    x = np.zeros(3)
    works = [direct.recv(x, left), direct.send(np.ones(3), right)]
    mc.wait_all(works)
    direct.shutdown()
    for call in (lambda: direct.send(x, right), lambda: direct.recv(x, left)):
        with pytest.raises(mc.GroupClosedError):
            call()
    assert works[0].wait() and works[0].source_rank() == left


def test_what_is_under_way_when_a_group_is_aborted_is_over(world):
    pg = mc.new_group(timeout=GROUP_TIMEOUT)
    left, right = neighbours(pg)
    works = [pg.recv(np.zeros(3), left), pg.send(np.ones(LARGE), right, tag=1)]
    pg.abort()
    for work in works:
        with pytest.raises(mc.GroupBrokenError, match="given up, because: rank . aborted"):
            work.wait()
    world.Barrier()
