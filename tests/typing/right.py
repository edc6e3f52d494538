"""Programs that are right: no line of this may be an error for mypy or pyright."""

from __future__ import annotations

import array
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, overload

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

import mpicoll as mc
from mpicoll.typing import Array, Arrays, Op


class Tensor:
    """As PyTorch's and JAX's are."""

    def __dlpack__(self, *, stream: int | None = None, copy: bool | None = None) -> object: ...

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


class OnGpu:
    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {}


class TCPStore:
    """As torch.distributed's stores are."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        return b""

    def add(self, key: str, value: int) -> int:
        return value

    @overload
    def wait(self, keys: list[str]) -> None: ...

    @overload
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None: ...


class RedOpType:
    """As torch.distributed's members are."""

    name = "SUM"
    value = 0


def simple(store: Any, rank: int, size: int, timeout: timedelta, device: object) -> list[int]:
    """A factory without options."""
    return [rank]


def optional(
    store: Any, rank: int, world_size: int, timeout: timedelta, device: Any, **options: Any
) -> mc.ProcessGroup:
    return mc.new_group("mpi", timeout)


mc.register_backend("simple", simple)
mc.register_backend("optional", optional)


def groups(name: str, ranks: list[int], color: int | None, store: mc.FileStore) -> None:
    mc.new_group()
    mc.new_group("mpi", 60, "cuda:0", checks="node", progress="thread")
    mc.new_group("nccl", timedelta(minutes=1), checks="first", group_name="all")
    mc.new_group(name, speed=3, colour="red")  # a backend of one's own
    mc.new_group(comm=MPI.COMM_WORLD.Split(0))
    with mc.new_group(timeout=0.5) as pg, pg.split(True) as half:
        part: mc.ProcessGroup | None = pg.split(color, key=-1)
        none: None = pg.split(None)
        other = pg.split_group(ranks) or half
        three: list[mc.ProcessGroup] = [half, other, pg.subgroup(range(2)), pg.local_group(5)]
        three += [pg.cross_node_group(), pg.shrink_group([1]), pg.spawn(["worker"], 2)]
        three += [pg.merge_remote_group(store, 4, timedelta(seconds=1)), mc.parent_group(30)]
        pg.set_timeout(None)
    del part, none
    mc.join_world(store, rank=0, size=2, timeout=timedelta(minutes=1))
    mc.join_world(TCPStore(), 0, 2)
    mc.new_group().merge_remote_group(TCPStore(), 2)
    mc.PrefixStore("run 1", TCPStore())


def collectives(pg: mc.ProcessGroup, x: NDArray[np.float32], rows: list[NDArray[Any]]) -> None:
    rank, size = pg.rank(), pg.size()
    root: int | np.intp = np.argmin(x)
    works = [
        pg.allreduce(x),
        pg.allreduce(x, mc.ReduceOp.MAX, 30),
        pg.allreduce([x], op=mc.ReduceOp.PREMUL_SUM(0.5), timeout=timedelta(seconds=3)),
        pg.allreduce(Tensor(), RedOpType()),
        pg.allreduce(OnGpu(), timeout=None),
        pg.broadcast(bytearray(8), root),
        pg.broadcast(array.array("d", [1.0]), root=0),
        pg.reduce(x, 0, mc.ReduceOp.MIN),
        pg.barrier(30),
        pg.allgather(rows, x),
        pg.allgather(list(np.empty((size, 3))), x),
        pg.allgather([Tensor(), Tensor()], Tensor()),
        pg.all_gather_single(np.empty(size), np.ones(1)),
        pg.gather(rows if rank == 0 else None, x, root=0),
        pg.gather([], x, 0),
        pg.scatter(x, np.ones((size, 3)) if rank == 0 else None, root=0),
        pg.reduce_scatter(x, rows, mc.ReduceOp.SUM),
        pg.reduce_scatter_single(x, np.ones(size * 3)),
        pg.alltoall(np.empty((size, 3)), rows),
        pg.all_to_all_single(x, x.copy(), [1, 2], np.array([2, 1])),
        pg.scan(x),
        pg.exscan(x, mc.ReduceOp.PRODUCT),
        pg.allreduce_coalesced([x, rows[0]]),
        pg.allgather_coalesced([[x], [x]], [x]),
        pg.all_gather_single_coalesced([x], (x,)),
        pg.reduce_scatter_single_coalesced([x], [x], mc.ReduceOp.AVG),
        pg.send(b"words", rank + 1, tag=1),
        pg.send(x, mc.PROC_NULL),
        pg.recv(x),
        pg.recv(x, mc.ANY_SOURCE, timeout=3),
        pg.recv_anysource(x, 1),
    ]
    mc.wait_all(works, timeout=60)
    ended: bool = works[0].wait(timedelta(seconds=1)) and works[0].is_completed()
    first: Any = works[0].result()[0]
    first += 1
    source: int | mc.ProcessGroup | Any = works[-1].source_rank()
    works[0].get_future().then(lambda future: future.value()).add_done_callback(print)
    del ended, source
    found = pg.probe(tag=3)
    if found is not None:
        pg.recv(np.empty(found.count, found.dtype), found.source, found.tag).wait()


def objects(pg: mc.ProcessGroup, words: Sequence[str]) -> None:
    rate: float = pg.broadcast_object({"rate": 0.1} if pg.rank() == 0 else None, root=0)["rate"]
    names: list[str] = pg.allgather_object("me")
    gathered: list[int] | None = pg.gather_object(pg.rank(), root=0, timeout=5)
    word: str = pg.scatter_object(words if pg.rank() == 0 else None, 0)
    any_word: str = pg.scatter_object(None, 0)
    del rate, names, gathered, word, any_word


def arrays(pg: mc.ProcessGroup) -> None:
    a: NDArray[np.float32] = pg.empty(3)
    b: NDArray[np.float64] = pg.empty((3, 4), np.float64)
    c: NDArray[np.int8] = pg.empty([3], np.dtype(np.int8), timeout=3)
    d: NDArray[Any] = pg.empty(np.int64(3), "f8")
    pg.allreduce(a + b[0, :3] + c + d)


def mean(pg: mc.ProcessGroup, x: Array, rows: Arrays, op: Op) -> None:
    """A wrapper of one's own."""
    pg.allreduce(x, op).wait()
    pg.allgather(rows, x).wait()


async def awaited(pg: mc.ProcessGroup) -> None:
    done: bool = await pg.barrier()
    del done
