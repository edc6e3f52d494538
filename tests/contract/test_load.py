"""Much at a time and much in a row: threads, Works in flight, groups that come and go."""

from __future__ import annotations

import gc
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.engine.progress import engine
from tests.contract.arrays import NUMPY, data, reduced
from tests.soak import soak

pytestmark = [pytest.mark.mpi, pytest.mark.limit(soak(1800, 60))]

THREADS = 4
MIB = 2**20


def test_a_thread_per_group(pg):
    """Each thread makes its own calls, in no common order with the others."""
    groups = [pg.split(0) for _ in range(THREADS)]
    failures = []

    def use(group, number):
        try:
            dice = random.Random(number)  # as on the other ranks
            for seed in range(soak(10_000, 100)):
                size = dice.choice([1, 1, 50, 50, 3_000, 20_000])
                parts = [data(r, size, seed=seed + number) for r in range(group.size())]
                x = parts[group.rank()].copy()
                if dice.random() < 0.5:
                    group.allreduce(x).wait()
                    assert NUMPY.same(x, reduced("SUM", parts)), (number, seed)
                else:
                    root = dice.randrange(group.size())
                    group.broadcast(x, root).wait()
                    assert NUMPY.same(x, parts[root]), (number, seed)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=use, args=(group, number)) for number, group in enumerate(groups)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for group in groups:
        group.shutdown()


def test_sixty_four_works_in_flight_waited_for_in_random_order(pg):
    n, me = pg.size(), pg.rank()
    dice = random.Random(me)  # each rank in an order of its own
    for turn in range(soak(1000, 4)):
        parts = [[data(r, 1 + 40 * i, seed=i + turn) for r in range(n)] for i in range(64)]
        arrays = [part[me].copy() for part in parts]
        works = [
            pg.allreduce(x) if i % 3 else pg.broadcast(x, (i + turn) % n)
            for i, x in enumerate(arrays)
        ]
        for work in dice.sample(works, len(works)):
            work.wait()
        for i, (x, part) in enumerate(zip(arrays, parts)):
            expected = reduced("SUM", part) if i % 3 else part[(i + turn) % n]
            assert NUMPY.same(x, expected), (turn, i)


def held():
    """What this process holds: resident bytes, open files, entries in the engine's tables."""
    gc.collect()  # a group's mapped file goes with the cycles that hold it
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    tables = [
        engine()._group_states,
        engine()._active,
        engine()._abandoned,
        engine()._handed,
        engine()._ended,
    ]
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir("/proc/self/fd")),
        [len(table) for table in tables],
    )


MAKE = {
    "split": lambda g, i: g.split(0),
    "split in halves": lambda g, i: g.split(g.rank() % 2),
    "split_group": lambda g, i: g.split_group(list(range(g.size()))[:: 1 - 2 * (i % 2)]),
    "local_group": lambda g, i: g.local_group(),
    "new_group": lambda g, i: mc.new_group(g.name() if g.name() == "mpi" else "auto", timeout=20),
}
LET_GO = {"shut down": lambda group: group.shutdown(), "dropped": lambda group: None}


@pytest.mark.parametrize("let_go", LET_GO)
@pytest.mark.parametrize("make", MAKE)
def test_groups_come_and_go_and_nothing_stays(pg, make, let_go):
    """MPICH has about 2,000 communicators, and every system a limit on files."""
    me = MPI.COMM_WORLD.rank

    def come_and_go(times):
        for i in range(times):
            group = MAKE[make](pg, i)
            x = data(me, 5)
            group.allreduce(x).wait()
            assert NUMPY.same(x, reduced("SUM", [data(r, 5) for r in group.ranks]))
            LET_GO[let_go](group)
            del group

    times = soak(20_000 if make == "split" else 3_000, 20)
    come_and_go(soak(2_000, 20))
    memory, files, tables = held()
    come_and_go(times)
    memory_after, files_after, tables_after = held()
    assert (files_after, tables_after) == (files, tables)
    assert memory_after - memory < 4 * MIB, f"{(memory_after - memory) / times:.0f} bytes a group"


def test_what_messages_cost_does_not_grow_with_their_number(fresh):
    """Steps are counted, not seconds: each message takes a few, however many are under way."""
    me, n = fresh.rank(), fresh.size()
    right, left = (me + 1) % n, (me - 1) % n
    for many in (50, 2000):
        source, into = np.arange(float(many)), np.zeros(many)
        before = engine()._steps
        works = [fresh.recv(into[i : i + 1], left) for i in range(many)]
        works += [fresh.send(source[i : i + 1], right) for i in range(many)]
        launched = engine()._steps - before
        assert launched <= 2 * many, "a launch takes a step of its own at most, and of no other"
        mc.wait_all(works)
        assert (into == source).all()


def test_calls_of_a_late_peer_are_launched_at_one_price(fresh, world):
    if world.size == 1:
        pytest.skip("needs two ranks")
    rows = np.ones((1000, 4))
    if world.rank == 0:
        world.Barrier()
    before = engine()._steps
    works = [fresh.allreduce(row) for row in rows]
    if world.rank != 0:
        assert engine()._steps - before <= 1, "only the head of the queue has begun"
        world.Barrier()
    mc.wait_all(works)
    assert (rows == world.size).all()
