"""Every collective as a trial: a call that is ready to be made, and what NumPy says of it.

A trial is made by a function of the group and of a number of float32 elements: what each rank
hands in, all its pieces together.  The elements are small integers, so that sums are exact and
equality means equality.  List forms get pieces of unequal length wherever the number does not
divide evenly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.ops import ReduceOp
from ..groups.group import ProcessGroup

Array = npt.NDArray[np.float32]


@dataclass
class Trial:
    """One call: `call` makes it and waits, then `got` must equal `want`."""

    call: Callable[[], object]
    want: list[Any]
    got: list[Any] = field(default_factory=list)

    def agrees(self) -> bool:
        """Say whether everything that came out is what NumPy computed."""
        return len(self.got) == len(self.want) and all(map(same, self.got, self.want))


Maker = Callable[[ProcessGroup, int], Trial]
TRIALS: dict[str, Maker] = {}


def trial(name: str) -> Callable[[Maker], Maker]:
    """Enter a function into `TRIALS` under a name."""

    def enter(maker: Maker) -> Maker:
        TRIALS[name] = maker
        return maker

    return enter


def disagreeing(pg: ProcessGroup, count: int) -> list[str]:
    """Make every trial; return the names of those that don't agree on this rank."""
    wrong = []
    for name, make in TRIALS.items():
        trial = make(pg, count)
        trial.call()
        if not trial.agrees():
            wrong.append(name)
    return wrong


def same(got: object, want: object) -> bool:
    """Compare two results; arrays must have equal shapes, types and elements."""
    if not isinstance(want, np.ndarray):
        return got == want
    if not isinstance(got, np.ndarray) or got.dtype != want.dtype:
        return False
    return np.array_equal(got, want)


def data(rank: int, count: int) -> Array:
    """Return the array that a rank hands in: different on every rank and at every index."""
    return (np.arange(count) % 61 + 3 * rank).astype(np.float32)


def all_data(pg: ProcessGroup, count: int) -> list[Array]:
    return [data(rank, count) for rank in range(pg.size())]


def even(pg: ProcessGroup, count: int) -> int:
    """Round a count down to a multiple of the group's size, for what can't be split unevenly."""
    return max(count - count % pg.size(), pg.size())


def blank(likes: list[Array]) -> list[Array]:
    """Return arrays to be written, of the given shapes and full of what nobody sends."""
    return [np.full_like(like, -1) for like in likes]


# ---------------------------------------------------------------------------------- reductions


def reduction(name: str, op: ReduceOp, expected: Callable[[list[Array]], Array]) -> None:
    @trial(f"allreduce {name}")
    def make(pg: ProcessGroup, count: int) -> Trial:
        x = data(pg.rank(), count)
        call = lambda: pg.allreduce(x, op=op).wait()  # noqa: E731
        return Trial(call, [expected(all_data(pg, count))], [x])


reduction("SUM", ReduceOp.SUM, lambda arrays: np.sum(arrays, axis=0))
reduction("AVG", ReduceOp.AVG, lambda arrays: np.sum(arrays, axis=0) / np.float32(len(arrays)))
reduction("MIN", ReduceOp.MIN, lambda arrays: np.min(arrays, axis=0))
reduction("MAX", ReduceOp.MAX, lambda arrays: np.max(arrays, axis=0))
reduction(
    "PREMUL_SUM", ReduceOp.PREMUL_SUM(0.5), lambda arrays: np.sum(arrays, axis=0) / np.float32(2)
)


@trial("allreduce PRODUCT")
def _product(pg: ProcessGroup, count: int) -> Trial:
    factors = [1 + array % 2 for array in all_data(pg, count)]  # powers of two stay exact
    x = factors[pg.rank()].copy()
    return Trial(
        lambda: pg.allreduce(x, op=ReduceOp.PRODUCT).wait(), [np.prod(factors, axis=0)], [x]
    )


def bitwise(name: str, op: ReduceOp, expected: np.ufunc) -> None:
    @trial(f"allreduce {name}")
    def make(pg: ProcessGroup, count: int) -> Trial:
        words = [array.astype(np.uint32) for array in all_data(pg, count)]
        x = words[pg.rank()].copy()
        call = lambda: pg.allreduce(x, op=op).wait()  # noqa: E731
        return Trial(call, [expected.reduce(words)], [x])


bitwise("BAND", ReduceOp.BAND, np.bitwise_and)
bitwise("BOR", ReduceOp.BOR, np.bitwise_or)
bitwise("BXOR", ReduceOp.BXOR, np.bitwise_xor)


@trial("allreduce_coalesced")
def _allreduce_coalesced(pg: ProcessGroup, count: int) -> Trial:
    xs = np.array_split(data(pg.rank(), count), 3)
    total = np.sum(all_data(pg, count), axis=0)
    return Trial(lambda: pg.allreduce_coalesced(xs).wait(), np.array_split(total, 3), xs)


@trial("reduce")
def _reduce(pg: ProcessGroup, count: int) -> Trial:
    x, root = data(pg.rank(), count), pg.size() - 1
    want = np.sum(all_data(pg, count), axis=0) if pg.rank() == root else x.copy()
    return Trial(lambda: pg.reduce(x, root).wait(), [want], [x])


@trial("reduce_scatter")
def _reduce_scatter(pg: ProcessGroup, count: int) -> Trial:
    pieces = np.array_split(data(pg.rank(), count), pg.size())
    want = np.array_split(np.sum(all_data(pg, count), axis=0), pg.size())[pg.rank()]
    (out,) = blank([want])
    return Trial(lambda: pg.reduce_scatter(out, pieces).wait(), [want], [out])


@trial("reduce_scatter_single")
def _reduce_scatter_single(pg: ProcessGroup, count: int) -> Trial:
    count = even(pg, count)
    x = data(pg.rank(), count)
    want = np.split(np.sum(all_data(pg, count), axis=0), pg.size())[pg.rank()]
    (out,) = blank([want])
    return Trial(lambda: pg.reduce_scatter_single(out, x).wait(), [want], [out])


@trial("reduce_scatter_single_coalesced")
def _reduce_scatter_single_coalesced(pg: ProcessGroup, count: int) -> Trial:
    count = even(pg, count // 2)
    xs = [data(pg.rank(), count), data(pg.rank() + 1, count)]
    totals = [sum(data(rank + i, count) for rank in range(pg.size())) for i in (0, 1)]
    want = [np.split(np.asarray(total), pg.size())[pg.rank()] for total in totals]
    outs = blank(want)
    return Trial(lambda: pg.reduce_scatter_single_coalesced(outs, xs).wait(), want, outs)


@trial("scan")
def _scan(pg: ProcessGroup, count: int) -> Trial:
    x = data(pg.rank(), count)
    return Trial(
        lambda: pg.scan(x).wait(), [np.sum(all_data(pg, count)[: pg.rank() + 1], axis=0)], [x]
    )


@trial("exscan")
def _exscan(pg: ProcessGroup, count: int) -> Trial:
    x = data(pg.rank(), count)
    before = all_data(pg, count)[: pg.rank()]
    want = np.sum(before, axis=0) if before else x.copy()  # rank 0 has none before it
    return Trial(lambda: pg.exscan(x).wait(), [want], [x])


# --------------------------------------------------------------------------------- data movement


@trial("broadcast")
def _broadcast(pg: ProcessGroup, count: int) -> Trial:
    x, root = data(pg.rank(), count), pg.size() - 1
    return Trial(lambda: pg.broadcast(x, root).wait(), [data(root, count)], [x])


@trial("allgather")
def _allgather(pg: ProcessGroup, count: int) -> Trial:
    want = [data(rank, count + rank) for rank in range(pg.size())]
    outs = blank(want)
    return Trial(lambda: pg.allgather(outs, want[pg.rank()]).wait(), want, outs)


@trial("allgather_coalesced")
def _allgather_coalesced(pg: ProcessGroup, count: int) -> Trial:
    xs = np.array_split(data(pg.rank(), count), 2)
    halves = [np.array_split(array, 2) for array in all_data(pg, count)]
    want = [half for pair in halves for half in pair]
    outs = [blank(pair) for pair in halves]  # indexed by rank, then by tensor
    flat = [half for pair in outs for half in pair]
    return Trial(lambda: pg.allgather_coalesced(outs, xs).wait(), want, flat)


@trial("all_gather_single")
def _all_gather_single(pg: ProcessGroup, count: int) -> Trial:
    want = np.concatenate(all_data(pg, count))
    (out,) = blank([want])
    return Trial(lambda: pg.all_gather_single(out, data(pg.rank(), count)).wait(), [want], [out])


@trial("all_gather_single_coalesced")
def _all_gather_single_coalesced(pg: ProcessGroup, count: int) -> Trial:
    xs = np.array_split(data(pg.rank(), count), 2)
    halves = [np.array_split(array, 2) for array in all_data(pg, count)]
    want = [np.concatenate(parts) for parts in zip(*halves, strict=True)]
    outs = blank(want)
    return Trial(lambda: pg.all_gather_single_coalesced(outs, xs).wait(), want, outs)


@trial("gather")
def _gather(pg: ProcessGroup, count: int) -> Trial:
    root = pg.size() - 1
    want = all_data(pg, count) if pg.rank() == root else []
    outs = blank(want)
    return Trial(lambda: pg.gather(outs, data(pg.rank(), count), root).wait(), want, outs)


@trial("scatter")
def _scatter(pg: ProcessGroup, count: int) -> Trial:
    root = pg.size() - 1
    pieces = np.array_split(data(root, count), pg.size())
    want = pieces[pg.rank()]
    (out,) = blank([want])
    given = pieces if pg.rank() == root else []
    return Trial(lambda: pg.scatter(out, given, root).wait(), [want], [out])


@trial("alltoall")
def _alltoall(pg: ProcessGroup, count: int) -> Trial:
    pieces = np.array_split(data(pg.rank(), count), pg.size())
    want = [np.array_split(array, pg.size())[pg.rank()] for array in all_data(pg, count)]
    outs = blank(want)
    return Trial(lambda: pg.alltoall(outs, pieces).wait(), want, outs)


@trial("all_to_all_single")
def _all_to_all_single(pg: ProcessGroup, count: int) -> Trial:
    count = even(pg, count)
    arrays = all_data(pg, count)
    want = np.concatenate([np.split(array, pg.size())[pg.rank()] for array in arrays])
    (out,) = blank([want])
    return Trial(lambda: pg.all_to_all_single(out, arrays[pg.rank()], [], []).wait(), [want], [out])


@trial("all_to_all_single, uneven")
def _all_to_all_single_uneven(pg: ProcessGroup, count: int) -> Trial:
    # Rank i sends i + j + 1 shares to rank j.
    rank, size = pg.rank(), pg.size()
    share = max(count // (size * size), 1)
    sizes = [[(i + j + 1) * share for j in range(size)] for i in range(size)]
    arrays = [data(i, sum(sizes[i])) for i in range(size)]
    pieces = [
        np.split(array, np.cumsum(row)[:-1]) for array, row in zip(arrays, sizes, strict=True)
    ]
    want = np.concatenate([row[rank] for row in pieces])
    (out,) = blank([want])
    incoming = [row[rank] for row in sizes]
    return Trial(
        lambda: pg.all_to_all_single(out, arrays[rank], incoming, sizes[rank]).wait(), [want], [out]
    )


# -------------------------------------------------------------------------------- point to point


@trial("send, recv")
def _send_recv(pg: ProcessGroup, count: int) -> Trial:
    left, right = (pg.rank() - 1) % pg.size(), (pg.rank() + 1) % pg.size()
    want = data(left, count)
    (out,) = blank([want])

    def call() -> None:
        received = pg.recv(out, left)
        pg.send(data(pg.rank(), count), right).wait()
        received.wait()

    return Trial(call, [want], [out])


@trial("send, recv_anysource")
def _recv_anysource(pg: ProcessGroup, count: int) -> Trial:
    left, right = (pg.rank() - 1) % pg.size(), (pg.rank() + 1) % pg.size()
    (out,) = blank([data(left, count)])
    made = Trial(lambda: None, [data(left, count), left], [out])

    def call() -> None:
        received = pg.recv_anysource(out, tag=1)
        pg.send(data(pg.rank(), count), right, tag=1).wait()
        received.wait()
        made.got.append(received.source_rank())

    made.call = call
    return made


# ------------------------------------------------------------------------------ Python's objects


def returning(
    name: str, make: Callable[[ProcessGroup, int], tuple[Callable[[], Any], Any]]
) -> None:
    """Enter a collective that returns its result: `make` gives the call and what it must return."""

    @trial(name)
    def maker(pg: ProcessGroup, count: int) -> Trial:
        call, want = make(pg, count)
        made = Trial(lambda: made.got.append(call()), [want])
        return made


def item(rank: int, count: int) -> dict[str, Any]:
    return {"rank": rank, "values": data(rank, count).tolist()}


def items(pg: ProcessGroup, count: int) -> list[dict[str, Any]]:
    """Return an object per rank; all together are about as large as `count` floats."""
    return [item(rank, count // 2 // pg.size()) for rank in range(pg.size())]


def _broadcast_object(pg: ProcessGroup, count: int) -> tuple[Callable[[], Any], Any]:
    want = items(pg, count)
    return lambda: pg.broadcast_object(want if pg.rank() == 0 else None, 0), want


def _allgather_object(pg: ProcessGroup, count: int) -> tuple[Callable[[], Any], Any]:
    want = items(pg, count)
    return lambda: pg.allgather_object(want[pg.rank()]), want


def _gather_object(pg: ProcessGroup, count: int) -> tuple[Callable[[], Any], Any]:
    want = items(pg, count)
    return lambda: pg.gather_object(want[pg.rank()], 0), want if pg.rank() == 0 else None


def _scatter_object(pg: ProcessGroup, count: int) -> tuple[Callable[[], Any], Any]:
    given = items(pg, count)
    return lambda: pg.scatter_object(given if pg.rank() == 0 else None, 0), given[pg.rank()]


returning("broadcast_object", _broadcast_object)
returning("allgather_object", _allgather_object)
returning("gather_object", _gather_object)
returning("scatter_object", _scatter_object)


# ------------------------------------------------------------------- what has no size of its own


@trial("barrier")
def _barrier(pg: ProcessGroup, count: int) -> Trial:
    return Trial(lambda: pg.barrier().wait(), [])


@trial("monitored_barrier")
def _monitored_barrier(pg: ProcessGroup, count: int) -> Trial:
    return Trial(lambda: pg.monitored_barrier(), [])


@trial("split, and allreduce in the half")
def _split(pg: ProcessGroup, count: int) -> Trial:
    x = data(pg.rank(), count)
    want = np.sum(all_data(pg, count)[pg.rank() % 2 :: 2], axis=0)

    def call() -> None:
        half = pg.split(pg.rank() % 2)
        assert half is not None
        with half:
            half.allreduce(x).wait()

    return Trial(call, [want], [x])
