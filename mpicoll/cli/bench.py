"""Measure collectives and messages beside bare mpi4py on the same communicator, and beside gloo.

Start it under MPI:

    mpiexec -n 2 python -m mpicoll bench
    mpiexec -n 2 python -m mpicoll bench --sizes 4,1048576 --kinds allreduce,broadcast --json
    mpiexec -n 2 python -m mpicoll bench --kinds pingpong,exchange,bandwidth
    mpiexec -n 2 python -m mpicoll bench --kinds broadcast_object,allgather_object --sizes 4,1024
    mpiexec -n 2 python -m mpicoll bench --gloo --plot curves.png
    mpiexec -n 2 python -m mpicoll bench --device cuda

Calls of mpicoll, of mpi4py's blocking methods, and for allreduce of `Iallreduce` and `Wait`,
alternate, so that all see the same machine; those of gloo follow.  A call takes as long as on its
slowest rank.  The ratio is mpi4py's median over mpicoll's; a ? behind it says that the machine was
too noisy to tell which is faster.  Sizes are bytes of the larger array of a rank: of the output in
all_gather_single and gather, of the input in reduce_scatter_single and scatter.  As in the OSU and
NCCL tests, algorithm bandwidth is that size over the median time, and bus bandwidth multiplies it
by 2 (n - 1) / n for allreduce, by (n - 1) / n where each rank has its part, and by 1 for broadcast,
reduce and scan.  On GPU memory a call ends when the current stream has passed it.  mpi4py is
measured on host arrays of the same size, unless --bare-on-gpu says that its collectives take the
GPU's: an MPI library that takes them in messages may die of them in collectives, which nobody has
tried.  Where the group uses NCCL, bare NCCL, called through nccl4py, runs beside it.  Every result
of mpicoll is checked, and the exit status is not zero if one was wrong.

Messages are measured as the OSU tests do it, between ranks 0 and 1: pingpong is half a round trip
(osu_latency); bandwidth is the time of one message of a window of 64, fewer where the messages are
large, after which a short one comes back (osu_bw).  In exchange each rank sends to the next one
and receives from the one before, and its bus bandwidth counts both ways (osu_bibw).

Objects are `bytes` of the size, beside mpi4py's lower-case methods, which pickle as mpicoll does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..arrays.ops import ReduceOp
from ..engine.kinds import BARRIER
from ..engine.work import wait_all
from ..groups.group import ProcessGroup
from ..runtime.library import MPI
from ..transports.cuda import binding
from ..transports.cuda.gpu import load_cupy
from ..transports.cuda.nccl import SUM, TYPES
from . import asked
from .asked import Refusal
from .noise import interval

Array = npt.NDArray[Any]
Calls = Callable[[], object]

SIZES = tuple(4 ** (1 + i) for i in range(14))  # 4 B to 256 MiB
MESSAGES = ("pingpong", "exchange", "bandwidth")  # not measured where no kinds are named, nor
OBJECTS = ("broadcast_object", "allgather_object")
ROUNDS = 10  # round trips of a pingpong
WINDOW = 64  # messages under way in `bandwidth`
AT_ONCE = 256 * 2**20  # bytes of them, at most
TOO_NOISY = "?"
WHY_NOISY = "the machine was too noisy to tell who is faster; see --budget"
EVEN = 0.1  # an interval of the ratio so wide, with 1 in it, says that none is faster
BUDGET = 0.4  # seconds that one size of one collective may take, about
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass
class Case:
    """One kind at one size, ready to be called in each way, on arrays of its own."""

    ours: Calls
    bare: Calls
    fill: Callable[[], None]
    right: Callable[[], bool]
    gloo: Calls | None = None
    nonblocking: Calls | None = None
    nccl: Calls | None = None
    messages: int = 1  # by which the time of a call is divided


@dataclass
class Row:
    """What was measured; times in microseconds, bandwidths of mpicoll in GB/s."""

    kind: str
    dtype: str
    nbytes: int
    calls: int
    min_us: float
    median_us: float
    p99_us: float
    algorithm_gbps: float
    bus_gbps: float
    mpi4py_median_us: float
    ratio: float  # mpi4py's median over ours: above 1, mpicoll is faster
    nonblocking_median_us: float | None  # mpi4py's Iallreduce and Wait
    gloo_median_us: float | None
    nccl_median_us: float | None = None  # NCCL's own call, through nccl4py
    ratio_low: float = 0.0  # between these the ratio lies in 93 of 100 cases: noise.py
    ratio_high: float = 0.0
    too_noisy: bool = False  # to tell which of the two is faster


class Bench:
    """The collectives of one group on arrays of one dtype, beside their peers.

    No MPI reduces bfloat16: mpi4py is measured on float16 there.
    """

    def __init__(
        self, pg: ProcessGroup, dtype: str, gloo: Any, xp: Any = np, *, bare_on_gpu: bool = False
    ) -> None:
        self.xp = xp  # the module that makes our arrays
        self.nccl = _BareNccl(pg, xp, dtype) if pg.name() == "nccl" else None
        self.bare_on_gpu = bare_on_gpu
        self.pg, self.n, self.rank = pg, pg.size(), pg.rank()
        self.dtype = np.dtype(_bfloat16() if dtype == "bfloat16" else dtype)
        self.bare_dtype = np.dtype(np.float16) if dtype == "bfloat16" else self.dtype
        self.dist = gloo  # the module torch.distributed, initialized; or None

    def array(self, count: int) -> tuple[Array, Array, Any]:
        """Return an array for us, one for mpi4py (the same memory), and a tensor for gloo.

        On GPU memory mpi4py gets host memory, unless its collectives are said to take the GPU's.
        """
        if self.xp is not np:
            x = self.xp.zeros(count, self.dtype)
            y = x.view(self.bare_dtype) if self.bare_on_gpu else np.zeros(count, self.bare_dtype)
            return x, y, None
        x = np.zeros(count, self.dtype)
        tensor = None
        if self.dist is not None:
            import torch

            same = torch.from_numpy(x.view(np.int16 if self.dtype.itemsize == 2 else x.dtype))
            tensor = same.view(getattr(torch, self.dtype.name))
        return x, x.view(self.bare_dtype), tensor

    def total(self) -> int:
        """Return what 1 + ... + n is."""
        return self.n * (self.n + 1) // 2

    def allreduce(self, count: int) -> Case:
        (x, y, t), pg = self.array(count), self.pg
        return Case(
            lambda: pg.allreduce(x).wait(),
            lambda: pg.comm.Allreduce(MPI.IN_PLACE, y),
            lambda: x.fill(self.rank + 1),
            lambda: bool((x == self.total()).all()),
            lambda: self.dist.all_reduce(t),
            # Open MPI's nonblocking collectives take no GPU memory.
            None if self.bare_on_gpu else lambda: pg.comm.Iallreduce(MPI.IN_PLACE, y).Wait(),
            nccl=None if self.nccl is None else self.nccl.allreduce(x),
        )

    def reduce(self, count: int) -> Case:
        (x, y, t), pg, root = self.array(count), self.pg, self.rank == 0
        return Case(
            lambda: pg.reduce(x, 0).wait(),
            lambda: pg.comm.Reduce(MPI.IN_PLACE if root else y, y if root else None, root=0),
            lambda: x.fill(self.rank + 1),
            lambda: bool((x == (self.total() if root else self.rank + 1)).all()),
            lambda: self.dist.reduce(t, 0),
        )

    def scan(self, count: int) -> Case:
        (x, y, _), pg = self.array(count), self.pg
        return Case(
            lambda: pg.scan(x).wait(),
            lambda: pg.comm.Scan(MPI.IN_PLACE, y),
            lambda: x.fill(self.rank + 1),
            lambda: bool((x == (self.rank + 1) * (self.rank + 2) // 2).all()),
        )

    def broadcast(self, count: int) -> Case:
        (x, y, t), pg = self.array(count), self.pg
        return Case(
            lambda: pg.broadcast(x, 0).wait(),
            lambda: pg.comm.Bcast(y, 0),
            lambda: x.fill(7 if self.rank == 0 else 0),
            lambda: bool((x == 7).all()),
            lambda: self.dist.broadcast(t, 0),
            nccl=None if self.nccl is None else self.nccl.broadcast(x),
        )

    def all_gather_single(self, count: int) -> Case:
        each = max(1, count // self.n)
        (x, y, t), (out, into, o), pg = self.array(each), self.array(self.n * each), self.pg
        x.fill(self.rank + 1)
        return Case(
            lambda: pg.all_gather_single(out, x).wait(),
            lambda: pg.comm.Allgather(y, into),
            lambda: out.fill(0),
            lambda: self._one_each(out),
            lambda: self.dist.all_gather_into_tensor(o, t),
            nccl=None if self.nccl is None else self.nccl.all_gather(out, x),
        )

    def gather(self, count: int) -> Case:
        each = max(1, count // self.n)
        (x, y, _), (out, into, _), pg = self.array(each), self.array(self.n * each), self.pg
        x.fill(self.rank + 1)
        root = self.rank == 0
        parts = list(out.reshape(self.n, each)) if root else []
        return Case(
            lambda: pg.gather(parts, x, 0).wait(),
            lambda: pg.comm.Gather(y, into if root else None, 0),
            lambda: out.fill(0),
            lambda: not root or self._one_each(out),
        )

    def scatter(self, count: int) -> Case:
        each = max(1, count // self.n)
        (x, y, _), (out, into, _), pg = self.array(self.n * each), self.array(each), self.pg
        rows = x.reshape(self.n, each)
        rows[...] = self.xp.arange(1, self.n + 1)[:, None]
        root = self.rank == 0
        parts = list(rows) if root else []
        return Case(
            lambda: pg.scatter(out, parts, 0).wait(),
            lambda: pg.comm.Scatter(y if root else None, into, 0),
            lambda: out.fill(0),
            lambda: bool((out == self.rank + 1).all()),
        )

    def reduce_scatter_single(self, count: int) -> Case:
        each = max(1, count // self.n)
        (x, y, t), (out, into, o), pg = self.array(self.n * each), self.array(each), self.pg
        x.fill(self.rank + 1)
        return Case(
            lambda: pg.reduce_scatter_single(out, x).wait(),
            lambda: pg.comm.Reduce_scatter_block(y, into),
            lambda: out.fill(0),
            lambda: bool((out == self.total()).all()),
            lambda: self.dist.reduce_scatter_tensor(o, t),
            nccl=None if self.nccl is None else self.nccl.reduce_scatter(out, x),
        )

    def all_to_all_single(self, count: int) -> Case:
        each = max(1, count // self.n)
        (x, y, t), (out, into, o), pg = (
            self.array(self.n * each),
            self.array(self.n * each),
            self.pg,
        )
        x.fill(self.rank + 1)
        return Case(
            lambda: pg.all_to_all_single(out, x).wait(),
            lambda: pg.comm.Alltoall(y, into),
            lambda: out.fill(0),
            lambda: self._one_each(out),
            lambda: self.dist.all_to_all_single(o, t),
        )

    def barrier(self, count: int) -> Case:
        pg = self.pg
        return Case(
            lambda: pg.barrier().wait(),
            lambda: pg.comm.Barrier(),
            lambda: None,
            lambda: True,
            lambda: self.dist.barrier(),
        )

    def broadcast_object(self, count: int) -> Case:
        return self._objects(
            count,
            lambda x: self.pg.broadcast_object(x, 0),
            lambda x: self.pg.comm.bcast(x, 0),
            lambda got, x: got == x,
        )

    def allgather_object(self, count: int) -> Case:
        return self._objects(
            count,
            self.pg.allgather_object,
            self.pg.comm.allgather,
            lambda got, x: got == [x] * self.n,
        )

    def _objects(
        self,
        count: int,
        ours: Callable[[object], object],
        bare: Callable[[object], object],
        right: Callable[[object, object], bool],
    ) -> Case:
        x = bytes(count * self.dtype.itemsize)
        got: list[object] = []

        def keep() -> None:
            got[:] = [ours(x)]

        return Case(keep, lambda: bare(x), lambda: None, lambda: right(got[0], x))

    def exchange(self, count: int) -> Case:
        (x, y, _), (out, into, _), pg = self.array(count), self.array(count), self.pg
        after, before, comm = (self.rank + 1) % self.n, (self.rank - 1) % self.n, pg.comm
        x.fill(self.rank + 1)

        def ours() -> None:
            receiving, sending = pg.recv(out, before), pg.send(x, after)
            receiving.wait()
            sending.wait()

        return Case(
            ours,
            lambda: MPI.Request.Waitall([comm.Irecv(into, before), comm.Isend(y, after)]),
            lambda: out.fill(0),
            lambda: bool((out == before + 1).all()),
        )

    def pingpong(self, count: int) -> Case:
        (x, y, _), (out, into, _), pg = self.array(count), self.array(count), self.pg
        rank, peer, comm = self.rank, 1 - self.rank, pg.comm
        x.fill(rank + 1)

        def ours() -> None:
            for _ in range(ROUNDS if rank < 2 else 0):
                if rank == 0:
                    pg.send(x, peer).wait()
                pg.recv(out, peer).wait()
                if rank == 1:
                    pg.send(x, peer).wait()

        def bare() -> None:
            for _ in range(ROUNDS if rank < 2 else 0):
                if rank == 0:
                    comm.Send(y, peer)
                comm.Recv(into, peer)
                if rank == 1:
                    comm.Send(y, peer)

        return Case(
            ours,
            bare,
            lambda: out.fill(0),
            lambda: rank > 1 or bool((out == peer + 1).all()),
            messages=2 * ROUNDS,
        )

    def bandwidth(self, count: int) -> Case:
        (x, y, _), (end, over, _), pg = self.array(count), self.array(1), self.pg
        window = int(np.clip(AT_ONCE // (count * self.dtype.itemsize), 1, WINDOW))
        # Each message is received into memory of its own: mpicoll refuses anything else.
        (out, into, _), rank, comm = self.array(window * count), self.rank, pg.comm
        rows, bare_rows = out.reshape(window, count), into.reshape(window, count)
        x.fill(7)

        def ours() -> None:
            if rank == 0:
                wait_all([pg.send(x, 1) for _ in range(window)])
                pg.recv(end, 1).wait()
            elif rank == 1:
                wait_all([pg.recv(row, 0) for row in rows])
                pg.send(end, 0).wait()

        def bare() -> None:
            if rank == 0:
                MPI.Request.Waitall([comm.Isend(y, 1) for _ in range(window)])
                comm.Recv(over, 1)
            elif rank == 1:
                MPI.Request.Waitall([comm.Irecv(row, 0) for row in bare_rows])
                comm.Send(over, 0)

        return Case(
            ours,
            bare,
            lambda: out.fill(0),
            lambda: rank != 1 or bool((out == 7).all()),
            messages=window,
        )

    def _one_each(self, out: Array) -> bool:
        numbers = self.xp.arange(1, self.n + 1)
        return bool((out.reshape(self.n, -1) == numbers[:, None]).all())

    def measure(self, kind: str, nbytes: int, budget: float) -> tuple[Row, bool]:
        """Measure one kind at one size; every rank of the group must call this."""
        case: Case = getattr(self, kind)(max(1, nbytes // self.dtype.itemsize))
        correct = np.ones(1, dtype=np.uint8)
        for way in filter(None, (case.ours, case.bare, case.nccl)):  # warms up, too
            case.fill()
            self.pg.barrier().wait()
            way()
            # mpi4py has summed other numbers where there is no bfloat16.
            correct[0] &= way is not case.ours or case.right()
        ways = [case.ours, case.bare, *filter(None, [case.nonblocking, case.nccl])]
        calls, times = self.alternate(ways, budget)
        times /= case.messages
        medians = dict(zip(map(id, ways), np.median(times, axis=1).tolist(), strict=True))
        gloo = None
        if self.dist is not None and case.gloo is not None:
            # Not in turns with the others: the threads it wakes would disturb them.
            gloo = float(np.median(self.alternate([case.gloo], budget / 3)[1]))
        self.pg.allreduce(correct, op=ReduceOp.MIN).wait()
        ours = times[0]
        median, bare = medians[id(case.ours)], medians[id(case.bare)]
        rate = nbytes / median / 1e3
        ratios = interval(calls, lambda part: _ratio(times[1][part], ours[part]))
        return Row(
            kind,
            self.dtype.name,
            nbytes,
            calls,
            float(ours.min()),
            median,
            float(np.percentile(ours, 99)),
            rate,
            rate * BUS[kind](self.n),
            bare,
            _ratio(times[1], ours),
            medians.get(id(case.nonblocking)),
            gloo,
            medians.get(id(case.nccl)),
            *ratios,
            not ratios.tells(1.0, EVEN),
        ), bool(correct[0])

    def alternate(self, ways: list[Calls], budget: float) -> tuple[int, Array]:
        """Call each way in turn for about `budget` seconds; return how often, and microseconds."""
        once = sum(self.timed(way) for way in ways)
        calls = int(np.clip(budget / once, 5, 1000))
        times = [[self.timed(way) for way in ways] for _ in range(calls)]
        return calls, np.array(times).T * 1e6

    def timed(self, call: Calls) -> float:
        """Return the seconds that a call took on its slowest rank."""
        self.pg.comm.Barrier()
        begin = time.perf_counter()
        call()
        if self.xp is not np:
            self.xp.cuda.get_current_stream().synchronize()
        seconds = np.array([time.perf_counter() - begin])
        self.pg.comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        return float(seconds[0])


def _ratio(bare: Array, ours: Array) -> float:
    return float(np.median(bare) / np.median(ours))


class _BareNccl:
    """NCCL's own calls, on a communicator beside the group's, and on the current stream."""

    def __init__(self, pg: ProcessGroup, xp: Any, dtype: str) -> None:
        self.nccl = binding.load()
        name = pg.broadcast_object(binding.unique_id() if pg.rank() == 0 else None, 0)
        name = self.nccl.UniqueId.from_buffer(name)
        self.comm = self.nccl.comm_init_rank(pg.size(), name, pg.rank())
        self.kind, self.stream = TYPES[dtype], int(xp.cuda.get_current_stream().ptr)

    def allreduce(self, x: Any) -> Calls:
        p, call = x.data.ptr, self.nccl.all_reduce
        return lambda: call(p, p, x.size, self.kind, SUM, self.comm, self.stream)

    def broadcast(self, x: Any) -> Calls:
        p, call = x.data.ptr, self.nccl.broadcast
        return lambda: call(p, p, x.size, self.kind, 0, self.comm, self.stream)

    def all_gather(self, out: Any, x: Any) -> Calls:
        p, q, call = x.data.ptr, out.data.ptr, self.nccl.all_gather
        return lambda: call(p, q, x.size, self.kind, self.comm, self.stream)

    def reduce_scatter(self, out: Any, x: Any) -> Calls:
        p, q, call = x.data.ptr, out.data.ptr, self.nccl.reduce_scatter
        return lambda: call(p, q, out.size, self.kind, SUM, self.comm, self.stream)


BUS: dict[str, Callable[[int], float]] = {
    "allreduce": lambda n: 2 * (n - 1) / n,
    "reduce": lambda n: 1.0,
    "scan": lambda n: 1.0,
    "broadcast": lambda n: 1.0,
    "all_gather_single": lambda n: (n - 1) / n,
    "gather": lambda n: (n - 1) / n,
    "scatter": lambda n: (n - 1) / n,
    "reduce_scatter_single": lambda n: (n - 1) / n,
    "all_to_all_single": lambda n: (n - 1) / n,
    "barrier": lambda n: 0.0,
    "pingpong": lambda n: 1.0,
    "exchange": lambda n: 2.0,
    "bandwidth": lambda n: 1.0,
    "broadcast_object": lambda n: 1.0,
    "allgather_object": lambda n: n - 1.0,
}
COLLECTIVES = [kind for kind in BUS if kind not in (*MESSAGES, *OBJECTS)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--sizes", type=asked.sizes, default=SIZES, help="bytes, with commas")
    parser.add_argument("--kinds", type=asked.several(BUS), default=COLLECTIVES, help="with commas")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--backend", default="auto", choices=asked.BACKENDS)
    parser.add_argument("--device", default="cpu", help="as new_group takes it")
    parser.add_argument(
        "--bare-on-gpu", action="store_true", help="give mpi4py's collectives the GPU's arrays"
    )
    parser.add_argument("--gloo", action="store_true", help="beside torch.distributed on gloo")
    parser.add_argument(
        "--budget", type=asked.duration, default=BUDGET, help="seconds a measurement takes"
    )
    parser.add_argument("--json", action="store_true", help="print rows for machines")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw the curves (needs matplotlib)"
    )


def run(args: argparse.Namespace) -> int:
    """Run the benchmark on this rank; every rank returns the same exit status."""
    kinds, sizes = args.kinds, args.sizes
    missing = _check(args)
    rows: list[Row] = []
    wrong = np.zeros(1, dtype=np.int64)
    with asked.group(args.backend, args.device, missing) as pg:
        speaks = pg.rank() == 0
        gloo = _gloo(pg) if args.gloo else None
        bench = Bench(pg, args.dtype, gloo, _array_module(pg), bare_on_gpu=args.bare_on_gpu)
        points = [(k, size) for k in kinds for size in (sizes if k != BARRIER.name else [4])]
        if speaks and not args.json:
            print(f"{pg!r} beside mpi4py on {MPI.Get_library_version().splitlines()[0].strip()}")
        for done, (kind, nbytes) in enumerate(points):
            row, correct = bench.measure(kind, nbytes, args.budget)
            wrong += not correct
            if speaks and not args.json:
                if not rows or rows[-1].kind != kind:
                    print(_head(row))
                print(_line(row) + ("" if correct else "  WRONG"), flush=True)
            rows.append(row)
            if speaks:
                _progress(done + 1, len(points))
        noisy = sum(row.too_noisy for row in rows)
        if speaks and noisy and not args.json:
            print(f"\n{TOO_NOISY} in {noisy} of {len(rows)} lines: {WHY_NOISY}")
        if speaks and args.json:
            print(json.dumps([asdict(row) for row in rows]))
        if speaks and args.plot:
            from .curves import draw

            draw([asdict(row) for row in rows], args.plot, f"{pg.size()} ranks, {args.dtype}")
        if bench.dist is not None:
            bench.dist.destroy_process_group()
    return int(wrong[0] > 0)


def _check(args: argparse.Namespace) -> str:
    """Refuse what doesn't go together; return what is missing on this rank, or ""."""
    if args.bare_on_gpu and args.device == "cpu":
        raise Refusal("--bare-on-gpu goes with --device cuda")
    if args.gloo and args.device != "cpu":
        raise Refusal("--gloo goes with --device cpu: gloo moves host memory")
    if not set(args.kinds).isdisjoint(MESSAGES) and MPI.COMM_WORLD.Get_size() == 1:
        raise Refusal(f"--kinds of messages, {', '.join(MESSAGES)}, need two ranks")
    missing = []
    if args.plot:
        missing += [asked.lacks("--plot", "matplotlib", install="matplotlib")]
        missing += [asked.unwritable("--plot", args.plot)]
    if args.gloo:
        missing += [asked.lacks("--gloo", "torch", install="torch")]
    if args.dtype == "bfloat16":
        missing += [asked.lacks("--dtype bfloat16", "ml_dtypes", install="ml_dtypes")]
    return next(filter(None, missing), "")


def _array_module(pg: ProcessGroup) -> Any:
    """Return NumPy, or CuPy with the group's GPU made current."""
    _, _, number = pg.device.partition(":")
    if not number:
        return np
    cupy = load_cupy()
    cupy.cuda.Device(int(number)).use()
    return cupy


def _gloo(pg: ProcessGroup) -> Any:
    """Return torch.distributed, its gloo group made of the same ranks."""
    import torch
    import torch.distributed as dist

    warnings.simplefilter("ignore", FutureWarning)  # of its functions' old names
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = pg.broadcast_object(f"{folder}/store", 0)
        dist.init_process_group(
            "gloo", init_method=f"file://{path}", rank=pg.rank(), world_size=pg.size()
        )
        dist.barrier()
    return dist


def _bfloat16() -> Any:
    import ml_dtypes

    return ml_dtypes.bfloat16


def _head(row: Row) -> str:
    names = ["min us", "median", "p99", "alg GB/s", "bus GB/s", "mpi4py", "ratio"]
    names += [name for name, time in _beside(row) if time is not None]
    return f"\n{row.kind:<24}" + "".join(f"{name:>10}" for name in names)


def _beside(row: Row) -> list[tuple[str, float | None]]:
    return [
        ("I + Wait", row.nonblocking_median_us),
        ("gloo", row.gloo_median_us),
        ("NCCL", row.nccl_median_us),
    ]


def _line(row: Row) -> str:
    return (
        f"{in_words(row.nbytes) if row.kind != BARRIER.name else '':>24}{row.min_us:>10.1f}"
        f"{row.median_us:>10.1f}{row.p99_us:>10.1f}{row.algorithm_gbps:>10.2f}"
        f"{row.bus_gbps:>10.2f}{row.mpi4py_median_us:>10.1f}"
        f"{f'{row.ratio:.2f}{TOO_NOISY * row.too_noisy}':>10}"
        + "".join(f"{time:>10.1f}" for _, time in _beside(row) if time is not None)
    )


def _progress(done: int, of: int) -> None:
    if sys.stderr.isatty():
        bar = "#" * (30 * done // of)
        print(f"\r[{bar:<30}] {done}/{of}", end="\n" if done == of else "", file=sys.stderr)


def in_words(nbytes: int) -> str:
    """Return a number of bytes with a unit."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes} B"
