"""The cases of torch's own `_dist2` test, with only the import line changed, on NumPy arrays and
torch CPU tensors; and every form in which torch's bindings take the arguments."""

from __future__ import annotations

import socket
from datetime import timedelta

import numpy as np
import pytest

import mpicoll as dist2

pytestmark = pytest.mark.mpi
LIMIT = timedelta(seconds=30)


@pytest.fixture
def device(kind):
    if kind.name == "numpy":
        return "cpu"
    import torch

    return torch.device("cpu")


@pytest.fixture
def group(device):
    pg = dist2.new_group(backend="gloo", timeout=timedelta(seconds=60), device=device)
    yield pg
    pg.shutdown()


@pytest.fixture
def ones(kind):
    """Make ten elements of one value."""
    return lambda value: kind.full(10, value)


@pytest.fixture
def holds(kind):
    return lambda array, value: kind.same(array, np.full(10, value, np.float32))


def test_context_manager(device):
    pg1 = dist2.new_group(backend="gloo", timeout=timedelta(seconds=60), device=device)
    pg2 = dist2.new_group("gloo", timedelta(seconds=60), device)
    assert dist2.current_process_group() is None
    with dist2.process_group(pg1):
        assert dist2.current_process_group() is pg1
        with dist2.process_group(pg2):
            assert dist2.current_process_group() is pg2
        assert dist2.current_process_group() is pg1
    assert dist2.current_process_group() is None
    pg1.shutdown()
    pg2.shutdown()


def test_allreduce(group, ones, holds):
    n, total = group.size(), group.size() * (group.size() + 1) / 2
    for call in (
        lambda t: group.allreduce(t, timeout=LIMIT),
        lambda t: group.allreduce(t, dist2.ReduceOp.SUM, LIMIT),
        lambda t: group.allreduce(tensor=t, op=dist2.ReduceOp.SUM, timeout=LIMIT),
        lambda t: group.allreduce([t], dist2.ReduceOp.SUM),
    ):
        t = ones(group.rank() + 1)
        assert call(t).wait()
        assert holds(t, total), n


def test_torchs_own_reduce_op(group, kind, ones, holds):
    if kind.name != "torch":
        pytest.skip("torch's ReduceOp comes with torch")
    import torch.distributed as dist

    t = ones(group.rank() + 1)
    group.allreduce(t, op=dist.ReduceOp.MAX).wait()
    assert holds(t, group.size())


def test_barrier(group):
    assert group.barrier(timeout=LIMIT).wait()
    assert group.barrier(LIMIT).wait(LIMIT)
    assert group.barrier().wait()


def test_broadcast(group, ones, holds):
    last = group.size() - 1
    for call in (
        lambda t: group.broadcast(t, root=last, timeout=LIMIT),
        lambda t: group.broadcast(t, last, LIMIT),
        lambda t: group.broadcast(tensor=t, root=last),
    ):
        t = ones(group.rank())
        call(t).wait()
        assert holds(t, last)


def test_allgather(group, ones, holds):
    for call in (
        lambda out, t: group.allgather(out, t, timeout=LIMIT),
        lambda out, t: group.allgather(output_tensors=out, input_tensor=t, timeout=LIMIT),
        lambda out, t: group.allgather([out], [t]),
    ):
        out = [ones(0) for _ in range(group.size())]
        call(out, ones(group.rank() + 1)).wait()
        assert all(holds(x, i + 1) for i, x in enumerate(out))


def test_gather(group, ones, holds):
    for call in (
        lambda out, t: group.gather(out, t, root=0, timeout=LIMIT),
        lambda out, t: group.gather(output_tensors=out, input_tensor=t, root=0),
        lambda out, t: group.gather(out, t, 0, LIMIT),
    ):
        out = [ones(0) for _ in range(group.size())] if group.rank() == 0 else []
        call(out, ones(group.rank() + 1)).wait()
        assert all(holds(x, i + 1) for i, x in enumerate(out))


def test_scatter(group, ones, holds):
    for call in (
        lambda out, t: group.scatter(out, t, root=0, timeout=LIMIT),
        lambda out, t: group.scatter(output_tensor=out, input_tensors=t, root=0),
        lambda out, t: group.scatter(out, t, 0, LIMIT),
    ):
        inp = [ones(i + 1) for i in range(group.size())] if group.rank() == 0 else []
        out = ones(0)
        call(out, inp).wait()
        assert holds(out, group.rank() + 1)


def test_reduce(group, ones, holds):
    for call in (
        lambda t: group.reduce(t, root=0, op=dist2.ReduceOp.SUM, timeout=LIMIT),
        lambda t: group.reduce(t, 0, dist2.ReduceOp.SUM, LIMIT),
        lambda t: group.reduce(tensor=t, root=0),
    ):
        t = ones(1)
        call(t).wait()
        assert holds(t, group.size() if group.rank() == 0 else 1)


def test_reduce_scatter(group, ones, holds):
    for call in (
        lambda out, t: group.reduce_scatter(out, t, op=dist2.ReduceOp.SUM, timeout=LIMIT),
        lambda out, t: group.reduce_scatter(output=out, input=t),
        lambda out, t: group.reduce_scatter(out, t, dist2.ReduceOp.SUM, LIMIT),
    ):
        out = ones(0)
        call(out, [ones(i + 1) for i in range(group.size())]).wait()
        assert holds(out, group.size() * (group.rank() + 1))


def test_all_to_all_single(group, kind, holds):
    n = group.size()
    splits = [10] * n
    for call in (
        lambda out, t: group.all_to_all_single(out, t, splits, splits, timeout=LIMIT),
        lambda out, t: group.all_to_all_single(out, t, [], [], LIMIT),
        lambda out, t: group.all_to_all_single(
            output=out, input=t, output_split_sizes=splits, input_split_sizes=splits
        ),
    ):
        out = kind.full(n * 10, 0)
        call(out, kind.full(n * 10, group.rank() + 1)).wait()
        assert all(holds(out[i * 10 : i * 10 + 10], i + 1) for i in range(n))


def test_split(group, device):
    subgroup = group.split_group([0], timeout=LIMIT, group_name="subgroup_1")
    if group.rank() == 0:
        assert subgroup.size() == 1
        assert subgroup._get_backend(device).options._timeout == LIMIT
        assert subgroup.group_name == "subgroup_1"
    else:
        assert subgroup is None


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("store", ["TCPStore", "FileStore", "torch TCPStore", "torch FileStore"])
def test_remote_merge(group, kind, device, ones, holds, store, world, folder):
    last = group.size() - 1
    lists = [list(range(last)), [last]]
    sides = [group.split_group(ranks, timeout=LIMIT) for ranks in lists]
    mine = sides[0] if group.rank() < last else sides[1]
    module = dist2
    if store.startswith("torch"):
        module = pytest.importorskip("torch.distributed", reason="torch is not installed")
    if store.endswith("TCPStore"):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = world.bcast(probe.getsockname()[1])
        shared = module.TCPStore(
            host_name="127.0.0.1",
            port=port,
            world_size=group.size(),
            is_master=group.rank() == 0,
        )
    elif module is dist2:
        shared = dist2.FileStore(str(folder))
    else:
        shared = module.FileStore(str(folder / "torch"), group.size())
    merged = mine.merge_remote_group(shared, group.size(), timedelta(seconds=40), "merged_pg")
    assert merged.size() == group.size()
    assert merged._get_backend(device).options._timeout == timedelta(seconds=40)
    assert merged.group_name == "merged_pg"
    t = ones(merged.rank() + 1)
    merged.allreduce(t).wait()
    assert holds(t, group.size() * (group.size() + 1) / 2)
    group.barrier().wait()  # nobody takes the store away before all have used it
