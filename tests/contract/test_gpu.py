"""The contract on a real GPU: CuPy arrays and torch CUDA tensors, streams, a deadline.

The ranks may share one GPU.  Where there is none the whole module is skipped, with the reason.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.errors import CollectiveTimeoutError, GroupBrokenError, UnsupportedError
from mpicoll.transports.cuda.gpu import load_cupy
from tests.contract.arrays import BFLOAT16, Array, Kind, Torch, data, reduced
from tests.contract.conftest import _groups, meet
from tests.contract.on_gpus import *  # noqa: F403
from tests.contract.test_dtypes import (  # noqa: F401
    test_every_pair_is_right_or_refused,
    test_nan_wins_with_the_same_bits_everywhere,
    test_the_other_reductions_agree_with_allreduce,
)
from tests.contract.test_dtypes import (
    test_half_precision_is_rounded_once as half_precision_is_rounded_once,
)
from tests.contract.test_p2p import (  # noqa: F401
    test_any_source,
    test_tags_are_told_apart_whatever_the_order,
)

pytestmark = [pytest.mark.mpi, pytest.mark.gpu]

try:
    cupy = load_cupy()
    if not cupy.cuda.runtime.getDeviceCount():
        pytest.skip("no test on a GPU: CUDA finds none", allow_module_level=True)
except UnsupportedError as error:
    pytest.skip(f"no test on a GPU: {error}", allow_module_level=True)
except cupy.cuda.runtime.CUDARuntimeError as error:
    pytest.skip(f"no test on a GPU: {error}", allow_module_level=True)


class OnGpu(Kind):
    nccl = False  # whether NCCL moves it, which rounds sums of bfloat16 more than once

    def holds(self, dtype: Any) -> bool:
        dtype = np.dtype(dtype)
        return dtype.char not in "gG" and not (dtype == BFLOAT16 and self.nccl)

    def fill(self, array: Any, values: Array) -> None:
        array[...] = self.array(values)


class CuPy(OnGpu):
    name = "cupy"

    def holds(self, dtype: Any) -> bool:
        return super().holds(dtype) and np.dtype(dtype) != BFLOAT16

    def array(self, values: Array) -> Any:
        return cupy.asarray(values)

    def numpy(self, array: Any) -> Array:
        return np.asarray(cupy.asnumpy(array))


class CudaTensors(OnGpu, Torch):
    name = "torch-cuda"

    def require(self) -> None:
        super().require()
        if not importlib.import_module("torch").cuda.is_available():
            pytest.skip("this torch has no CUDA")

    def array(self, values: Array) -> Any:
        return super().array(values).cuda()

    def numpy(self, array: Any) -> Array:
        return super().numpy(array.cpu())


KINDS = (CuPy(), CudaTensors())


BACKENDS = ("staged", "nccl", "mpi")


def made(request: pytest.FixtureRequest, make: Callable[..., mc.ProcessGroup]) -> mc.ProcessGroup:
    """A group on this rank's GPU, which becomes the current one."""
    try:
        pg = make(backend=request.param, device="cuda")
    except UnsupportedError as error:  # on all ranks: they share a GPU, or MPI isn't CUDA-aware
        pytest.skip(str(error))
    cupy.cuda.Device(int(pg.device.partition(":")[2])).use()
    return pg


@pytest.fixture(params=BACKENDS)
def pg(request) -> mc.ProcessGroup:
    return made(request, _groups)


@pytest.fixture(params=BACKENDS)
def fresh(request) -> Iterator[mc.ProcessGroup]:
    pg = made(request, partial(mc.new_group, timeout=20))
    yield pg
    pg.abort()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request, pg) -> Kind:
    request.param.require()
    request.param.nccl = pg.name() == "nccl"
    return request.param


@pytest.mark.parametrize("dtype", ["e", BFLOAT16], ids=str)
def test_half_precision_is_rounded_once(pg, kind, dtype):
    if pg.name() == "nccl":
        pytest.skip("NCCL rounds at each step")
    half_precision_is_rounded_once(pg, kind, dtype)


def test_groups_made_out_of_it_stay_on_its_gpu(fresh):
    with fresh.local_group() as near:
        assert near.device == fresh.device and near.name() == fresh.name()
        x = cupy.ones(5, np.float32)
        near.allreduce(x).wait()
        assert (x == near.size()).all()


@pytest.mark.limit(300)
def test_no_race_with_the_streams_of_the_user(pg):
    """Compute on a side stream, a collective, compute; arrays are dropped as soon as can be."""
    n, count = pg.size(), 100_003
    wrong = cupy.zeros((), np.int64)
    cupy.cuda.Device().synchronize()  # or `side` might count before it is zero
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        for i in range(1000):
            x = cupy.full(count, -1, np.float32)
            for _ in range(5):
                x += 1
            x += pg.rank() + i % 7 - 4
            pg.allreduce(x).wait()
            y = x * 2
            del x
            wrong += (y != 2 * (n * (n - 1) // 2 + n * (i % 7))).sum()
    side.synchronize()
    assert int(wrong) == 0


def test_no_race_with_the_streams_of_torch(pg):
    CudaTensors().require()
    torch = importlib.import_module("torch")
    n, side = pg.size(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(300):
            x = torch.full((100_003,), float(pg.rank()), device="cuda")
            x.mul_(2).add_(i % 7)
            pg.allreduce(x).wait()
            wrong += (x != n * (n - 1) + n * (i % 7)).sum()
    side.synchronize()
    assert int(wrong) == 0


def test_parts_of_it_in_another_order(fresh):
    """Made by NCCL's own split, where that moves the group."""
    members = [*range(fresh.size())][::-1][: max(1, fresh.size() - 1)]
    x = cupy.full(100_003, fresh.rank() + 1, np.float32)
    fresh.allreduce(x).wait()
    part = fresh.split_group(members)
    if part is not None:
        assert part.name() == fresh.name() and part.rank() == members.index(fresh.rank())
        y = cupy.full(100_003, fresh.rank() + 1, np.float32)
        part.allreduce(y).wait()
        part.broadcast(x, 0).wait()
        assert (y == sum(r + 1 for r in members)).all()
        part.shutdown()
    n = fresh.size()
    assert (x == n * (n + 1) // 2).all()


def test_a_rank_that_never_comes(fresh, world):
    """The others get the error in time, and the GPU is free."""
    if world.size == 1:
        pytest.skip("needs two ranks")
    absent = world.size - 1
    begin = time.monotonic()
    if world.rank != absent:
        x = cupy.ones(1 << 20, np.float32)
        with pytest.raises(CollectiveTimeoutError, match=rf"ranks \[{absent}\] have not arrived"):
            fresh.allreduce(x, timeout=0.5).wait()
        assert time.monotonic() - begin < 5
        cupy.cuda.Device().synchronize()
        assert (x == 1).all()
        with pytest.raises(GroupBrokenError):
            fresh.barrier()


def alone(call, seq):
    """Meet nobody."""
    yield from ()
    return False


def test_a_rank_that_comes_to_nccl_and_stops(fresh, world):
    """A call that is enqueued here only: the watchdog aborts it, and the GPU is free again."""
    if fresh.name() != "nccl" or world.size == 1:
        pytest.skip("needs NCCL and two ranks")
    x = cupy.ones(1 << 20, np.float32)
    fresh.allreduce(x).synchronize()  # NCCL connects in the first call, which blocks the host
    if world.rank == 0:  # as if the others' part had been lost
        fresh._caller.arrival.meet = alone
        fresh.allreduce(x, timeout=1).wait()
        cupy.cuda.Device().synchronize()  # returns, since the communicator is aborted
        with pytest.raises(GroupBrokenError):
            fresh.barrier()


def of_nccl(pg: mc.ProcessGroup) -> mc.ProcessGroup:
    if pg.name() != "nccl":
        pytest.skip("for NCCL")
    return pg


def test_a_graph_of_cupy(fresh):
    """Captured once, launched three times; NCCL connects before."""
    n, stream = of_nccl(fresh).size(), cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.zeros(100_003, np.float32)
        x *= 2
        x += 1
        fresh.allreduce(x).synchronize()
        x.fill(1)
        stream.synchronize()
        stream.begin_capture()
        x *= 2
        fresh.allreduce(x).wait()
        x += 1
        graph = stream.end_capture()
        value = 1
        for _ in range(3):
            graph.launch(stream)
            value = value * 2 * n + 1
        stream.synchronize()
        assert (x == value).all()
        fresh.allreduce(x).synchronize()  # the group goes on
        assert (x == n * value).all()


def test_a_graph_of_torch(fresh):
    n = of_nccl(fresh).size()
    CudaTensors().require()
    torch = importlib.import_module("torch")
    x = torch.zeros(100_003, device="cuda")
    fresh.allreduce(x).synchronize()
    x.fill_(1)
    torch.cuda.synchronize()
    graph, value = torch.cuda.CUDAGraph(), 1
    with torch.cuda.graph(graph):
        x.mul_(2)
        fresh.allreduce(x).wait()
        x.add_(1)
    for _ in range(3):
        graph.replay()
        value = value * 2 * n + 1
    torch.cuda.synchronize()
    assert (x == value).all()


def test_what_the_host_takes_part_in_cant_be_captured(fresh):
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x = cupy.ones(5, np.float32)
        stream.begin_capture()
        with pytest.raises(UnsupportedError, match="can't be captured in a CUDA graph"):
            fresh.allreduce(x, mc.ReduceOp.MAX)
        stream.end_capture()
        fresh.allreduce(x, mc.ReduceOp.MAX).wait()
        assert (x == 1).all()


def test_the_host_runs_ahead(world):
    """checks="first": nobody waits for the peers, and the sums are right."""
    try:
        pg = mc.new_group("nccl", timeout=20, device="cuda", checks="first")
    except UnsupportedError as error:
        pytest.skip(str(error))
    with pg:  # a rank that fails lets go of the GPU, and tells the others
        cupy.cuda.Device(int(pg.device.partition(":")[2])).use()
        arrays = [cupy.full(1000, pg.rank() + i, np.float32) for i in range(300)]
        pg.allreduce(arrays[0]).wait()
        if world.rank == 0:
            for x in arrays[1:101]:
                pg.allreduce(x).wait()
        meet(world)
        for x in arrays[1 if world.rank else 101 :]:
            pg.allreduce(x).wait()
        n = pg.size()
        assert all((x == n * (n - 1) // 2 + n * i).all() for i, x in enumerate(arrays))


def test_both_memories_in_turn(pg):
    parts = [data(r, 20_000) for r in range(pg.size())]
    for _ in range(3):
        x, y = cupy.asarray(parts[pg.rank()]), parts[pg.rank()].copy()
        pg.allreduce(x).wait()
        pg.allreduce(y).wait()
        assert (cupy.asnumpy(x) == y).all() and (y == reduced("SUM", parts)).all()
