"""Ranks that call different things all learn it, no data moves, and the group goes on."""

from __future__ import annotations

import numpy as np
import pytest

import mpicoll as mc
from mpicoll import ReduceOp
from mpicoll.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    InvalidCallError,
    UnsupportedError,
)
from tests.contract.arrays import NUMPY, data, reduced

pytestmark = pytest.mark.mpi(min_size=2)


def f4(count=4):
    return np.full(count, 2, np.float32)


def i4(count=4):
    return np.full(count, 2, np.int32)


def lists(pg, count=4, make=f4):
    return [make(count) for _ in range(pg.size())]


def rooted(pg, root, count=4, make=f4):
    """A list of arrays on the root, [] elsewhere."""
    return lists(pg, count, make) if pg.rank() == root else []


def own_as_usual(pg):
    """Arrays of another size for all ranks but this one."""
    return [f4(4 if r == pg.rank() else 5) for r in range(pg.size())]


def unlike(pg, root):
    """The root's arrays, of another size for all ranks but itself."""
    return own_as_usual(pg) if pg.rank() == root else []


class Unused:
    """A store for a merge that does not come to use it."""

    set = get = add = staticmethod(lambda *_: pytest.fail("the store was used"))


# What all but one rank call, and what the odd one calls instead.
CASES = {
    "allreduce, barrier": (lambda g: g.allreduce(f4()), lambda g: g.barrier()),
    "allreduce, broadcast": (lambda g: g.allreduce(f4()), lambda g: g.broadcast(f4(), 0)),
    "broadcast, reduce": (lambda g: g.broadcast(f4(), 1), lambda g: g.reduce(f4(), 1)),
    "scan, exscan": (lambda g: g.scan(f4()), lambda g: g.exscan(f4())),
    "gather, scatter": (
        lambda g: g.gather(rooted(g, 0), f4(), 0),
        lambda g: g.scatter(f4(), rooted(g, 0), 0),
    ),
    "allgather, all_gather_single": (
        lambda g: g.allgather(lists(g), f4()),
        lambda g: g.all_gather_single(f4(4 * g.size()), f4()),
    ),
    "allreduce, allreduce_coalesced": (
        lambda g: g.allreduce(f4()),
        lambda g: g.allreduce_coalesced([f4()]),
    ),
    "barrier, allgather_object": (lambda g: g.barrier(), lambda g: g.allgather_object(1)),
    "barrier, monitored_barrier": (lambda g: g.barrier(), lambda g: g.monitored_barrier()),
    "allreduce, split_group": (lambda g: g.allreduce(f4()), lambda g: g.split_group([0])),
    "barrier, split": (lambda g: g.barrier(), lambda g: g.split(0)),
    "op of allreduce": (
        lambda g: g.allreduce(f4(), ReduceOp.SUM),
        lambda g: g.allreduce(f4(), ReduceOp.MAX),
    ),
    "op of scan": (lambda g: g.scan(f4(), ReduceOp.MIN), lambda g: g.scan(f4(), ReduceOp.MAX)),
    "SUM, PREMUL_SUM": (
        lambda g: g.allreduce(f4()),
        lambda g: g.allreduce(f4(), ReduceOp.PREMUL_SUM(1)),
    ),
    "op of reduce_scatter": (
        lambda g: g.reduce_scatter(f4(), lists(g), ReduceOp.SUM),
        lambda g: g.reduce_scatter(f4(), lists(g), ReduceOp.PRODUCT),
    ),
    "root of broadcast": (lambda g: g.broadcast(f4(), 0), lambda g: g.broadcast(f4(), 1)),
    "root of reduce": (lambda g: g.reduce(f4(), 1), lambda g: g.reduce(f4(), 0)),
    "root of gather": (
        lambda g: g.gather(rooted(g, 0), f4(), 0),
        lambda g: g.gather(rooted(g, 1), f4(), 1),
    ),
    "root of scatter": (
        lambda g: g.scatter(f4(), rooted(g, 1), 1),
        lambda g: g.scatter(f4(), rooted(g, 0), 0),
    ),
    "root of broadcast_object": (
        lambda g: g.broadcast_object("x", 0),
        lambda g: g.broadcast_object("x", 1),
    ),
    "one list of split_group": (lambda g: g.split_group([0, 1]), lambda g: g.split_group([1])),
    "order in split_group": (lambda g: g.split_group([0, 1]), lambda g: g.split_group([1, 0])),
    "number of tensors": (
        lambda g: g.allreduce_coalesced([f4(), f4()]),
        lambda g: g.allreduce_coalesced([f4()]),
    ),
    "order of tensors": (
        lambda g: g.allreduce_coalesced([f4(), i4()]),
        lambda g: g.allreduce_coalesced([i4(), f4()]),
    ),
    "size of a tensor": (
        lambda g: g.allreduce_coalesced([f4(), f4(3)]),
        lambda g: g.allreduce_coalesced([f4(3), f4()]),
    ),
    "sizes in allgather": (
        lambda g: g.allgather(lists(g), f4()),
        lambda g: g.allgather(own_as_usual(g), f4()),
    ),
    "op of reduce": (
        lambda g: g.reduce(f4(), 0, ReduceOp.MIN),
        lambda g: g.reduce(f4(), 0, ReduceOp.MAX),
    ),
    "op of exscan": (lambda g: g.exscan(f4()), lambda g: g.exscan(f4(), ReduceOp.PRODUCT)),
    "op of allreduce_coalesced": (
        lambda g: g.allreduce_coalesced([f4()]),
        lambda g: g.allreduce_coalesced([f4()], ReduceOp.AVG),
    ),
    "op of reduce_scatter_single": (
        lambda g: g.reduce_scatter_single(f4(), f4(4 * g.size()), ReduceOp.AVG),
        lambda g: g.reduce_scatter_single(f4(), f4(4 * g.size())),
    ),
    "root of gather_object": (
        lambda g: g.gather_object("x", 1),
        lambda g: g.gather_object("x", 0),
    ),
    "root of scatter_object": (
        lambda g: g.scatter_object(["x"] * g.size(), 0),
        lambda g: g.scatter_object(["x"] * g.size(), 1),
    ),
    "gather_object, scatter_object": (
        lambda g: g.gather_object("x", 0),
        lambda g: g.scatter_object(["x"] * g.size(), 0),
    ),
    "local_group, cross_node_group": (
        lambda g: g.local_group(),
        lambda g: g.cross_node_group(),
    ),
    "alltoall, all_to_all_single": (
        lambda g: g.alltoall(lists(g), lists(g)),
        lambda g: g.all_to_all_single(f4(4 * g.size()), f4(4 * g.size()), None, None),
    ),
    "reduce_scatter, reduce_scatter_single": (
        lambda g: g.reduce_scatter(f4(), lists(g)),
        lambda g: g.reduce_scatter_single(f4(), f4(4 * g.size())),
    ),
    "extent of empty": (lambda g: g.empty(4), lambda g: g.empty(5)),
    "dtype of empty": (lambda g: g.empty(4, "f4"), lambda g: g.empty(4, "i4")),
    "size of a merge": (
        lambda g: g.merge_remote_group(Unused(), g.size()),
        lambda g: g.merge_remote_group(Unused(), g.size() + 1),
    ),
    "sizes in gather": (
        lambda g: g.gather(rooted(g, 0), f4(), 0),
        lambda g: g.gather(unlike(g, 0), f4(), 0),
    ),
    "sizes in scatter": (
        lambda g: g.scatter(f4(), rooted(g, 0), 0),
        lambda g: g.scatter(f4(), unlike(g, 0), 0),
    ),
    "sizes in reduce_scatter": (
        lambda g: g.reduce_scatter(f4(), lists(g)),
        lambda g: g.reduce_scatter(f4(), own_as_usual(g)),
    ),
    "sizes in alltoall": (
        lambda g: g.alltoall(lists(g), lists(g)),
        lambda g: g.alltoall(lists(g), own_as_usual(g)),
    ),
    "splits of all_to_all_single": (
        lambda g: g.all_to_all_single(f4(4 * g.size()), f4(4 * g.size()), None, None),
        lambda g: g.all_to_all_single(f4(4 * g.size()), f4(4 * g.size()), *shifted(g)),
    ),
}

# Calls that take a count and a dtype: all but one rank use float32[4].
SIZED = {
    "allreduce": lambda g, n, make: g.allreduce(make(n)),
    "broadcast": lambda g, n, make: g.broadcast(make(n), 0),
    "reduce": lambda g, n, make: g.reduce(make(n), 1),
    "scan": lambda g, n, make: g.scan(make(n)),
    "exscan": lambda g, n, make: g.exscan(make(n)),
    "allgather": lambda g, n, make: g.allgather(lists(g, n, make), make(n)),
    "all_gather_single": lambda g, n, make: g.all_gather_single(make(n * g.size()), make(n)),
    "gather": lambda g, n, make: g.gather(rooted(g, 0, n, make), make(n), 0),
    "scatter": lambda g, n, make: g.scatter(make(n), rooted(g, 0, n, make), 0),
    "reduce_scatter": lambda g, n, make: g.reduce_scatter(make(n), lists(g, n, make)),
    "reduce_scatter_single": lambda g, n, make: g.reduce_scatter_single(
        make(n), make(n * g.size())
    ),
    "alltoall": lambda g, n, make: g.alltoall(lists(g, n, make), lists(g, n, make)),
    "all_to_all_single": lambda g, n, make: g.all_to_all_single(
        make(n * g.size()), make(n * g.size()), [], []
    ),
    "allreduce_coalesced": lambda g, n, make: g.allreduce_coalesced([f4(), make(n)]),
    "allgather_coalesced": lambda g, n, make: g.allgather_coalesced(
        [[f4(), make(n)] for _ in range(g.size())], [f4(), make(n)]
    ),
    "all_gather_single_coalesced": lambda g, n, make: g.all_gather_single_coalesced(
        [f4(4 * g.size()), make(n * g.size())], [f4(), make(n)]
    ),
    "reduce_scatter_single_coalesced": lambda g, n, make: g.reduce_scatter_single_coalesced(
        [f4(), make(n)], [f4(4 * g.size()), make(n * g.size())]
    ),
}
for _name, _call in SIZED.items():
    CASES[f"dtype of {_name}"] = (
        lambda g, call=_call: call(g, 4, f4),
        lambda g, call=_call: call(g, 4, i4),
    )
    for _count in (0, 3):
        CASES[f"count {_count} in {_name}"] = (
            lambda g, call=_call: call(g, 4, f4),
            lambda g, call=_call, count=_count: call(g, count, f4),
        )


def shifted(g):
    """Splits that send the next rank one row more, and the one after that one row less."""
    out = [4] * g.size()
    inn = [4] * g.size()
    others = [r for r in range(g.size()) if r != g.rank()]
    if len(others) > 1:
        inn[others[0]] += 1
        inn[others[1]] -= 1
    else:  # with two ranks: keep more for oneself than the other expects
        inn[g.rank()] += 1
        inn[others[0]] -= 1
        out = list(inn)
    return out, inn


def finish(result):
    """Wait for what a call returned, if it is a Work."""
    if isinstance(result, mc.Work):
        result.wait()


def ten_calls_are_right(pg):
    n, me = pg.size(), pg.rank()
    for i in range(5):
        parts = [data(r, 100, "f4", seed=i) for r in range(n)]
        x = parts[me].copy()
        pg.allreduce(x).wait()
        assert NUMPY.same(x, reduced("SUM", parts))
        y = parts[me].copy()
        pg.broadcast(y, i % n).wait()
        assert NUMPY.same(y, parts[i % n])


ONLY_BY_THE_ROOT = {"sizes in gather", "sizes in scatter"}  # the others have no list


@pytest.mark.parametrize("case", CASES)
def test_every_rank_is_told_which_is_odd(pg, case):
    usual, other = CASES[case]
    for odd in {0} if case in ONLY_BY_THE_ROOT else {0, pg.size() - 1}:
        with pytest.raises(CollectiveMismatchError, match=rf"rank {odd}\b"):
            finish((other if pg.rank() == odd else usual)(pg))
    ten_calls_are_right(pg)


def test_there_are_enough_kinds():
    assert len(CASES) >= 28


@pytest.mark.parametrize("bad, error", [(None, InvalidCallError), ("O", UnsupportedError)])
def test_a_call_refused_on_one_rank_is_heard_of_by_its_peers(pg, bad, error):
    for odd in range(pg.size()):
        for call in SIZED.values():
            if pg.rank() == odd:
                with pytest.raises(error):
                    call(pg, 4, lambda n: None if bad is None else np.empty(n, bad))
            else:
                with pytest.raises(CollectiveMismatchError, match=f"rank {odd}.*refused"):
                    finish(call(pg, 4, f4))
    ten_calls_are_right(pg)


def test_nothing_is_written(pg):
    x = f4(pg.rank() + 1)
    with pytest.raises(CollectiveMismatchError):
        pg.allreduce(x).wait()
    assert (x == 2).all()


def test_the_message_says_who_called_what(pg):
    odd = pg.size() - 1
    with pytest.raises(CollectiveMismatchError) as caught:
        pg.allreduce(i4(3) if pg.rank() == odd else f4(4), ReduceOp.MAX).wait()
    message = str(caught.value)
    for part in ("allreduce", "int32[3]", "float32[4]", "MAX", f"rank {odd}"):
        assert part in message, message


def test_works_in_flight_around_a_mismatch_are_right(pg):
    n, me = pg.size(), pg.rank()
    parts = [data(r, 1000) for r in range(n)]
    before, after = parts[me].copy(), parts[me].copy()
    first = pg.allreduce(before)
    wrong = pg.broadcast(f4(), root=0 if me == 0 else 1)
    while not wrong.is_completed():
        pass  # that it has failed must not keep the next call from being made
    last = pg.allreduce(after)
    assert first.wait()
    with pytest.raises(CollectiveMismatchError):
        wrong.wait()
    assert last.wait()
    assert NUMPY.same(before, reduced("SUM", parts)) and NUMPY.same(after, before)


def test_lists_of_split_group_that_overlap(fresh):
    if fresh.size() < 3:
        pytest.skip("takes three ranks")
    for _ in range(2):
        with pytest.raises(CollectiveMismatchError, match="rank"):
            fresh.split_group([0, 1] if fresh.rank() == 0 else [1, 2])
    ten_calls_are_right(fresh)


@pytest.mark.parametrize("options", [{"backend": "mpi"}, {"checks": "node"}], ids=str)
def test_groups_that_are_to_be_made_differently(pg, options):
    for odd in range(pg.size()):
        with pytest.raises(CollectiveMismatchError, match=rf"rank {odd}\b"):
            mc.new_group(timeout=20, **(options if pg.rank() == odd else {}))
    with mc.new_group(timeout=20, **options) as made:
        ten_calls_are_right(made)
    ten_calls_are_right(pg)


def test_a_message_of_another_tag_is_not_taken_for_it(pg):
    n, me = pg.size(), pg.rank()
    incoming = f4()
    sending = pg.send(i4(), (me + 1) % n, tag=4)
    with pytest.raises(CollectiveTimeoutError, match="no matching message"):
        pg.recv(incoming, (me - 1) % n, tag=5, timeout=0.1).wait()
    assert (incoming == 2).all()
    received = i4(4) * 0
    pg.recv(received, (me - 1) % n, tag=4).wait()
    sending.wait()
    assert (received == 2).all()
    ten_calls_are_right(pg)
