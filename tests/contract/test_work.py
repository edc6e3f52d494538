"""Works: several in flight, waited for in any order and in every way; progress without waiting."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import io
import json
import os
import sys
import threading
import time
from datetime import timedelta

import numpy as np
import pytest

import mpicoll as mc
from mpicoll import ReduceOp
from mpicoll.engine.progress import engine
from mpicoll.errors import CollectiveMismatchError, InvalidCallError
from tests.contract.arrays import NUMPY, data, reduced
from tests.soak import soak

pytestmark = pytest.mark.mpi


def several(pg, count=20):
    """Start allreduces of unequal sizes; return Works, arrays and what is expected."""
    parts = [[data(r, 7 * i**2, seed=i) for r in range(pg.size())] for i in range(count)]
    arrays = [part[pg.rank()].copy() for part in parts]
    works = [pg.allreduce(x) for x in arrays]
    return works, arrays, [reduced("SUM", part) for part in parts]


def poll(work):
    while not work.is_completed():
        time.sleep(1e-5)


WAYS = {
    "wait in order": lambda works: [work.wait() for work in works],
    "wait backwards": lambda works: [work.wait() for work in reversed(works)],
    "wait for the last": lambda works: works[-1].wait(),
    "wait_all": mc.wait_all,
    "wait with a timeout": lambda works: [work.wait(timedelta(seconds=9)) for work in works],
    "poll": lambda works: [poll(work) for work in works],
    "synchronize": lambda works: [work.synchronize() for work in works],
    "get_future": lambda works: [work.get_future().wait() for work in works],
}


@pytest.mark.parametrize("way", WAYS)
def test_many_in_flight(pg, way):
    works, arrays, expected = several(pg)
    WAYS[way](works)
    assert all(map(NUMPY.same, arrays, expected))
    assert all(w.is_completed() and w.is_success() and w.exception() is None for w in works)
    assert works[0].wait() is True, "waiting again"


def test_three_unequal_works_with_one_rank_late(pg):
    """The first thing that the library had to do right."""
    n, me = pg.size(), pg.rank()
    if me == n - 1:
        time.sleep(0.3)
    parts = [[data(r, size) for r in range(n)] for size in (3, 70_001)]
    a, b, c = parts[0][me].copy(), parts[1][me].copy(), data(me, 5)
    works = [pg.allreduce(a), pg.allreduce(b, ReduceOp.MAX), pg.broadcast(c, n - 1)]
    for work in reversed(works):
        work.wait()
    assert NUMPY.same(a, reduced("SUM", parts[0]))
    assert NUMPY.same(b, reduced("MAX", parts[1]))
    assert NUMPY.same(c, data(n - 1, 5))


def test_groups_progress_independently(pg, fresh):
    """The ranks wait for the Works of two groups in opposite orders."""
    first, arrays, expected = several(pg)
    second, more, expected_too = several(fresh)
    order = [first, second] if pg.rank() % 2 else [second, first]
    for works in order:
        works[-1].wait()
    mc.wait_all(first + second)
    assert all(map(NUMPY.same, arrays + more, expected + expected_too))


def test_result_holds_the_arrays_that_were_given(pg, kind):
    x = kind.full(5, pg.rank())
    work = pg.allreduce(x)
    work.wait()
    assert work.result()[0] is x
    outputs = [kind.full(5, 9) for _ in range(pg.size())]
    work = pg.allgather(outputs, x)
    work.wait()
    assert all(a is b for a, b in zip(work.result(), outputs, strict=True))


def test_a_work_keeps_its_arrays_alive(pg):
    works = [pg.allreduce(np.full(50_000, pg.rank() + 1.0)) for _ in range(5)]
    gc.collect()
    junk = [np.full(50_000, -1.0) for _ in range(20)]
    for work in works:
        work.wait()
        (x,) = work.result()
        assert (x == pg.size() * (pg.size() + 1) / 2).all()
    assert all((x == -1).all() for x in junk)


def test_dropped_works_go_on(pg):
    _, arrays, expected = several(pg)
    gc.collect()
    pg.barrier().wait()
    assert all(map(NUMPY.same, arrays, expected))


def test_await(pg):
    async def one(x, parts):
        assert await pg.allreduce(x) is True
        assert NUMPY.same(x, reduced("SUM", parts))

    async def all_of_them():
        tasks = []
        for i in range(10):
            parts = [data(r, 100 * i, seed=i) for r in range(pg.size())]
            tasks.append(one(parts[pg.rank()].copy(), parts))
        await asyncio.gather(*tasks)

    asyncio.run(all_of_them())


def test_a_future_completes_without_waiting_and_calls_back(pg):
    called = threading.Event()
    x = data(pg.rank(), 1000)
    future = pg.allreduce(x).get_future()
    then = future.then(lambda f: float(f.value()[0][0]))
    future.add_done_callback(lambda _: called.set())
    assert called.wait(10), "nobody progressed the call"
    expected = reduced("SUM", [data(r, 1000) for r in range(pg.size())])
    assert then.wait() == expected[0] and NUMPY.same(x, expected)


def test_a_callback_may_use_the_group(pg):
    """Callbacks run unlocked: calling the library there does not deadlock."""
    results = []
    future = pg.broadcast(data(pg.rank(), 5), 0).get_future()
    future.add_done_callback(lambda _: results.append(pg.dump()))
    pg.barrier().wait()
    future.wait()
    deadline = time.monotonic() + 5
    while not results and time.monotonic() < deadline:
        time.sleep(1e-3)
    assert results


def test_a_thread_waits_for_what_another_launched(pg):
    for turn in range(soak(500, 20)):
        works, arrays, expected = several(pg, 6)
        mine, theirs = works[turn % 2 :: 2], works[1 - turn % 2 :: 2]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(mc.wait_all, part) for part in (theirs, works)]
            mc.wait_all(mine)
            assert all(future.result() is True for future in waiting)
        assert all(map(NUMPY.same, arrays, expected))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", ["wait", "is_completed", "synchronize", "get_future"])
def test_another_thread_waits_between_the_look_up_of_a_method_and_its_call(pg, way):
    if pg.rank() == 0:
        time.sleep(0.01)
    work = pg.allreduce(x := np.ones(300_000))
    ask = getattr(work, way)
    waiting = threading.Thread(target=work.wait)
    waiting.start()
    waiting.join()
    assert ask() is not False
    assert (x == pg.size()).all()


def test_a_thread_launches_what_another_waits_for(pg):
    """One thread at a time makes the group's calls; it need not be the first, nor the waiter."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        works, arrays, expected = pool.submit(several, pg).result()
    mc.wait_all(works)
    assert all(map(NUMPY.same, arrays, expected))


def test_a_callback_may_call_and_wait(pg):
    """It runs in whichever thread made the progress, and all ranks' callbacks call the same."""
    n, me = pg.size(), pg.rank()
    for turn in range(soak(300, 10)):
        first, second = ([data(r, 300 * turn, seed=s) for r in range(n)] for s in (0, 1))
        x, y = first[me].copy(), second[me].copy()
        done = concurrent.futures.Future()

        def go_on(_, y=y, done=done):
            try:
                done.set_result(pg.allreduce(y).wait())
            except BaseException as error:
                done.set_exception(error)

        pg.allreduce(x).get_future().add_done_callback(go_on)
        assert done.result(10) is True
        assert NUMPY.same(x, reduced("SUM", first)) and NUMPY.same(y, reduced("SUM", second))


def test_progress_from_a_thread(world):
    pg = mc.new_group(timeout=20, progress="thread")
    x = data(pg.rank(), 70_001)
    work = pg.allreduce(x)
    deadline = time.monotonic() + 10
    while not work.done and time.monotonic() < deadline:  # reading an attribute moves nothing
        time.sleep(1e-3)
    assert work.done, "the thread did not progress the call"
    assert NUMPY.same(x, reduced("SUM", [data(r, 70_001) for r in range(pg.size())]))
    works, arrays, expected = several(pg)
    mc.wait_all(works)
    assert all(map(NUMPY.same, arrays, expected))
    pg.shutdown()


@pytest.mark.mpi(min_size=2)
def test_an_error_that_nobody_fetched_is_raised_by_the_next_call(fresh):
    def wrong():
        return fresh.broadcast(data(0, 5), 0 if fresh.rank() == 0 else 1)

    poll(wrong())
    with pytest.raises(CollectiveMismatchError):
        fresh.barrier().wait()
    work = wrong()
    poll(work)
    assert isinstance(work.exception(), CollectiveMismatchError) and not work.is_success()
    fresh.barrier().wait()


@pytest.mark.mpi(min_size=2)
def test_wait_all_waits_for_all_then_raises_the_first_error(pg):
    n, me = pg.size(), pg.rank()
    x = data(me, 5)
    works = [pg.broadcast(data(0, 5), 0 if me == 0 else 1), pg.allreduce(x)]
    with pytest.raises(CollectiveMismatchError):
        mc.wait_all(works)
    assert NUMPY.same(x, reduced("SUM", [data(r, 5) for r in range(n)]))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("fetch", ["future", "await"])
def test_errors_come_through_futures(pg, fetch):
    work = pg.broadcast(data(0, 5), 0 if pg.rank() == 0 else 1)

    async def awaited():
        await work

    with pytest.raises(CollectiveMismatchError):
        work.get_future().wait() if fetch == "future" else asyncio.run(awaited())
    pg.barrier().wait()


def test_what_only_a_finished_work_can_tell(pg):
    x = data(0, 5)
    receiving = pg.recv(x, pg.rank())
    for ask in (receiving.result, receiving.source_rank):
        with pytest.raises(InvalidCallError, match="under way"):
            ask()
    sending = pg.send(data(1, 5), pg.rank())
    mc.wait_all([receiving, sending])
    with pytest.raises(InvalidCallError, match="recv"):
        sending.source_rank()


def test_dump_is_the_flight_recorder(pg):
    me = pg.rank()
    pg.allreduce(np.zeros((3, 41), np.int16), ReduceOp.BXOR).wait()
    pg.broadcast(np.zeros(7), pg.size() - 1).wait()
    mc.wait_all([pg.recv(np.zeros(2), me, tag=5), pg.send(np.zeros(2), me, tag=5)])
    told = json.loads(pg.dump())
    assert (told["group"], told["rank"], told["size"]) == (pg.group_name, me, pg.size())
    assert told["ranks"] == pg.ranks and told["world_rank"] == pg.ranks[me]
    assert told["host"] and told["pid"] == os.getpid()
    *_, first, second, receives, sends = told["calls"]
    said = [first[key] for key in ("kind", "dtype", "count", "shape", "op", "root")]
    assert said == ["allreduce", "int16", 123, [3, 41], "BXOR", -1]
    assert (second["kind"], second["root"]) == ("broadcast", pg.size() - 1)
    assert second["seq"] == first["seq"] + 1
    now = time.time()
    assert now - 60 < first["called"] <= first["ended"] <= now + 1
    assert {call["state"] for call in told["calls"][-4:]} == {"finished"}
    assert [(call["kind"], call["peer"], call["tag"]) for call in (receives, sends)] == [
        ("recv", me, 5),
        ("send", me, 5),
    ]


def last_place(pg):
    call = json.loads(pg.dump())["calls"][-1]
    return call["file"], call["line"]


def test_dump_has_the_line_that_called(pg):
    """However many of the library's own frames lie between."""

    def line():
        return sys._getframe(1).f_lineno

    n = pg.size()
    at = []
    pg.barrier().wait(); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    pg.allgather_object(1); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    pg.monitored_barrier(); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    half = pg.split(0); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    node = pg.local_group(); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    lists = [np.zeros(1) for _ in range(n)], [np.zeros(1) for _ in range(n)]
    pg.alltoall(*lists).wait(); at.append((line(), last_place(pg)))  # fmt: skip  # noqa: E702
    with half:
        pass
    assert [place for _, place in at] == [(__file__, number) for number, _ in at]
    assert last_place(half) == (__file__, at[-1][0] + 1), "leaving the with-block"
    node.shutdown()


def test_dump_has_a_refused_call_with_its_reason(pg):
    with pytest.raises(InvalidCallError):
        pg.broadcast(np.zeros(7), pg.size())
    pg.barrier().wait()
    *_, refused, _ = json.loads(pg.dump())["calls"]
    assert (refused["kind"], refused["state"]) == ("broadcast", "failed")
    assert refused["error"].startswith("InvalidCallError: root must be")
    assert refused["file"] == __file__


@pytest.mark.parametrize("timeout", [5, 5.0, timedelta(seconds=5), np.float64(5)])
def test_forms_of_a_timeout(pg, timeout):
    x = data(pg.rank(), 5)
    assert pg.allreduce(x, timeout=timeout).wait()
    assert pg.barrier(timeout).wait(timeout)


def test_a_future_that_was_cancelled_harms_nobody(pg):
    me = pg.rank()
    x = np.zeros(3)
    work = pg.recv(x, me, tag=3)
    future = work.get_future()
    chained = future.then(lambda f: pytest.fail("it was cancelled"))
    assert future.cancel()
    pg.send(np.ones(3), me, tag=3).wait()
    work.wait()
    assert (x == 1).all() and future.cancelled()
    assert chained.done() or not chained.running()
    pg.barrier().wait()


def test_a_callback_that_raises_harms_nobody(pg, monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)

    def fail() -> None:
        raise ValueError("the callback's own")

    work = pg.recv(np.zeros(3), pg.rank(), tag=3)
    engine().when_done(work, fail)
    pg.send(np.ones(3), pg.rank(), tag=3).wait()
    work.wait()
    limit = time.monotonic() + 10
    while "the callback's own" not in said.getvalue():  # it may be another thread that calls it
        assert time.monotonic() < limit
    pg.barrier().wait()
