"""Ranks in threads: `mpicoll.testing.run`, its clock, and what it says of failures."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.cli.trials import TRIALS
from mpicoll.engine.work import Unattended
from mpicoll.runtime.library import MPI
from mpicoll.runtime.process import monotonic, process
from mpicoll.testing import advance, run


@pytest.mark.parametrize("backend", ["auto", "mpi"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_collective(ranks, backend):
    def program():
        with mc.new_group(backend) as pg:
            for count in (0, 5, 200_000):
                for name, make in TRIALS.items():
                    trial = make(pg, count)
                    trial.call()
                    assert trial.agrees(), (name, count)
            return pg.rank(), pg.size()

    assert run(ranks, program) == [(rank, ranks) for rank in range(ranks)]


def test_every_collective_over_nodes(monkeypatch):
    monkeypatch.setenv("MPICOLL_NODES", "2")

    def program():
        pg = mc.new_group()
        for name, make in TRIALS.items():
            trial = make(pg, 30_000)
            trial.call()
            assert trial.agrees(), name
        return str(pg)

    assert all("hierarchical" in said for said in run(4, program))


def test_arguments_are_handed_on_and_results_come_by_rank():
    def program(factor, offset):
        return mc.new_group().rank() * factor + offset

    assert run(3, program, 10, 1) == [1, 11, 21]


def test_a_mismatch_is_refused_and_the_group_stays_usable():
    def program():
        pg = mc.new_group()
        with pytest.raises(mc.CollectiveMismatchError, match=r"rank 0 .*\[3\].* rank 1 .*\[4\]"):
            pg.allreduce(np.zeros(3 + pg.rank())).wait()
        x = np.ones(2)
        pg.allreduce(x).wait()
        return x[0]

    assert run(2, program) == [2, 2]


def test_a_deadline_passes_when_the_clock_is_moved():
    def program():
        pg = mc.new_group()
        if pg.rank() == 2:
            advance(10)  # not enough
            advance(3000)
            return ""
        with pytest.raises(mc.CollectiveTimeoutError) as caught:
            pg.allreduce(np.zeros(3), timeout=3000).wait()
        assert caught.value.missing == (2,)
        return str(caught.value)

    start = time.monotonic()
    said = run(3, program)
    assert "ranks [2] have not arrived" in said[0] and "ranks [2]" in said[1]
    assert time.monotonic() - start < 30


def test_the_first_error_is_raised_with_what_became_of_the_others():
    def program():
        pg = mc.new_group()
        if pg.rank() == 1:
            raise KeyError("mine")
        pg.barrier().wait()

    with pytest.raises(KeyError, match="mine") as caught:
        run(3, program)
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert note.splitlines() == [
            "rank 0 was told of it",
            "raised by rank 1",
            "rank 2 was told of it",
        ]


def test_peers_hear_the_error_itself():
    heard = []

    def program():
        pg = mc.new_group()
        if pg.rank() == 0:
            raise ValueError("of rank 0")
        try:
            pg.barrier().wait()
        except mc.RemoteRankError as error:
            heard.append(str(error))
            raise

    with pytest.raises(ValueError):
        run(3, program)
    assert len(heard) == 2 and all("ValueError: of rank 0" in text for text in heard)


def test_an_exit_code_is_a_failure_and_a_good_one_is_not():
    def program(code):
        pg = mc.new_group()
        if pg.rank() == 0:
            sys.exit(code)
        pg.rank()

    run(2, program, 0)
    with pytest.raises(SystemExit):
        run(2, program, 3)


@pytest.mark.parametrize("ranks", [(1,), (0, 1, 2)])
def test_a_skip_is_one_if_all_ranks_make_it(ranks):
    def program():
        if mc.new_group().rank() in ranks:
            pytest.skip("not today")

    kind = pytest.skip.Exception if len(ranks) == 3 else AssertionError
    with pytest.raises(kind, match="not today"):
        run(3, program)


def test_ranks_that_do_not_end_are_named_with_their_stacks():
    stop = threading.Event()

    def program():
        pg = mc.new_group()
        if pg.rank() == 1:
            stop.wait(20)
        pg.barrier().wait()

    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]") as caught:
        run(2, program, timeout=0.5)
    said = str(caught.value)
    assert "stop.wait(20)" in said and "pg.barrier().wait()" in said
    assert "progress.py" not in said  # nothing of the library's own
    waits = r"It waits in barrier\(\) \(call #1\) of group 'world' \(.*test_threads.py:\d+\): "
    assert re.search(waits + r"ranks \[1\] have not arrived; rank 1 is in no call", said), said
    stop.set()


def test_of_ranks_that_do_not_end_the_text_says_for_whom_they_wait():
    stop = threading.Event()

    def program(both):
        pg = mc.new_group()
        if pg.rank() == 0:
            pg.recv(np.empty(3), 1, tag=7).wait()
        elif both:
            pg.split(0).allreduce(np.ones(3)).wait()
        else:
            stop.wait(20)

    for both, where in ((True, r"in call #1, split\("), (False, "in no call of this group")):
        with pytest.raises(TimeoutError) as caught:
            run(2, program, both, timeout=0.3)
        text = rf"recv\(.*: no matching message has come; rank 1 is {where}"
        assert re.search(text, str(caught.value)), caught.value
        assert not both or "ranks [0] have not arrived; rank 0 is in recv(" in str(caught.value)
    stop.set()
    with pytest.raises(TimeoutError, match="rank 0 has ended, or not begun to make this group"):
        run(2, lambda: MPI.COMM_WORLD.Get_rank() == 0 or mc.new_group(), timeout=0.3)
    assert run(2, lambda: mc.new_group().size()) == [2, 2]  # the next world is a new one


def test_groups_split_merge_and_shrink(tmp_path):
    store = mc.FileStore(str(tmp_path / "store"))

    def program():
        pg = mc.new_group()
        half = pg.split(pg.rank() % 2)
        x = np.ones(1)
        half.allreduce(x).wait()
        everyone = half.merge_remote_group(store, 4, timeout=20)
        everyone.allreduce(x).wait()
        if pg.rank() == 3:
            return x[0], None
        return x[0], pg.shrink_group([3]).size()

    assert run(4, program) == [(8, 3), (8, 3), (8, 3), (8, None)]


def test_a_thread_of_a_rank_belongs_to_it():
    def program():
        pg, got = mc.new_group(), []

        def work():
            x = np.ones(1)
            pg.allreduce(x).wait()
            got.append(x[0])

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        future = pg.allreduce(np.ones(1)).get_future()
        assert future.result(timeout=10)
        return got

    assert run(3, program) == [[3], [3], [3]]


def test_threads_and_files_are_given_back():
    def program():
        mc.new_group().barrier().wait()

    run(3, program)
    before = threading.active_count()
    for _ in range(5):
        run(3, program)
    assert threading.active_count() == before


def test_what_threads_cannot_do_is_refused():
    def program():
        mc.new_group().spawn([sys.executable, "-c", ""], 1)

    with pytest.raises(mc.UnsupportedError, match="mpiexec"):
        run(2, program)


@pytest.mark.parametrize("ranks", [0, -1, 1.5, "2", True])
def test_wrong_numbers_of_ranks_are_refused(ranks):
    with pytest.raises(mc.InvalidCallError, match="ranks must be an integer above 0"):
        run(ranks, lambda: None)


def test_the_clock_is_that_of_ranks_in_threads():
    with pytest.raises(mc.InvalidCallError, match="advance"):
        advance(1)
    with pytest.raises(mc.InvalidCallError, match="below 0"):
        run(1, advance, -1)


def test_no_mpi_library_is_needed():
    program = (
        "import sys; sys.modules['mpi4py'] = None\n"
        "import mpicoll as mc\n"
        "from mpicoll.testing import run\n"
        "print(run(2, lambda: mc.new_group().allgather_object(5)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "[[5, 5], [5, 5]]", done.stderr


def test_what_one_world_leaves_to_the_collector_is_nothing_to_the_next():
    def waits():
        if threading.current_thread().name == "rank 0":
            mc.new_group()

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(TimeoutError):
            run(2, waits, timeout=0.2)
        run(1, gc.collect)  # ends the steps of that group: there they may not be waited for
    finally:
        gc.enable()
    gc.collect()


def _fails(error, peers):
    """Return a program in which rank 1 raises, and the others do something."""

    def program():
        if threading.current_thread().name == "rank 1":
            raise error
        peers()

    return program


def test_who_fails_before_it_has_a_group_ends_those_that_wait_for_it():
    with pytest.raises(KeyError, match="mine"):
        run(3, _fails(KeyError("mine"), mc.new_group), timeout=20)
    with pytest.raises(SystemExit):
        run(3, _fails(SystemExit(3), mc.new_group), timeout=20)


def test_ranks_that_do_not_end_tell_of_one_that_failed():
    stop = threading.Event()
    with pytest.raises(TimeoutError, match=r"ranks \[0\]") as caught:
        run(2, _fails(KeyError("mine"), lambda: stop.wait(20)), timeout=0.3)
    assert isinstance(caught.value.__cause__, KeyError)
    stop.set()


@pytest.mark.parametrize("again", [False, True])
def test_what_goes_back_to_another_rank_is_not_the_first_error(again):
    def program():
        pg = mc.new_group()
        if pg.rank() == 1:
            raise KeyError("mine")
        try:
            pg.barrier().wait()
        except mc.RemoteRankError as error:
            if not again:
                raise RuntimeError("of rank 0") from error
        pg.barrier().wait()  # of a broken group

    with pytest.raises(KeyError, match="mine"):
        run(2, program)


def test_what_ends_a_thread_of_a_rank_ends_the_rank():
    def program():
        pg = mc.new_group()
        if pg.rank() == 1:
            thread = threading.Thread(target=lambda: {}["mine"])
            thread.start()
            thread.join()
            with pytest.raises(mc.GroupBrokenError, match="raised in thread"):
                pg.barrier().wait()
        else:
            pg.barrier().wait()

    with pytest.raises(KeyError, match="mine"):
        run(2, program)


def test_several_may_move_the_clock():
    def program():
        mc.new_group()
        before = monotonic()
        advance(500)
        mc.new_group().barrier().wait()
        return monotonic() - before > 1000

    assert run(2, program, timeout=20) == [True, True]


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "2", True])
def test_wrong_timeouts_are_refused(timeout):
    with pytest.raises(mc.InvalidCallError, match="timeout must be"):
        run(1, lambda: None, timeout=timeout)


def test_when_the_clock_has_been_moved_calls_have_ended(monkeypatch):
    monkeypatch.setattr("mpicoll.testing.threads.QUIET", 0)
    works = []

    def program():
        pg = mc.new_group()
        if pg.rank() == 0:
            pg.barrier().wait()
            advance(3000)
            return works[0].done
        works.append(pg.recv(np.empty(1), 0, timeout=2000))
        pg.barrier().wait()
        with pytest.raises(mc.CollectiveTimeoutError):
            works[0].wait()
        return True

    assert run(2, program) == [True, True]


def test_who_was_told_that_a_call_is_over_is_not_warned_of_it():
    def program():
        pg = mc.new_group()
        for _ in range(20):
            ring = [pg.allreduce(np.ones(40_000))]
            ring.append(ring)  # so that the collector frees it, perhaps inside of the engine
            while not ring[0].is_completed():
                pass
            assert type(ring[0]) is not Unattended

    run(2, program)


def test_another_thread_may_ask_for_the_end_of_a_call_at_the_same_moment():
    asked = [(name, threading.Event()) for name in ("wait", "is_completed", "get_future")]

    def program():
        pg = mc.new_group()
        for name, event in asked:
            if pg.rank() == 1:
                assert event.wait(20)
            work = pg.allreduce(np.ones(40_000))
            if pg.rank() == 0:
                assert type(work) is Unattended
                ask = getattr(work, name)
                work.get_future()  # as the other one does, before this one goes on
                event.set()
                ask()
            work.wait()

    run(2, program)


def test_a_world_that_is_ended_leaves_no_memory_behind(monkeypatch):
    made = []

    def make(**options):
        made.append(mkstemp(**options))
        process().mpi.world.end("while a group is made")
        return made[0]

    mkstemp = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", make)
    with pytest.raises(RuntimeError, match="while a group is made"):
        run(2, mc.new_group)
    ((_, path),) = made
    assert not os.path.exists(path)
