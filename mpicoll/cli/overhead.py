"""Measure what each guard of a call costs, by leaving it out.

    mpiexec -n 2 python -m mpicoll overhead
    mpiexec -n 2 python -m mpicoll overhead --backend mpi --json

An allreduce is called as it is, and without one guard after the other, in turns, so that all see
the same machine.  A guard's price is how much faster the call is without it: the median over the
rounds.  Over shared memory the comparison of the ranks can't be left out, since small data travel
along with it; what its parts take there is measured by themselves.

All calls take the general way.  In the compiled core, which carries out small calls of a node, none
of the guards can be left out: they are one piece, and take less than one of them takes here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import numpy as np

from ..arrays.ops import ReduceOp
from ..engine import checks, records, tasks
from ..engine.progress import engine
from ..groups.group import ProcessGroup
from ..groups.new import new_group

SIZES = (4, 2**20)  # bytes
ROUND = 0.03  # seconds of one variant in one round, about

Without = Callable[[ProcessGroup, Any], AbstractContextManager[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--backend", default="auto", help='"auto" (default) or "mpi"')
    parser.add_argument("--rounds", type=int, default=60, help="turns of each variant (60)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table on rank 0."""
    with new_group(args.backend) as pg:
        pg._core = None
        prices = {nbytes: _prices(pg, nbytes, args.rounds) for nbytes in SIZES}
        if pg.rank() == 0:
            print(json.dumps(prices) if args.json else _table(pg, prices))
    return 0


def _prices(pg: ProcessGroup, nbytes: int, rounds: int) -> dict[str, float]:
    """Return microseconds: of the call, and of each guard."""
    x = np.ones(nbytes // 4, np.float32)
    variants = {name: without(pg, x) for name, without in _variants(pg).items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    each = _times(pg, x, 20)
    repeats = int(pg.broadcast_object(max(3, ROUND / each), root=0))
    for _ in range(rounds):
        for name, variant in variants.items():
            with variant:
                times[name].append(_times(pg, x, repeats))
    whole = times.pop("the call")
    prices = {"the call": statistics.median(whole)}
    for name, without in times.items():
        prices[name] = statistics.median(a - b for a, b in zip(whole, without, strict=True))
    prices = {name: 1e6 * price for name, price in prices.items()}
    if pg.name() != "mpi":
        prices["comparing the ranks (by itself)"] = _comparing(pg, x)
    return {name: round(price, 2) for name, price in prices.items()}


def _times(pg: ProcessGroup, x: Any, repeats: int) -> float:
    """Return the seconds of one call, as the mean of several."""
    x.fill(1)
    pg.barrier().wait()
    start = time.perf_counter()
    for _ in range(repeats):
        pg.allreduce(x, ReduceOp.MAX).wait()
    return (time.perf_counter() - start) / repeats


def _variants(pg: ProcessGroup) -> dict[str, Without]:
    variants: dict[str, Without] = {
        "the call": lambda pg, x: contextlib.nullcontext(),
        "checking the arguments": _unchecked,
        "flight recorder": _unrecorded,
        "listening to peers, looking for deaths": _deaf,
    }
    if pg.name() == "mpi":
        variants["comparing the ranks"] = _uncompared
    return variants


class _Patch(contextlib.AbstractContextManager[None]):
    """Something left out, again and again."""

    def __init__(self, *what: tuple[object, str, object]) -> None:
        self._what = what
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        for target, name, instead in self._what:
            self._stack.enter_context(mock.patch.object(target, name, instead))

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _unchecked(pg: ProcessGroup, x: Any) -> _Patch:
    checked = checks.allreduce(pg.rank(), pg.size(), x, ReduceOp.MAX)
    return _Patch((checks, "allreduce", lambda *arguments: checked))


def _unrecorded(pg: ProcessGroup, x: Any) -> _Patch:
    return _Patch(
        (pg._caller.recorder, "note", lambda *arguments: []),
        (tasks, "end", lambda *arguments: None),
    )


def _deaf(pg: ProcessGroup, x: Any) -> _Patch:
    return _Patch((engine(), "_hear", lambda now: False))


def _uncompared(pg: ProcessGroup, x: Any) -> _Patch:
    def exchange(record: records.Record, extent: int) -> records.Meets:
        yield from ()
        return record, record, extent

    return _Patch((pg._caller.arrival, "_exchange", exchange))


def _comparing(pg: ProcessGroup, x: Any) -> float:
    """Return the microseconds of making a record, publishing it, and comparing it with one."""
    call = checks.allreduce(pg.rank(), pg.size(), x, ReduceOp.MAX)
    room = bytearray(2 * 64)

    def compare() -> bool:
        record = records.record_of(call, 7)
        room[:64] = records.BOTH.pack(*record, *record, call.extent)[8:72]
        return room[64:] == room[:64]

    return 1e6 * min(timeit.repeat(compare, number=2000, repeat=5)) / 2000


def _table(pg: ProcessGroup, prices: dict[int, dict[str, float]]) -> str:
    lines = [f"{pg.size()} ranks, transport {pg.name()}; microseconds a call of allreduce"]
    width = max(map(len, prices[SIZES[0]]))
    lines.append(f"{'':{width}}" + "".join(f"{_words(nbytes):>10}" for nbytes in SIZES))
    for name in prices[SIZES[0]]:
        lines.append(f"{name:{width}}" + "".join(f"{prices[n][name]:10.2f}" for n in SIZES))
    return "\n".join(lines)


def _words(nbytes: int) -> str:
    return f"{nbytes} B" if nbytes < 1024 else f"{nbytes // 2**20} MiB"
