"""Measure collectives beside bare mpi4py on the same communicator.

Start it under MPI:

    mpiexec -n 2 python -m mpicoll bench
    mpiexec -n 2 python -m mpicoll bench --sizes 4,1048576 --kinds allreduce,broadcast --json

Calls of mpicoll and of mpi4py's blocking methods alternate, so that both see the same machine.
A call takes as long as on its slowest rank.  Sizes are bytes of the larger array of a rank: of the
output in all_gather_single, of the input in reduce_scatter_single.  Algorithm bandwidth is that
size over the median time; bus bandwidth multiplies it as the NCCL tests do, by 2 (n - 1) / n for
allreduce, (n - 1) / n where each rank has its part, and 1 for broadcast and reduce.  Every result
is checked, and the exit status is not zero if one was wrong.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ..group import ProcessGroup, new_group
from ..library import MPI
from ..ops import ReduceOp

Array = npt.NDArray[np.float32]

SIZES = tuple(4 ** (1 + i) for i in range(14))  # 4 B to 256 MiB
BUDGET = 0.4  # seconds that one size of one collective may take, about


@dataclass
class Case:
    """One collective at one size, ready to be called both ways, on arrays of its own."""

    ours: Callable[[], object]
    bare: Callable[[], object]
    fill: Callable[[], None]
    right: Callable[[], bool]


@dataclass
class Row:
    """What was measured; times in microseconds, bandwidths of mpicoll in GB/s."""

    kind: str
    nbytes: int
    calls: int
    min_us: float
    median_us: float
    p99_us: float
    algorithm_gbps: float
    bus_gbps: float
    mpi4py_median_us: float
    ratio: float  # mpi4py's median over ours: above 1, mpicoll is faster


def _allreduce(pg: ProcessGroup, count: int) -> Case:
    x = np.empty(count, np.float32)
    n = pg.size()
    return Case(
        lambda: pg.allreduce(x).wait(),
        lambda: pg.comm.Allreduce(MPI.IN_PLACE, x),
        lambda: x.fill(pg.rank() + 1),
        lambda: bool((x == n * (n + 1) / 2).all()),
    )


def _reduce(pg: ProcessGroup, count: int) -> Case:
    x = np.empty(count, np.float32)
    n, root = pg.size(), pg.rank() == 0
    return Case(
        lambda: pg.reduce(x, 0).wait(),
        lambda: pg.comm.Reduce(MPI.IN_PLACE if root else x, x if root else None, root=0),
        lambda: x.fill(pg.rank() + 1),
        lambda: bool((x == (n * (n + 1) / 2 if root else pg.rank() + 1)).all()),
    )


def _broadcast(pg: ProcessGroup, count: int) -> Case:
    x = np.empty(count, np.float32)
    return Case(
        lambda: pg.broadcast(x, 0).wait(),
        lambda: pg.comm.Bcast(x, 0),
        lambda: x.fill(7 if pg.rank() == 0 else 0),
        lambda: bool((x == 7).all()),
    )


def _all_gather(pg: ProcessGroup, count: int) -> Case:
    n, each = pg.size(), max(1, count // pg.size())
    x, out = np.full(each, pg.rank() + 1, np.float32), np.empty(n * each, np.float32)
    return Case(
        lambda: pg.all_gather_single(out, x).wait(),
        lambda: pg.comm.Allgather(x, out),
        lambda: out.fill(0),
        lambda: bool((out.reshape(n, each) == np.arange(1, n + 1)[:, None]).all()),
    )


def _reduce_scatter(pg: ProcessGroup, count: int) -> Case:
    n, each = pg.size(), max(1, count // pg.size())
    x, out = np.full(n * each, pg.rank() + 1, np.float32), np.empty(each, np.float32)
    return Case(
        lambda: pg.reduce_scatter_single(out, x).wait(),
        lambda: pg.comm.Reduce_scatter_block(x, out),
        lambda: out.fill(0),
        lambda: bool((out == n * (n + 1) / 2).all()),
    )


def _all_to_all(pg: ProcessGroup, count: int) -> Case:
    n, each = pg.size(), max(1, count // pg.size())
    x, out = np.full(n * each, pg.rank() + 1, np.float32), np.empty(n * each, np.float32)
    return Case(
        lambda: pg.all_to_all_single(out, x).wait(),
        lambda: pg.comm.Alltoall(x, out),
        lambda: out.fill(0),
        lambda: bool((out.reshape(n, each) == np.arange(1, n + 1)[:, None]).all()),
    )


KINDS: dict[str, tuple[Callable[[ProcessGroup, int], Case], Callable[[int], float]]] = {
    "allreduce": (_allreduce, lambda n: 2 * (n - 1) / n),
    "reduce": (_reduce, lambda n: 1.0),
    "broadcast": (_broadcast, lambda n: 1.0),
    "all_gather_single": (_all_gather, lambda n: (n - 1) / n),
    "reduce_scatter_single": (_reduce_scatter, lambda n: (n - 1) / n),
    "all_to_all_single": (_all_to_all, lambda n: (n - 1) / n),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="bytes, with commas")
    parser.add_argument("--kinds", default=",".join(KINDS), help="collectives, with commas")
    parser.add_argument("--backend", default="auto", help="as new_group takes it")
    parser.add_argument("--json", action="store_true", help="print rows for machines")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark on this rank; every rank returns the same exit status."""
    sizes = [int(text) for text in args.sizes.split(",")]
    rows, wrong = [], np.zeros(1, dtype=np.int64)
    with new_group(args.backend) as pg:
        table = pg.rank() == 0 and not args.json
        if table:
            print(f"{pg!r} beside mpi4py on {MPI.Get_library_version().splitlines()[0].strip()}")
        for kind in args.kinds.split(","):
            if table:
                print(f"\n{kind:<24}{'min us':>10}{'median':>10}{'p99':>10}{'alg GB/s':>10}"
                      f"{'bus GB/s':>10}{'mpi4py':>10}{'ratio':>8}")  # fmt: skip
            for nbytes in sizes:
                row, correct = measure(pg, kind, nbytes)
                rows.append(row)
                wrong += not correct
                if table:
                    print(
                        f"{in_words(nbytes):>24}{row.min_us:>10.1f}{row.median_us:>10.1f}"
                        f"{row.p99_us:>10.1f}{row.algorithm_gbps:>10.2f}{row.bus_gbps:>10.2f}"
                        f"{row.mpi4py_median_us:>10.1f}{row.ratio:>8.2f}"
                        f"{'' if correct else '  WRONG'}",
                        flush=True,
                    )
        if pg.rank() == 0 and args.json:
            print(json.dumps([asdict(row) for row in rows]))
    return int(wrong[0] > 0)


def measure(pg: ProcessGroup, kind: str, nbytes: int) -> tuple[Row, bool]:
    """Measure one collective at one size; every rank of the group must call this."""
    make, bus = KINDS[kind]
    case = make(pg, max(1, nbytes // 4))
    correct = np.ones(1, dtype=np.uint8)
    for call in (case.ours, case.bare):  # warms up, too
        case.fill()
        pg.barrier().wait()
        call()
        correct[0] &= case.right()
    once = timed(pg, case.ours, 1)[0] + timed(pg, case.bare, 1)[0]
    calls = int(np.clip(BUDGET / once, 5, 1000))
    times = np.array([[timed(pg, f, 1)[0] for f in (case.ours, case.bare)] for _ in range(calls)])
    pg.allreduce(correct, op=ReduceOp.MIN).wait()
    ours, bare = times.T * 1e6
    median = float(np.median(ours))
    rate = nbytes / median / 1e3
    row = Row(
        kind,
        nbytes,
        calls,
        float(ours.min()),
        median,
        float(np.percentile(ours, 99)),
        rate,
        rate * bus(pg.size()),
        float(np.median(bare)),
        float(np.median(bare)) / median,
    )
    return row, bool(correct[0])


def timed(pg: ProcessGroup, call: Callable[[], object], calls: int) -> Array:
    """Return the seconds that each of some calls took on its slowest rank."""
    seconds = np.empty(calls)
    for i in range(calls):
        pg.comm.Barrier()
        begin = time.perf_counter()
        call()
        seconds[i] = time.perf_counter() - begin
    pg.comm.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
    return seconds.astype(np.float32)


def in_words(nbytes: int) -> str:
    """Return a number of bytes with a unit."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:g} {unit}"
    return f"{nbytes} B"
