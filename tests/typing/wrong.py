"""Programs that are wrong: each line with a mark is an error of that code, and no other line is."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

import mpicoll as mc


def groups(pg: mc.ProcessGroup, color: int | None) -> None:
    mc.new_group(checks="nodes")  # E: call-overload
    mc.new_group(progress="threads")  # E: call-overload
    mc.new_group(timeout="soon")  # E: call-overload
    mc.new_group(device=0)  # E: call-overload
    mc.new_group(timeout=60, check="node")  # E: call-overload
    mc.new_group(checks=1)  # E: call-overload
    mc.new_group("mpi", comm="world")  # E: call-overload
    mc.parent_group("soon")  # E: arg-type
    mc.register_backend("mine", lambda store, rank: pg)  # E: arg-type
    mc.join_world("store", 0, 1)  # E: arg-type
    pg.set_timeout("soon")  # E: arg-type
    pg.split("red")  # E: call-overload
    pg.split(color).rank()  # E: union-attr
    pg.split_group("01")  # E: arg-type
    pg.split_group([0]).rank()  # E: union-attr
    pg.subgroup(3)  # E: arg-type
    pg.shrink_group(1)  # E: arg-type
    pg.merge_remote_group("store", 2)  # E: arg-type
    pg.spawn([1], 2)  # E: list-item


def collectives(pg: mc.ProcessGroup, x: NDArray[np.float32]) -> None:
    pg.allreduce("sum")  # E: arg-type
    pg.allreduce(3.0)  # E: arg-type
    pg.allreduce(np.float64(3))  # E: arg-type
    pg.allreduce([1.0, 2.0])  # E: list-item list-item
    pg.allreduce(None)  # E: arg-type
    pg.allreduce(x, "sum")  # E: arg-type
    pg.allreduce(x, op="sum")  # E: arg-type
    pg.allreduce(x, op=sum)  # E: arg-type
    pg.allreduce(x, op=np.add)  # E: arg-type
    pg.allreduce(x, timeout="soon")  # E: arg-type
    pg.allreduce(x, root=0)  # E: call-arg
    pg.broadcast(x)  # E: call-arg
    pg.broadcast(x, "0")  # E: arg-type
    pg.broadcast(x, mc.ANY_SOURCE)  # E: arg-type
    pg.reduce(x, 0.5)  # E: arg-type
    pg.barrier("soon")  # E: arg-type
    pg.allgather("rows", x)  # E: arg-type
    pg.gather(x, None, 0)  # E: arg-type
    pg.scatter(None, [x], 0)  # E: arg-type
    pg.reduce_scatter(x, [1.0])  # E: arg-type
    pg.all_to_all_single(x, x, [0.5])  # E: list-item
    pg.scan(x, mc.ReduceOp)  # E: arg-type
    pg.allreduce_coalesced(3)  # E: arg-type
    pg.send(x, "next")  # E: arg-type
    pg.recv(x, None)  # E: arg-type
    pg.recv(x, 0, tag="a")  # E: arg-type
    pg.monitored_barrier(timeout="soon")  # E: arg-type
    mc.ReduceOp.PREMUL_SUM("2")  # E: arg-type


def works(pg: mc.ProcessGroup, x: NDArray[np.float32]) -> None:
    pg.allreduce(x).wait("soon")  # E: arg-type
    pg.allreduce(x).done()  # E: operator
    mc.wait_all(pg.barrier())  # E: arg-type
    mc.wait_all([pg.barrier()], "soon")  # E: arg-type
    y: NDArray[np.float32] = pg.allreduce(x)  # E: assignment
    del y


def results(pg: mc.ProcessGroup) -> None:
    a: str = pg.empty(3)  # E: assignment
    made = pg.empty(3, np.float64)
    b: NDArray[np.int8] = made  # E: assignment
    pg.empty("three")  # E: arg-type
    c: list[int] = pg.allgather_object("me")  # E: arg-type
    d: int = pg.gather_object(3, 0)  # E: assignment
    pg.gather_object(3, 0)[0]  # E: index
    e: str = pg.split(0)  # E: assignment
    f: str = mc.new_group()  # E: assignment
    g: str = pg.split(None)  # E: assignment
    del a, b, c, d, e, f, g
