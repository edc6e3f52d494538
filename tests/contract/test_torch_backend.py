"""The second door: torch.distributed over the backend "mpicoll", by its values and its errors."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpicoll as mc
from tests.contract.arrays import BFLOAT16, KINDS, OPS, data, reduced, small
from tests.contract.conftest import GROUP_TIMEOUT, finish

torch = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
import torch.distributed as dist  # noqa: E402

from mpicoll.torch import future_of  # noqa: E402
from mpicoll.torch.group import TorchGroup  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TENSORS = KINDS[1]
LIMIT = timedelta(seconds=0.4)
TORCH_DTYPES = [np.dtype(code) for code in "?bBhilefd"] + [BFLOAT16]


def end() -> None:
    if dist.is_initialized():
        dist.distributed_c10d._abort_process_group()


def own() -> TorchGroup:
    group = dist.group.WORLD
    assert isinstance(group, TorchGroup)
    return group


@pytest.fixture
def world_group() -> TorchGroup:
    """The default group, made anew after a failure."""
    if dist.is_initialized() and (own().mpicoll.is_broken or own().mpicoll.is_closed):
        end()
    if not dist.is_initialized():
        dist.init_process_group("mpicoll", timeout=timedelta(seconds=GROUP_TIMEOUT))
    return own()


@pytest.fixture
def me(world_group):
    return dist.get_rank()


@pytest.fixture
def n(world_group):
    return dist.get_world_size()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def done(request):
    """What a collective is called with, and what has to be done with what it returns."""

    def call(function, *args, **kwargs):
        work = function(*args, async_op=request.param, **kwargs)
        assert (work is None) != request.param
        if work is not None:
            assert work.wait()
            assert work.is_completed()
            assert work.is_success()

    return call


@pytest.fixture(params=["rows", "strided"])
def tensor(request):
    """How the tensors of a test lie in memory: what makes one of NumPy's values."""

    def make(values):
        made = TENSORS.array(values)
        if request.param == "rows" or made.ndim == 0:
            return made
        wide = torch.zeros(*made.shape, 2, dtype=made.dtype)
        wide[..., 1] = made
        return wide[..., 1]

    return make


def same(got: Any, expected: Any) -> bool:
    return TENSORS.same(got, expected)


SHAPES = [(), (1,), (3,), (5, 3), (70_001,)]


# ---- what each collective gives ----


@pytest.mark.parametrize("shape", SHAPES)
def test_all_reduce(me, n, done, tensor, shape):
    x = tensor(data(me, shape))
    done(dist.all_reduce, x)
    assert same(x, reduced("SUM", [data(r, shape) for r in range(n)]))


@pytest.mark.parametrize("op", OPS)
def test_all_reduce_of_every_dtype_by_every_operator(me, n, op):
    for dtype in TORCH_DTYPES:
        x = TENSORS.array(small(me, 7, dtype))
        floats = dtype.kind == "f" or dtype == BFLOAT16
        if floats if op in ("BAND", "BOR", "BXOR") else not floats and op == "AVG":
            with pytest.raises(RuntimeError, match=f"(?i){op}"):
                dist.all_reduce(x, getattr(dist.ReduceOp, op))
            continue
        dist.all_reduce(x, getattr(dist.ReduceOp, op))
        assert same(x, reduced(op, [small(r, 7, dtype) for r in range(n)])), dtype


def test_sparse_tensors_are_summed(me, n):
    for columns in ((), (2,)):
        x = torch.zeros(n + 1, 3, *columns)
        x[me], x[n, 1] = me + 1.0, 1.0
        expected = torch.zeros_like(x)
        for r in range(n):
            expected[r] = r + 1.0
        expected[n, 1] = n
        x = x.to_sparse(2)
        dist.all_reduce(x)
        assert torch.equal(x.to_dense(), expected)
    with pytest.raises(RuntimeError, match="sparse"):
        dist.all_reduce(x, dist.ReduceOp.MAX)
    dist.barrier()


def test_a_factor_multiplies_first(me, n):
    op = dist._make_nccl_premul_sum(0.5)
    x = torch.full((3,), float(me))
    dist.all_reduce(x, op)
    assert x.tolist() == [n * (n - 1) / 4] * 3


def test_complex_numbers(me, n):
    x = torch.tensor([1 + 2j, me * 1j])
    dist.all_reduce(x)
    assert x.tolist() == [n + 2j * n, 1j * n * (n - 1) / 2]
    everyone = [torch.zeros(2, dtype=x.dtype) for _ in range(n)]
    dist.all_gather(everyone, torch.tensor([me + 1j, 2]))
    assert [e.tolist() for e in everyone] == [[r + 1j, 2] for r in range(n)]


def test_all_reduce_coalesced(me, n, tensor):
    xs = [tensor(data(me, shape, seed=i)) for i, shape in enumerate(SHAPES)]
    dist.all_reduce_coalesced(xs)
    for i, (x, shape) in enumerate(zip(xs, SHAPES)):
        assert same(x, reduced("SUM", [data(r, shape, seed=i) for r in range(n)]))
    future = dist.all_reduce_coalesced(xs, op=dist.ReduceOp.MAX, async_op=True)
    assert [y is x for y, x in zip(future.wait(), xs)] == [True] * len(xs)


@pytest.mark.parametrize("shape", SHAPES)
def test_broadcast_from_every_root(me, n, done, tensor, shape):
    for root in range(n):
        x = tensor(data(me, shape))
        done(dist.broadcast, x, root)
        assert same(x, data(root, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_to_every_root(me, n, done, tensor, shape):
    for root in range(n):
        x = tensor(data(me, shape))
        done(dist.reduce, x, root, dist.ReduceOp.MAX)
        everyone = [data(r, shape) for r in range(n)]
        assert same(x, reduced("MAX", everyone) if me == root else data(me, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_all_gather(me, n, done, tensor, shape):
    out = [tensor(np.zeros(shape, np.float32)) for _ in range(n)]
    done(dist.all_gather, out, tensor(data(me, shape)))
    assert all(same(x, data(r, shape)) for r, x in enumerate(out))


def test_all_gather_of_uneven_tensors(me, n):
    out = [torch.zeros(r + 1) for r in range(n)]
    dist.all_gather(out, TENSORS.array(data(me, me + 1)))
    assert all(same(x, data(r, r + 1)) for r, x in enumerate(out))


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 3), (7001,)])
def test_all_gather_single(me, n, done, tensor, shape):
    for first in (n * shape[0],), (n, shape[0]):  # one after the other, and stacked
        out = tensor(np.zeros((*first, *shape[1:]), np.float32))
        done(dist.all_gather_single, out, tensor(data(me, shape)))
        expected = np.concatenate([data(r, shape) for r in range(n)]).reshape(out.shape)
        assert same(out, expected)


def test_all_gather_into_a_view_of_the_own_output_is_in_place(me, n):
    out = torch.full((n, 4), -1.0)
    out[me] = me
    before = out.data_ptr()
    dist.all_gather_single(out, out[me])
    assert out.tolist() == [[float(r)] * 4 for r in range(n)]
    rows = [*torch.full((n, 4), -1.0)]
    rows[me].fill_(me)
    dist.all_gather(rows, rows[me])
    assert [row.tolist() for row in rows] == [[float(r)] * 4 for r in range(n)]
    assert out.data_ptr() == before


def test_all_gather_coalesced(me, n, tensor):
    out = [[tensor(np.zeros(shape, np.float32)) for shape in SHAPES] for _ in range(n)]
    dist.all_gather_coalesced(out, [tensor(data(me, s, seed=i)) for i, s in enumerate(SHAPES)])
    for r in range(n):
        assert all(same(x, data(r, s, seed=i)) for i, (x, s) in enumerate(zip(out[r], SHAPES)))


@pytest.mark.parametrize("shape", SHAPES)
def test_gather_and_scatter_with_every_root(me, n, done, tensor, shape):
    for root in range(n):
        out = [tensor(np.zeros(shape, np.float32)) for _ in range(n)] if me == root else None
        done(dist.gather, tensor(data(me, shape)), out, dst=root)
        if out is not None:
            assert all(same(x, data(r, shape)) for r, x in enumerate(out))
        x = tensor(np.zeros(shape, np.float32))
        done(dist.scatter, x, out, src=root)
        assert same(x, data(me, shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_reduce_scatter(me, n, done, tensor, shape):
    x = tensor(np.zeros(shape, np.float32))
    done(dist.reduce_scatter, x, [tensor(data(me, shape, seed=i)) for i in range(n)])
    assert same(x, reduced("SUM", [data(r, shape, seed=me) for r in range(n)]))


@pytest.mark.parametrize("dtype", ["f", "l", BFLOAT16], ids=str)
def test_reduce_scatter_single(me, n, done, tensor, dtype):
    x = tensor(np.zeros((3, 2), dtype))
    done(dist.reduce_scatter_single, x, tensor(small(me, (3 * n, 2), dtype)), dist.ReduceOp.MAX)
    expected = reduced("MAX", [small(r, (3 * n, 2), dtype) for r in range(n)])
    assert same(x, expected[3 * me : 3 * me + 3])


def test_the_coalescing_manager(me, n):
    xs = [torch.full((i + 1,), float(me)) for i in range(3)]
    with dist._coalescing_manager():
        for x in xs:
            dist.all_reduce(x)
    assert [x.tolist() for x in xs] == [[n * (n - 1) / 2] * (i + 1) for i in range(3)]
    outs = [torch.zeros(n * 2) for _ in range(2)]
    with dist._coalescing_manager(async_ops=True) as manager:
        for i, out in enumerate(outs):
            dist.all_gather_single(out, torch.full((2,), 10.0 * i + me))
    manager.wait()
    for i, out in enumerate(outs):
        assert out.tolist() == [10.0 * i + r for r in range(n) for _ in range(2)]
    parts = [torch.zeros(2) for _ in range(2)]
    with dist._coalescing_manager():
        for part in parts:
            dist.reduce_scatter_single(part, torch.arange(2.0 * n))
    assert [p.tolist() for p in parts] == [[2.0 * me * n, (2.0 * me + 1) * n]] * 2
    with dist._coalescing_manager(device=torch.device("cpu"), async_ops=True) as manager:
        dist.broadcast(xs[0], 0, async_op=True)
        dist.broadcast(xs[1], n - 1, async_op=True)
    manager.wait()
    assert len(manager.works) == 1


@pytest.mark.parametrize("uneven", [False, True])
def test_all_to_all(me, n, done, tensor, uneven):
    def count(giver, taker):
        return giver + 2 * taker + 1 if uneven else 3

    out = [tensor(np.zeros(count(r, me), np.float32)) for r in range(n)]
    done(dist.all_to_all, out, [tensor(data(me, count(me, r), seed=r)) for r in range(n)])
    assert all(same(x, data(r, count(r, me), seed=me)) for r, x in enumerate(out))

    takes, gives = ([count(r, me) for r in range(n)], [count(me, r) for r in range(n)])
    rows = np.concatenate([data(me, (count(me, r), 2), seed=r) for r in range(n)])
    x = tensor(np.zeros((sum(takes), 2), np.float32))
    splits = (takes, gives) if uneven else (None, None)
    done(dist.all_to_all_single, x, tensor(rows), *splits)
    assert same(x, np.concatenate([data(r, (count(r, me), 2), seed=me) for r in range(n)]))


def test_barrier(n, done):
    done(lambda async_op: dist.barrier(async_op=async_op))
    dist.monitored_barrier()
    dist.monitored_barrier(timeout=timedelta(seconds=5), wait_all_ranks=True)


def test_objects(me, n):
    everyone = [None] * n
    dist.all_gather_object(everyone, {"rank": me})
    assert everyone == [{"rank": r} for r in range(n)]
    for root in range(n):
        got = [None] * n if me == root else None
        dist.gather_object("x" * me, got, dst=root)
        assert got is None or got == ["x" * r for r in range(n)]
        objs = [root, {"of": root}] if me == root else [None, None]
        dist.broadcast_object_list(objs, root)
        assert objs == [root, {"of": root}]
        mine: list[Any] = [None]
        dist.scatter_object_list(mine, [(root, r) for r in range(n)], root)
        assert mine == [(root, me)]


# ---- messages ----


@pytest.mark.mpi(min_size=2)
def test_send_and_recv_round_the_ring(me, n, tensor):
    right, left = (me + 1) % n, (me - 1) % n
    x = tensor(np.zeros((4, 3), np.float32))
    works = [dist.isend(tensor(data(me, (4, 3))), right, tag=7), dist.irecv(x, left, tag=7)]
    for work in works:
        work.wait()
    assert same(x, data(left, (4, 3)))
    assert works[1]._source_rank() == left
    x.zero_()
    ops = [
        dist.P2POp(dist.irecv, x, left),
        dist.P2POp(dist.isend, tensor(data(me, (4, 3))), right),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert same(x, data(left, (4, 3)))


@pytest.mark.mpi(min_size=2)
def test_recv_from_any(me, n):
    if me == 0:
        got = []
        for _ in range(n - 1):
            x = torch.zeros(3)
            sender = dist.recv(x)
            assert x.tolist() == [float(sender)] * 3
            got.append(sender)
        assert sorted(got) == list(range(1, n))
    else:
        dist.send(torch.full((3,), float(me)), 0)
    if me == 0:
        dist.send_object_list([{"a": 1}, "b"], 1)
    elif me == 1:
        objs: list[Any] = [None, None]
        assert dist.recv_object_list(objs, 0) == 0
        assert objs == [{"a": 1}, "b"]


# ---- Work ----


def test_a_future_holds_the_tensors_and_completes_without_a_wait(me, n):
    x = torch.ones(70_001)
    work = dist.all_reduce(x, async_op=True)
    future = work.get_future()
    ten = future.then(lambda f: f.value()[0] * 10)
    assert ten.wait()[0].item() == 10 * n
    assert future.done()
    assert future.value()[0] is x
    assert work.result()[0] is x
    until = time.monotonic() + 10
    work = dist.all_reduce(x, async_op=True)
    while not work.is_completed() and time.monotonic() < until:
        time.sleep(1e-3)
    assert work.is_success()
    assert work.exception() is None


def test_a_call_that_nobody_waits_for_goes_on(me, n, world):
    x = torch.ones(70_001)
    dist.all_reduce(x, async_op=True)  # dropped
    y = torch.ones(200_000)
    if n > 1:
        if me == 0:
            dist.isend(y * 7, 1)
        elif me == 1:
            dist.irecv(y, 0)
    until = time.monotonic() + 10
    while x[-1] != n or (me == 1 and y[-1] != 7):
        assert time.monotonic() < until, "it did not go on"
        time.sleep(1e-3)
    finish(world.Ibarrier())
    dist.barrier()


def strided(value=1.0):
    return torch.full((500, 4), value)[:, :2]


def test_a_strided_result_is_there_once_its_work_is_over(me, n):
    x = strided()
    work = dist.all_reduce(x, async_op=True)
    while not work.is_completed():
        pass
    assert (x == n).all()
    right, left = (me + 1) % n, (me - 1) % n
    coming = dist.irecv(x, left)
    sent = dist.isend(strided(float(me)), right)
    while not coming.is_completed():
        pass
    sent.wait()
    assert (x == left).all()


def test_a_strided_result_comes_though_its_work_was_dropped(me, n):
    x = strided()
    if me == 0:
        time.sleep(0.01)
    dist.all_reduce(x, async_op=True)
    dist.barrier()
    end = time.monotonic() + 20
    while not (x == n).all():
        assert time.monotonic() < end


@pytest.mark.mpi(min_size=2)
def test_a_call_takes_up_what_a_strided_result_of_an_earlier_one_is(me, n):
    whole = torch.ones(500, 4)
    x = whole[:, :2]
    if me == 0:
        time.sleep(0.01)
    works = [dist.all_reduce(x, async_op=True), dist.all_reduce(x, async_op=True)]
    row = torch.empty(n, 4)
    dist.all_gather_single(row, whole[3])
    for work in works:
        work.wait()
    assert (x == n * n).all()
    assert (row[:, :2] == n * n).all() and (row[:, 2:] == 1).all()


@pytest.mark.mpi(min_size=2)
def test_what_no_result_can_be_copied_to_is_refused_at_the_call(me, n):
    x = torch.zeros(1).expand(4) if me == 0 else torch.zeros(4)
    with pytest.raises(RuntimeError, match="strides"):
        dist.broadcast(x, n - 1)
    dist.barrier()


@pytest.mark.mpi(min_size=2)
def test_sparse_tensors_of_other_shapes_are_told_apart(me, n):
    x = torch.zeros(4 + me, 3)
    x[1] = 1.0
    with pytest.raises(RuntimeError, match=r"\[4, 3\]"):
        dist.all_reduce(x.to_sparse())
    dist.barrier()


def test_many_at_once(n):
    xs = [torch.full((1000,), float(i)) for i in range(50)]
    works = [dist.all_reduce(x, async_op=True) for x in xs]
    for work in reversed(works):
        work.wait()
    assert [x[-1].item() for x in xs] == [float(n * i) for i in range(50)]


def test_collectives_are_counted(world_group):
    before = world_group._get_sequence_number_for_group()
    dist.barrier()
    dist.all_reduce(torch.zeros(1))
    assert world_group._get_sequence_number_for_group() == before + 2


def test_the_methods_take_what_dist2_gives_them(world_group, me, n):
    x = torch.full((2,), float(me))
    world_group.allreduce(x, dist.ReduceOp.MAX, timedelta(seconds=5)).wait()
    assert x.tolist() == [n - 1.0] * 2
    world_group.broadcast(x, root=0).wait()
    outs = [torch.zeros(1) for _ in range(n)]
    world_group.allgather(outs, torch.tensor([float(me)]), timeout=timedelta(seconds=5)).wait()
    assert [out.item() for out in outs] == list(range(n))
    world_group.gather(outs if me == 0 else [], torch.tensor([2.0]), 0).wait()
    world_group.scatter(x, [torch.full((2,), 5.0 + r) for r in range(n)], root=0).wait()
    assert x.tolist() == [5.0 + me] * 2
    world_group.reduce_scatter(x, [torch.ones(2)] * n, dist.ReduceOp.SUM).wait()
    assert x.tolist() == [n, n]
    world_group.barrier(timedelta(seconds=5)).wait()


def test_the_flight_recorder_has_the_users_line(world_group):
    dist.all_reduce(torch.zeros(1))
    dist.all_reduce(torch.zeros(70_001))
    dist.barrier()
    calls = json.loads(world_group.dump())["calls"][-3:]
    assert {Path(call["file"]).name for call in calls} == {Path(__file__).name}, calls


# ---- groups ----


def test_groups_of_some_ranks_are_made_by_their_members(me, n):
    lists = [[0], list(range(n)), [0, n - 1], list(range(1, n))]
    for ranks in lists:
        ranks = sorted(set(ranks))
        if not ranks:
            continue
        group = dist.new_group(ranks)
        x = torch.full((3,), float(me))
        if me in ranks:
            assert dist.get_group_rank(group, me) == ranks.index(me)
            dist.all_reduce(x, group=group)
            assert x.tolist() == [float(sum(ranks))] * 3
            dist.broadcast(x, ranks[-1], group=group)
            dist.destroy_process_group(group)
        else:
            assert group == dist.GroupMember.NON_GROUP_MEMBER
    dist.barrier()


def test_a_group_over_another_backend_beside_it(me, n):
    gloo = dist.new_group(backend="gloo")
    x = torch.full((3,), float(me))
    dist.all_reduce(x, group=gloo)
    assert x.tolist() == [n * (n - 1) / 2] * 3
    out = torch.zeros(n)
    dist.all_gather_single(out, torch.tensor([float(me)]), group=gloo)
    assert out.tolist() == list(range(n))
    dist.barrier()
    dist.destroy_process_group(gloo)


def test_split_group(world_group, me, n):
    halves = [list(range(n // 2)), list(range(n // 2, n))]
    mine = next(ranks for ranks in halves if me in ranks)
    part = world_group.split_group(mine, timeout=timedelta(seconds=9), group_name=f"half{mine}")
    assert (part.size(), part.rank()) == (len(mine), mine.index(me))
    assert part.group_name == f"half{mine}"
    assert part.options._timeout == timedelta(seconds=9)
    x = torch.ones(2)
    part.allreduce(x).wait()
    assert x.tolist() == [len(mine)] * 2
    part.shutdown()


def test_a_group_ends_and_is_made_again(me, n):
    dist.destroy_process_group()
    assert not dist.is_initialized()
    dist.init_process_group("mpicoll", timeout=timedelta(seconds=GROUP_TIMEOUT))
    assert (dist.get_rank(), dist.get_world_size()) == (me, n)
    assert dist.get_backend() == "mpicoll"
    x = torch.ones(1)
    dist.all_reduce(x)
    assert x.item() == n


def test_rank_and_size_that_contradict_mpi_are_refused(me, n):
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=f"world_size is {n + 1}, but MPI says .* is {n}: start"):
        dist.init_process_group("mpicoll", world_size=n + 1, rank=me)
    with pytest.raises(ValueError, match="'mpicoll' alone, but got 'cpu:gloo,cuda:mpicoll'"):
        dist.init_process_group("cpu:gloo,cuda:mpicoll")
    store = dist.HashStore()
    with pytest.raises(ValueError, match=r"rank must be in range \[0, "):
        dist.init_process_group("mpicoll", store=store, rank=me + n, world_size=n)
    with pytest.raises(ValueError, match=f"as rank {me} of {n + 1}, but .* as rank {me} of {n}:"):
        dist.init_process_group("mpicoll", store=store, rank=me, world_size=n + 1)
    dist.init_process_group("mpicoll", store=store, rank=me, world_size=n)
    dist.barrier()
    dist.destroy_process_group()


def test_a_call_of_the_groups_own_as_a_future_of_pytorchs(me, n):
    group = dist.group.WORLD.mpicoll
    x = torch.full((3,), me + 1.0)
    future = future_of(group.allreduce(x))
    assert isinstance(future, torch._C.Future)  # as those of PyTorch's own works
    doubled = future.then(lambda f: f.value()[0] * 2)
    assert future.wait() == [x] and doubled.wait().tolist() == [n * (n + 1.0)] * 3
    if n > 1:
        future = future_of(group.allreduce(torch.ones(3 + me)))
        with pytest.raises(RuntimeError, match=r"float32\[4\]"):
            future.wait()


# ---- functional collectives, device meshes, DTensor ----


def test_functional_collectives(me, n):
    from torch.distributed import _functional_collectives as functional

    group = dist.group.WORLD
    x = torch.full((2, 2), float(me))
    assert (functional.all_reduce(x, "sum", group) + 0).tolist() == [[n * (n - 1) / 2] * 2] * 2
    assert (functional.broadcast(x, 0, group) + 0).tolist() == [[0.0] * 2] * 2
    gathered = functional.all_gather_single(x, 0, group) + 0
    assert gathered[:, 0].tolist() == [float(r) for r in range(n) for _ in range(2)]
    part = functional.reduce_scatter_single(torch.arange(2.0 * n), "sum", 0, group) + 0
    assert part.tolist() == [2.0 * me * n, (2.0 * me + 1) * n]
    swapped = functional.all_to_all_single(torch.arange(1.0 * n), None, None, group) + 0
    assert swapped.tolist() == [float(me)] * n
    both = functional.all_reduce_coalesced([x, x + 1], "max", group)
    assert [b.max().item() for b in both] == [n - 1, n]
    out = torch.empty(2 * n, 2)
    ops = torch.ops._c10d_functional
    ops.wait_tensor(ops.all_gather_into_tensor_out(x, n, group.group_name, out=out))
    assert torch.equal(out, gathered)


def test_gradients_go_through_collectives(me, n):
    from torch.distributed.nn import functional

    x = torch.full((3,), float(me), requires_grad=True)
    functional.all_reduce(x * 2).sum().backward()
    assert x.grad.tolist() == [2.0 * n] * 3
    x.grad = None
    torch.stack(functional.all_gather(x)).sum().backward()
    assert x.grad.tolist() == [float(n)] * 3
    x.grad = None
    functional.reduce_scatter(torch.empty(3), [x * (i + 1) for i in range(n)]).sum().backward()
    assert x.grad.tolist() == [n * (n + 1) / 2] * 3
    x.grad = None
    taken = functional.all_to_all(
        [torch.empty(3) for _ in range(n)], [x * (i + 1) for i in range(n)]
    )
    torch.stack(taken).sum().backward()
    assert x.grad.tolist() == [n * (n + 1) / 2] * 3


def test_dtensors_over_a_device_mesh(me, n):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (n,))
    whole = torch.arange(4.0 * n * 3).reshape(4 * n, 3)
    rows = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    assert torch.equal(rows.to_local(), whole[4 * me : 4 * me + 4])
    assert torch.equal(rows.redistribute(mesh, [Replicate()]).to_local(), whole)
    assert torch.equal((rows.t() @ rows).full_tensor(), whole.t() @ whole)
    assert isinstance(rows.sum(), DTensor)
    columns = rows.redistribute(mesh, [Shard(1)])
    assert torch.equal(columns.full_tensor(), whole)


# ---- errors through this door ----


@pytest.mark.mpi(min_size=2)
def test_a_mismatch_is_told_on_every_rank_and_leaves_the_group_usable(me, n):
    x = torch.ones(3 if me else 4)
    with pytest.raises(RuntimeError, match="rank.* 0.*4|4.*rank 0"):
        dist.all_reduce(x)
    assert x.tolist() == [1.0] * len(x)
    with pytest.raises(RuntimeError, match="MAX"):
        dist.all_reduce(x, dist.ReduceOp.MAX if me else dist.ReduceOp.SUM, async_op=True).wait()
    work = dist.broadcast(torch.ones(2), 1 if me else 0, async_op=True)
    with pytest.raises(RuntimeError, match="root"):
        work.get_future().wait()
    with pytest.raises(RuntimeError, match="root"):
        work.wait()
    assert isinstance(work.exception(), mc.CollectiveMismatchError)
    dist.barrier()


@pytest.mark.mpi(min_size=2)
def test_what_is_refused_is_told_to_the_peers(me, n):
    if me == 0:
        with pytest.raises(RuntimeError, match="sparse"):
            dist.broadcast(torch.ones(3).to_sparse(), 0)
    else:
        with pytest.raises(RuntimeError, match="rank 0.*sparse"):
            dist.broadcast(torch.ones(3), 0)
    dist.barrier()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("way", ["wait", "future", "sync", "monitored_barrier"])
def test_a_deadline_names_who_is_missing(world_group, me, n, world, way):
    world_group.set_timeout(LIMIT)
    assert world_group.options._timeout == LIMIT
    if me != n - 1:
        with pytest.raises(RuntimeError, match=rf"ranks \[{n - 1}\] have not arrived"):
            if way == "monitored_barrier":
                dist.monitored_barrier(timeout=LIMIT)
            elif way == "sync":
                dist.all_reduce(torch.ones(2))
            else:
                work = dist.all_reduce(torch.ones(2), async_op=True)
                (work.get_future() if way == "future" else work).wait()
        assert world_group.mpicoll.is_broken
        with pytest.raises(dist.DistBackendError):
            dist.barrier()
        with pytest.raises(RuntimeError, match="earlier failure"):
            dist.all_reduce(torch.ones(2))
    else:
        time.sleep(1.0)
        with pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(2))
    finish(world.Ibarrier())


@pytest.mark.mpi(min_size=2)
def test_a_group_whose_members_do_not_all_come_is_not_made(me, n):
    if me != n - 1:
        with pytest.raises(RuntimeError, match=rf"ranks \[{n - 1}\] have not called it in time"):
            dist.new_group(timeout=LIMIT)
    dist.barrier()


@pytest.mark.mpi(min_size=2)
def test_a_peers_abort_arrives_with_its_reason(world_group, me, n, world):
    if me == 0:
        world_group.mpicoll.abort("ran out of data")
    else:
        with pytest.raises(RuntimeError, match="rank 0.*ran out of data"):
            dist.all_reduce(torch.ones(70_001))
    finish(world.Ibarrier())


@pytest.mark.mpi(min_size=2)
def test_a_failure_in_the_backward_of_a_model_is_told_in_words(world_group, me, n, world):
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    world_group.set_timeout(LIMIT)
    loss = model(torch.ones(2, 4)).sum()
    if me != n - 1:
        with pytest.raises(RuntimeError, match=rf"ranks \[{n - 1}\] have not arrived"):
            loss.backward()
    else:
        time.sleep(1.0)
        with contextlib.suppress(RuntimeError):
            dist.barrier()
    finish(world.Ibarrier())
