"""Measure what each guard of a call costs, by leaving it out.

    mpiexec -n 2 python -m mpicoll overhead
    mpiexec -n 2 python -m mpicoll overhead --backend mpi --json

An allreduce is called as it is, and without one guard after the other, in turns, so that all see
the same machine.  A guard's price is how much faster the call is without it: the median over the
rounds.  A ? behind it says that the machine was too noisy to tell it from nothing.  Over shared
memory the comparison of the ranks can't be left out, since small data travel along with it; what
its parts take there is measured by themselves.

All calls take the general way.  In the compiled core, which carries out small calls of a node, none
of the guards can be left out: they are one piece, and take less than one of them takes here.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
import timeit
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt

from ..arrays.ops import ReduceOp
from ..engine import checks, records, tasks
from ..engine.progress import engine
from ..groups.group import ProcessGroup
from . import asked
from .noise import Interval, interval

SIZES = (4, 2**20)  # bytes
ROUND = 0.03  # seconds of one variant in one round, about
LITTLE = 0.1  # of the call: an interval so wide, with 0 in it, says that a guard costs little

Without = Callable[[ProcessGroup, Any], AbstractContextManager[Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--backend", default="auto", choices=("auto", "mpi"))
    parser.add_argument("--rounds", type=asked.count, default=60, help="turns of each variant (60)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table on rank 0."""
    with asked.group(args.backend) as pg:
        pg._core = None
        measured = {nbytes: _measure(pg, nbytes, args.rounds) for nbytes in SIZES}
        if pg.rank() == 0:
            said = {
                n: {**m.prices, "intervals": m.intervals, "too_noisy": m.too_noisy}
                for n, m in measured.items()
            }
            print(json.dumps(said) if args.json else _table(pg, measured))
    return 0


class Measured(NamedTuple):
    """Microseconds of the call and of each guard; and of the latter, what they may be in truth."""

    prices: dict[str, float]
    intervals: dict[str, Interval]
    too_noisy: list[str]  # guards whose price could not be told from nothing, nor from much


def _measure(pg: ProcessGroup, nbytes: int, rounds: int) -> Measured:
    x = np.ones(nbytes // 4, np.float32)
    variants = {name: without(pg, x) for name, without in _variants(pg).items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    each = _times(pg, x, 20)
    repeats = int(pg.broadcast_object(max(3, ROUND / each), root=0))
    for _ in range(rounds):
        for name, variant in variants.items():
            with variant:
                times[name].append(_times(pg, x, repeats))
    whole = 1e6 * np.array(times.pop("the call"))
    call = float(np.median(whole))
    measured = Measured({"the call": round(call, 2)}, {}, [])
    for name, without in times.items():
        saved = whole - 1e6 * np.array(without)
        price = interval(rounds, partial(_median, saved))
        measured.prices[name] = round(float(np.median(saved)), 2)
        measured.intervals[name] = Interval(round(price.low, 2), round(price.high, 2))
        if not price.tells(0, LITTLE * call):
            measured.too_noisy.append(name)
    if pg.name() != "mpi":
        measured.prices["comparing the ranks (by itself)"] = round(_comparing(pg, x), 2)
    return measured


def _median(values: npt.NDArray[np.float64], part: slice) -> float:
    return float(np.median(values[part]))


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


def _table(pg: ProcessGroup, measured: dict[int, Measured]) -> str:
    lines = [f"{pg.size()} ranks, transport {pg.name()}; microseconds a call of allreduce"]
    names = list(measured[SIZES[0]].prices)
    width = max(map(len, names))
    lines.append(f"{'':{width}}" + "".join(f"{_words(nbytes):>10} " for nbytes in SIZES))
    for name in names:
        cells = ((m.prices[name], "?" if name in m.too_noisy else " ") for m in measured.values())
        lines.append(f"{name:{width}}" + "".join(f"{price:10.2f}{mark}" for price, mark in cells))
    if any(m.too_noisy for m in measured.values()):
        lines.append("? The machine was too noisy to tell: more --rounds, or a quiet machine, may.")
    return "\n".join(line.rstrip() for line in lines)


def _words(nbytes: int) -> str:
    return f"{nbytes} B" if nbytes < 1024 else f"{nbytes // 2**20} MiB"
