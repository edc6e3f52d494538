"""Groups: what they say of themselves, splits, nesting, threads, other people's communicators."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import time
import weakref
from datetime import timedelta

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    GroupBrokenError,
    GroupClosedError,
    InvalidCallError,
    RemoteRankError,
)
from mpicoll.runtime.library import MPI
from tests.contract.arrays import NUMPY, data, reduced
from tests.contract.conftest import NODES
from tests.soak import soak

pytestmark = pytest.mark.mpi


def total(pg):
    """Allreduce the members' world ranks, distinct per position, and check the sum."""
    me = MPI.COMM_WORLD.rank
    x = data(me, 100)
    pg.allreduce(x).wait()
    assert NUMPY.same(x, reduced("SUM", [data(r, 100) for r in pg.ranks]))


def test_what_a_group_says_of_itself(pg):
    world = MPI.COMM_WORLD
    assert (pg.rank(), pg.size()) == (world.rank, world.size)
    assert list(pg.ranks) == list(range(world.size))
    assert str(pg.rank()) in repr(pg) and str(pg.size()) in repr(pg)
    assert isinstance(pg.name(), str) and pg.group_name and isinstance(pg.group_desc, str)
    assert pg.timeout == timedelta(seconds=20) == pg._get_backend("cpu").options._timeout
    assert str(pg.device) == "cpu"
    assert isinstance(mc.__version__, str)


def test_set_timeout(fresh):
    for given in (7, 7.0, timedelta(seconds=7)):
        fresh.set_timeout(given)
        assert fresh.timeout == timedelta(seconds=7)
    with pytest.raises(InvalidCallError, match="timeout"):
        fresh.set_timeout(0)


@pytest.mark.processes
def test_the_communicator_is_a_private_duplicate(pg, world):
    assert MPI.Comm.Compare(pg.comm, MPI.COMM_WORLD) == MPI.CONGRUENT
    x = data(pg.rank(), 1000)
    work = pg.allreduce(x)
    mine = np.array([pg.rank() + 1.0])
    world.Allreduce(MPI.IN_PLACE, mine)  # not mixed up with the library's traffic
    work.wait()
    assert NUMPY.same(x, reduced("SUM", [data(r, 1000) for r in range(pg.size())]))
    assert mine[0] == pg.size() * (pg.size() + 1) / 2
    own = np.array([pg.rank()])
    pg.comm.Bcast(own, root=pg.size() - 1)  # mpi4py on pg.comm, while nothing is in flight
    assert own[0] == pg.size() - 1


def test_new_group_from_a_communicator(world):
    reverse = world.Split(0, key=-world.rank)
    pg = mc.new_group(comm=reverse, timeout=20, group_name="backwards")
    reverse.Free()  # it was duplicated
    assert pg.rank() == world.size - 1 - world.rank
    assert list(pg.ranks) == list(range(world.size))[::-1]
    assert pg.group_name == "backwards"
    total(pg)
    x = np.array([world.rank])
    pg.broadcast(x, 0).wait()
    assert x[0] == world.size - 1
    pg.shutdown()


@pytest.mark.mpi(min_size=2)
def test_a_groups_own_communicator_makes_others_in_its_turn(pg):
    """Whatever is under way in the group, and though its ranks are not equally far."""
    arrays = [data(pg.rank(), 100_000, seed=i) for i in range(4)]
    works = [pg.allreduce(x) for x in arrays]
    if pg.rank() == 0:
        works[0].wait()
    made = mc.new_group(comm=pg.comm, timeout=20)
    total(made)
    made.shutdown()
    mc.wait_all(works)
    for i, x in enumerate(arrays):
        parts = [data(r, 100_000, seed=i) for r in range(pg.size())]
        assert NUMPY.same(x, reduced("SUM", parts)), i
    with pytest.raises(CollectiveMismatchError, match=r"new_group\('mpi'.*barrier\(\)"):
        if pg.rank() == 0:
            mc.new_group("mpi", comm=pg.comm, timeout=20)
        pg.barrier().wait()
    total(pg)


def test_a_group_made_over_anothers_communicator_hears_of_that_ones_failure():
    pg = mc.new_group(timeout=20)
    if pg.rank() == 0:
        pg.abort("goes")
    else:
        with pytest.raises(RemoteRankError, match="goes"):
            mc.new_group(comm=pg.comm, timeout=20)
        with pytest.raises(GroupBrokenError, match="goes"):
            mc.new_group(comm=pg.comm, timeout=20)


def test_new_group_of_some_ranks(world):
    part = world.Split(world.rank % 2)
    pg = mc.new_group(comm=part, timeout=20)
    assert list(pg.ranks) == [r for r in range(world.size) if r % 2 == world.rank % 2]
    total(pg)
    pg.shutdown()
    part.Free()


def test_split_group_keeps_the_order_of_the_list(pg):
    n, me = pg.size(), pg.rank()
    backwards = pg.split_group(list(reversed(range(n))))
    assert backwards.rank() == n - 1 - me and list(backwards.ranks) == list(range(n))[::-1]
    assert backwards.timeout == pg.timeout
    total(backwards)
    backwards.shutdown()


def test_only_members_get_a_group(pg):
    for root in range(pg.size()):
        alone = pg.split_group((root,), timeout=9, group_name="alone", group_desc="one rank")
        if pg.rank() == root:
            assert (alone.size(), alone.rank(), list(alone.ranks)) == (1, 0, [root])
            assert (alone.group_name, alone.group_desc) == ("alone", "one rank")
            assert alone.timeout == timedelta(seconds=9)
            total(alone)
        else:
            assert alone is None
    total(pg)


@pytest.mark.mpi(min_size=2)
def test_disjoint_lists_in_one_call(pg):
    n, me = pg.size(), pg.rank()
    lists = [list(range(0, n, 2)), list(range(1, n, 2))]
    half = pg.split_group(lists[me % 2])
    assert list(half.ranks) == lists[me % 2]
    total(half)
    again = half.split_group([half.size() - 1])  # a split of a split
    assert (again is None) == (half.rank() != half.size() - 1)
    if again is not None:
        assert list(again.ranks) == [me]


def test_no_question_is_on_its_way_when_a_group_is_given_back(fresh, world):
    """It would come to the next communicator of that number, under Open MPI."""
    peers = fresh._caller.group_state.peers
    peers.ask()
    fresh.shutdown()
    said = world.allgather((sum(peers._sent), sum(peers._received)))
    sent, received = map(sum, zip(*said, strict=True))
    assert sent == received
    assert sent or world.Get_size() == 1


def test_a_subgroup_is_made_by_its_members_alone(fresh):
    me, last = fresh.rank(), fresh.size() - 1
    for ranks in ([last, 0] if last else [0], list(range(last + 1)), [last]):
        if me not in ranks:
            continue
        part = fresh.subgroup(ranks, timeout=9, group_desc="of some")
        assert part.ranks == [fresh.ranks[r] for r in ranks] and part.rank() == ranks.index(me)
        assert part.timeout == timedelta(seconds=9) and part.group_desc == "of some"
        assert part.group_name == f"world:{ranks}"
        total(part)
        part.shutdown()
    total(fresh)


@pytest.mark.mpi(min_size=2)
def test_subgroups_that_overlap_are_made_in_one_order_while_the_parent_is_busy(fresh):
    me, n = fresh.rank(), fresh.size()
    x = data(me, 70_001)
    work = fresh.allreduce(x)
    parts = [fresh.subgroup([k, k + 1]) for k in range(n - 1) if me in (k, k + 1)]
    work.wait()
    assert NUMPY.same(x, reduced("SUM", [data(r, 70_001) for r in range(n)]))
    for part in parts:
        total(part)
        part.shutdown()


@pytest.mark.mpi(min_size=2)
def test_a_subgroup_without_all_its_members_is_not_made(fresh, world):
    last = fresh.size() - 1
    if fresh.rank() != last:
        with pytest.raises(CollectiveTimeoutError, match=rf"ranks \[{last}\]") as caught:
            fresh.subgroup(range(last + 1), timeout=0.3)
        assert caught.value.missing == (last,)
    world.barrier()
    fresh.subgroup(range(last + 1)).shutdown()
    total(fresh)


@pytest.mark.mpi(min_size=3)
def test_a_subgroup_whose_members_want_different_ones_says_so(fresh, world):
    ranks = [0, 1] if fresh.rank() == 0 else [0, 1, 2]
    if fresh.rank() < 2:
        match = r"rank 1 makes one of ranks \[0, 1, 2\]" if fresh.rank() == 0 else r"\[2\]|\[0\]"
        with pytest.raises(CollectiveTimeoutError, match=match):
            fresh.subgroup(ranks, timeout=0.4)
    world.barrier()
    total(fresh)


def test_a_subgroup_is_called_by_members(fresh):
    others = [r for r in range(fresh.size()) if r != fresh.rank()]
    with pytest.raises(InvalidCallError, match="only the members"):
        fresh.subgroup(others)
    with pytest.raises(InvalidCallError, match="twice"):
        fresh.subgroup([fresh.rank()] * 2)
    total(fresh)


def test_default_names_are_dist2s(pg):
    everyone = list(range(pg.size()))
    assert pg.split_group(everyone).group_name == f"{pg.group_name}:split:{everyone}"


def test_split_by_color_and_key(pg):
    n, me = pg.size(), pg.rank()
    mine = pg.split(me % 2, key=-me)
    assert list(mine.ranks) == [r for r in range(n) if r % 2 == me % 2][::-1]
    total(mine)
    same = pg.split(7)
    assert list(same.ranks) == list(range(n))
    nobody = pg.split(None if me == 0 else 1)
    assert (nobody is None) == (me == 0)
    if nobody is not None:
        total(nobody)


def test_groups_of_a_node(pg):
    """All ranks of a test run share one node, unless it pretends two."""
    local, across = pg.local_group(), pg.cross_node_group()
    n, me = pg.size(), pg.rank()
    nodes = [list(range(n // 2)), list(range(n // 2, n))] if NODES else [list(range(n))]
    mine = next(node for node in nodes if me in node)
    assert list(local.ranks) == mine
    place = mine.index(me)
    assert list(across.ranks) == [node[place] for node in nodes if place < len(node)]
    total(local)
    total(across)


def test_the_current_group_nests_and_is_the_threads_own(pg, fresh):
    seen = []
    with mc.process_group(pg):
        with mc.process_group(fresh), pytest.raises(KeyError), mc.process_group(pg):
            raise KeyError
        assert mc.current_process_group() is pg
        thread = threading.Thread(target=lambda: seen.append(mc.current_process_group()))
        thread.start()
        thread.join()
    assert mc.current_process_group() is None and seen == [None]


def test_one_split_per_thread(pg):
    """Threads that each use a group of their own, in no common order between ranks."""
    groups = [pg.split_group(list(range(pg.size()))) for _ in range(3)]
    failures = []

    def use(group, i):
        try:
            time.sleep(0.005 * ((i + pg.rank()) % 3))
            for seed in range(20):
                parts = [data(r, 50 * seed, seed=seed + i) for r in range(pg.size())]
                x = parts[pg.rank()].copy()
                group.allreduce(x).wait()
                assert NUMPY.same(x, reduced("SUM", parts)), (i, seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use, args=(group, i)) for i, group in enumerate(groups)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
    for group in groups:
        group.shutdown()


MAKERS = {
    "split": lambda g: g.split(0),
    "split_group": lambda g: g.split_group(list(range(g.size()))),
    "local_group": lambda g: g.local_group(),
    "cross_node_group": lambda g: g.cross_node_group(),
    "shrink_group": lambda g: g.split(0).shrink_group(),
    "new_group": lambda g: mc.new_group(comm=g.comm),
}


@pytest.mark.parametrize("make", MAKERS)
def test_threads_make_groups_in_any_order(pg, make):
    """None waits inside MPI for another thread's call; each has a group of its own."""
    groups = [pg.split(0), pg.split(0)]
    failures = []

    def use(group):
        try:
            for _ in range(soak(200, 8)):
                made = MAKERS[make](group)
                total(made)
                made.shutdown()
        except BaseException as error:
            failures.append(error)

    order = groups if pg.rank() % 2 else groups[::-1]
    threads = [threading.Thread(target=use, args=(group,)) for group in order]
    for thread in threads:
        thread.start()
        time.sleep(0.02)  # so that the ranks come to their first calls in opposite orders
    for thread in threads:
        thread.join()
    assert not failures, failures
    for group in groups:
        group.shutdown()


def test_with_statement_closes():
    with mc.new_group(timeout=20) as pg:
        total(pg)
    with pytest.raises(GroupClosedError):
        pg.barrier()
    with pytest.raises(ZeroDivisionError), mc.new_group(timeout=20) as pg:
        raise ZeroDivisionError


USES = {
    "allreduce": lambda g: g.allreduce(np.ones(3)),
    "barrier": lambda g: g.barrier(),
    "send": lambda g: g.send(np.ones(3), 0),
    "recv": lambda g: g.recv(np.ones(3), 0),
    "allgather_object": lambda g: g.allgather_object(1),
    "monitored_barrier": lambda g: g.monitored_barrier(),
    "split_group": lambda g: g.split_group([0]),
    "split": lambda g: g.split(0),
    "bad input": lambda g: g.allreduce("text"),
}


@pytest.mark.parametrize("close", ["shutdown", "abort"])
def test_a_closed_group_says_so(close):
    pg = mc.new_group(timeout=20)
    total(pg)
    getattr(pg, close)()
    for name, use in USES.items():
        with pytest.raises(GroupClosedError):
            use(pg)
            pytest.fail(f"{name} after {close}")
    pg.shutdown()
    pg.abort()
    assert {"shutdown": "shut down", "abort": "aborted"}[close] in repr(pg)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("reason", ["", "the disk is full", "x" * 10_000, 17])
def test_an_abort_tells_its_reason(world, reason):
    pg = mc.new_group(timeout=20)
    total(pg)
    if pg.rank() == 0:
        pg.abort(reason)
        with pytest.raises(GroupClosedError):
            pg.barrier()
    else:
        with pytest.raises(RemoteRankError) as caught:
            pg.barrier().wait()
        assert caught.value.rank == 0
        said = f"rank 0 aborted the group{': ' if reason else ''}{reason}"
        assert said[:1000] in str(caught.value)
    world.Barrier()
    pg.abort()


def test_shutdown_finishes_what_is_in_flight(fresh):
    x = data(fresh.rank(), 70_001)
    work = fresh.allreduce(x)
    fresh.shutdown(timeout=10)
    assert work.is_success()
    assert NUMPY.same(x, reduced("SUM", [data(r, 70_001) for r in range(fresh.size())]))


def test_groups_can_be_made_and_closed_again_and_again():
    """MPICH has about 2,000 communicators: closing gives them back."""
    for _ in range(soak(2200, 60)):
        with mc.new_group(timeout=20) as pg:
            pg.barrier().wait()


@pytest.mark.processes
def test_registered_backends_are_called_as_dist2_calls_them(world, request):
    seen = {}

    def factory(store, rank, world_size, timeout, device, **options):
        store.set(f"here {rank}", b"yes")
        store.wait([f"here {r}" for r in range(world_size)])
        seen.update(rank=rank, size=world_size, timeout=timeout, device=device, **options)
        seen["count"] = store.add("count", 1)
        return mc.new_group("mpi", timeout, device)

    name = f"mine-{abs(hash(request.node.name))}" if world.size == 1 else "mine"
    mc.register_backend(name, factory)
    with pytest.raises(ValueError, match="registered"):
        mc.register_backend(name, factory)
    pg = mc.new_group(name, timeout=timedelta(seconds=20), device="cpu", flavour="plain")
    assert (seen["rank"], seen["size"]) == (world.rank, world.size)
    assert seen["timeout"] == timedelta(seconds=20) and str(seen["device"]) == "cpu"
    assert seen["flavour"] == "plain"
    assert sorted(world.allgather(seen["count"])) == list(range(1, world.size + 1))
    total(pg)
    pg.shutdown()


def test_every_backend_name_of_the_host_works():
    for name in ("auto", "gloo", "mpi"):
        with mc.new_group(backend=name, timeout=20, progress="caller") as pg:
            total(pg)


def open_files():
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.processes
def test_a_closed_group_is_gone_without_the_collector(fresh):
    """Its mapped file, too: a loop that makes groups must not wait for a collection."""
    gc.collect()
    gc.disable()
    try:
        files = open_files()
        for let_go in ("shutdown", "drop", "drop"):
            group = fresh.split(0)
            x = np.ones(70_001)
            group.allreduce(x).wait()
            if let_go == "shutdown":
                group.shutdown()
            gone = weakref.ref(group)
            del group
            assert gone() is None
        fresh.split(0).shutdown()  # where the dropped ones are reclaimed
        assert open_files() == files
    finally:
        gc.enable()


def held():
    """What this process holds of shared memory, and how many open files."""
    with open("/proc/self/maps") as maps:
        return sum("/dev/shm/mpicoll-" in line for line in maps), open_files()


@pytest.mark.processes
@pytest.mark.parametrize("end", ["shutdown", "with", "abort"])
def test_groups_that_were_closed_hold_no_memory_and_no_files(fresh, end):
    """Though the program keeps them all."""
    gc.collect()
    before, kept = held(), []
    for _ in range(20):
        group = fresh.split(0)
        kept.append(group)
        array = group.empty(1000, "float64")
        array[:] = fresh.rank()
        group.allreduce(array).wait()
        group.allreduce(np.ones(70_001)).wait()
        if end == "with":
            with group:
                group.barrier().wait()
        else:
            getattr(group, end)()
    assert array[-1] == sum(range(fresh.size()))  # it is as good as ever
    del array
    assert held() == before
    assert all(group.is_closed and repr(group) and group.dump() for group in kept)


def test_dropped_groups_are_reclaimed_when_all_ranks_are_done_with_them(fresh):
    """With what was made out of them; and not before."""
    me = fresh.rank()
    kept = fresh.split(0)
    part = kept.split(me % 2)
    state, part_state = kept._caller.group_state, part._caller.group_state
    if me != 0:
        del kept  # rank 0 still has it
    fresh.split(0).shutdown()
    assert not state.closed and not part_state.closed
    if me == 0:
        del kept  # but all have a part of it
    fresh.barrier().wait()
    fresh.split(0).shutdown()
    assert not state.closed and not part_state.closed
    x = np.ones(3)
    part.allreduce(x).wait()
    assert x[0] == part.size()
    del part
    fresh.split(0).shutdown()
    assert state.closed == part_state.closed == "reclaimed"


def test_a_dropped_group_whose_work_is_under_way_stays(fresh):
    x = np.full(70_001, fresh.rank() + 1.0)
    work = fresh.split(0).allreduce(x)
    fresh.split(0).shutdown()
    assert work.wait()
    assert x[-1] == sum(range(1, fresh.size() + 1))


@pytest.mark.mpi(min_size=2)
def test_a_shutdown_that_meets_another_call_shuts_nothing_down(fresh):
    with pytest.raises(CollectiveMismatchError, match="shutdown"):
        if fresh.rank() == 0:
            fresh.shutdown()
        else:
            fresh.barrier().wait()
    x = np.ones(3)
    fresh.allreduce(x).wait()
    assert x[0] == fresh.size()


def test_bools_are_colors(pg):
    """`split(rank >= half)` is how people write it."""
    for chosen in (pg.rank() > 0, np.bool_(pg.rank() > 0)):
        part = pg.split(chosen)
        assert part.size() == (1 if pg.rank() == 0 else pg.size() - 1)
        part.shutdown()


def test_a_rank_in_no_group_may_give_no_ranks(pg):
    part = pg.split_group([0] if pg.rank() == 0 else [])
    assert (part is None) == (pg.rank() != 0)
    if part is not None:
        part.shutdown()
    pg.barrier().wait()


def test_what_a_group_says_of_its_state(world):
    pg = mc.new_group(timeout=20)
    assert not pg.is_broken and not pg.is_closed
    world.Barrier()  # or a rank that has aborted would be heard of already
    pg.abort()
    assert pg.is_broken and pg.is_closed
    pg = mc.new_group(timeout=20)
    pg.shutdown()
    assert not pg.is_broken and pg.is_closed


@pytest.mark.parametrize(
    "never", [timedelta.max, float("inf"), 10**400, np.float32("inf")], ids=lambda t: f"{t!r:.9}"
)
def test_a_timeout_may_be_never(never):
    with mc.new_group(timeout=never) as pg:
        assert pg.timeout == timedelta.max
        pg.allreduce(np.ones(3), timeout=never).wait(never)
        half = pg.split(0, timeout=never)
        assert half.timeout == timedelta.max
        half.shutdown()
        pg.set_timeout(np.int64(7))
        assert pg.timeout == timedelta(seconds=7)
        pg.set_timeout(np.float32(0.5))
        assert pg.timeout == timedelta(seconds=0.5)


def test_the_lists_of_those_who_are_not_the_root_are_not_looked_at(pg):
    n, me = pg.size(), pg.rank()
    for root in range(n):
        rows = np.zeros((n, 3))
        pg.gather(
            list(rows) if me == root else [np.zeros(7, "i4")], np.full(3, float(me)), root
        ).wait()
        if me == root:
            assert (rows == np.arange(n)[:, None]).all()
        into = np.zeros(3)
        pg.scatter(into, list(np.full((n, 3), 5.0)), root).wait()
        assert (into == 5).all()


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, pickle.dumps, lambda x: pickle.dumps([x], protocol=2)]
)
def test_groups_and_works_are_neither_copied_nor_pickled(pg, again):
    work = pg.barrier()
    for one in (pg, work):
        for error in (TypeError, mc.InvalidCallError):
            with pytest.raises(error, match="neither copied nor pickled"):
                again(one)
    work.wait()
    with pytest.raises(mc.InvalidCallError, match="pickled"):
        pg.allgather_object(pg)
    gc.collect()
    pg.barrier().wait()
