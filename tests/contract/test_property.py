"""Random programs of calls equal what NumPy computes, on every rank.

hypothesis draws the same programs on every rank (derandomised, no database); the verdict on each
is agreed inside the test body, so that all ranks see the same failure and shrink together.
"""

from __future__ import annotations

import time
import traceback
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mpi4py import MPI

import mpicoll as mc
from mpicoll import ReduceOp
from tests.contract.arrays import BFLOAT16, KINDS, data, reduced, small
from tests.soak import soak

EXAMPLES = soak(5_000, 300)
N, ME = MPI.COMM_WORLD.size, MPI.COMM_WORLD.rank
ORDERED = [*map(np.dtype, "bhilBHILefd"), BFLOAT16]
DTYPES = [np.dtype(bool), *ORDERED, *map(np.dtype, "FD")]
pytestmark = [pytest.mark.mpi, pytest.mark.limit(soak(1400, 120))]


SHRINKING = 30.0  # seconds that may be spent on making a failing program smaller


class Enough(BaseException):
    """Ends hypothesis' search; carries the smallest failure found so far."""


@dataclass(frozen=True)
class Step:
    """One call; every field reaches the data or the order of things."""

    kind: str
    dtype: np.dtype
    shape: tuple[int, ...]
    op: str
    root: int
    seed: int
    extra: tuple[int, ...]  # how much larger the part of each rank is, in the uneven forms
    arrays: int  # index in KINDS
    group: int  # 0: the world, 1: a second group of all, 2: each parity of ranks
    wait: int  # how many of the Works in flight are waited for afterwards
    delays: tuple[int, ...]  # of each rank before the call, in tenths of a millisecond


def values(step, rank, shape):
    make = small if step.op == "PRODUCT" else data
    return make(rank, shape, step.dtype, step.seed)


def rows(step, source, target):
    """Rows from one rank to another; sometimes none."""
    return (step.extra[source] * 2 + step.extra[target]) % 4


def allreduce(pg, step, new):
    parts = [values(step, r, step.shape) for r in pg.ranks]
    x = new(parts[pg.rank()])
    return pg.allreduce(x, getattr(ReduceOp, step.op)), [(x, reduced(step.op, parts))]


def broadcast(pg, step, new):
    root = step.root % pg.size()
    x = new(values(step, pg.ranks[pg.rank()], step.shape))
    return pg.broadcast(x, root), [(x, values(step, pg.ranks[root], step.shape))]


def reduce(pg, step, new):
    root = step.root % pg.size()
    parts = [values(step, r, step.shape) for r in pg.ranks]
    x = new(parts[pg.rank()])
    expected = reduced(step.op, parts) if pg.rank() == root else parts[pg.rank()]
    return pg.reduce(x, root, getattr(ReduceOp, step.op)), [(x, expected)]


def scan(pg, step, new):
    parts = [values(step, r, step.shape) for r in pg.ranks[: pg.rank() + 1]]
    x = new(parts[-1])
    return pg.scan(x, getattr(ReduceOp, step.op)), [(x, reduced(step.op, parts))]


def exscan(pg, step, new):
    parts = [values(step, r, step.shape) for r in pg.ranks[: pg.rank() + 1]]
    x = new(parts[-1])
    expected = reduced(step.op, parts[:-1]) if pg.rank() else parts[0]
    return pg.exscan(x, getattr(ReduceOp, step.op)), [(x, expected)]


def uneven(step, rank):
    return values(step, rank, int(np.prod(step.shape)) + step.extra[rank])


def allgather(pg, step, new):
    parts = [uneven(step, r) for r in pg.ranks]
    outputs = [new(np.zeros_like(part)) for part in parts]
    return pg.allgather(outputs, new(parts[pg.rank()])), list(zip(outputs, parts))


def all_gather_single(pg, step, new):
    parts = [values(step, r, step.shape) for r in pg.ranks]
    output = new(np.zeros_like(np.stack(parts)))
    return pg.all_gather_single(output, new(parts[pg.rank()])), [(output, np.stack(parts))]


def gather(pg, step, new):
    root = step.root % pg.size()
    parts = [uneven(step, r) for r in pg.ranks]
    outputs = [new(np.zeros_like(part)) for part in parts] if pg.rank() == root else []
    return pg.gather(outputs, new(parts[pg.rank()]), root), list(zip(outputs, parts))


def scatter(pg, step, new):
    root = step.root % pg.size()
    parts = [uneven(step, r) for r in pg.ranks]
    inputs = [new(part) for part in parts] if pg.rank() == root else []
    output = new(np.zeros_like(parts[pg.rank()]))
    return pg.scatter(output, inputs, root), [(output, parts[pg.rank()])]


def reduce_scatter(pg, step, new):
    me = pg.rank()
    inputs = [[uneven(step, t) + values(step, s, ()) for t in pg.ranks] for s in pg.ranks]
    inputs = [[part.astype(step.dtype) for part in row] for row in inputs]
    output = new(np.zeros_like(inputs[me][me]))
    work = pg.reduce_scatter(output, [new(p) for p in inputs[me]], getattr(ReduceOp, step.op))
    return work, [(output, reduced(step.op, [row[me] for row in inputs]))]


def reduce_scatter_single(pg, step, new):
    parts = [values(step, r, (pg.size(), *step.shape)) for r in pg.ranks]
    output = new(np.zeros_like(parts[0][0]))
    work = pg.reduce_scatter_single(output, new(parts[pg.rank()]), getattr(ReduceOp, step.op))
    return work, [(output, reduced(step.op, [part[pg.rank()] for part in parts]))]


def messages(pg, step, tail):
    """What each rank sends to each: rows differ by pair."""
    return [
        [values(step, 5 * s + t, (rows(step, s, t), *tail)) for t in pg.ranks] for s in pg.ranks
    ]


def alltoall(pg, step, new):
    table = messages(pg, step, step.shape)
    expected = [row[pg.rank()] for row in table]
    outputs = [new(np.zeros_like(part)) for part in expected]
    work = pg.alltoall(outputs, [new(part) for part in table[pg.rank()]])
    return work, list(zip(outputs, expected))


def all_to_all_single(pg, step, new):
    table = messages(pg, step, step.shape[1:])
    mine, incoming = table[pg.rank()], [row[pg.rank()] for row in table]
    expected = np.concatenate(incoming)
    output = new(np.zeros_like(expected))
    splits = [len(part) for part in incoming], [len(part) for part in mine]
    return pg.all_to_all_single(output, new(np.concatenate(mine)), *splits), [(output, expected)]


def allreduce_coalesced(pg, step, new):
    shapes = [step.shape, (), (step.seed, 2)]
    parts = [[values(step, r, shape) for shape in shapes] for r in pg.ranks]
    mine = [new(part) for part in parts[pg.rank()]]
    expected = [reduced(step.op, column) for column in zip(*parts)]
    return pg.allreduce_coalesced(mine, getattr(ReduceOp, step.op)), list(zip(mine, expected))


def pieces(step, rank, repeat=1):
    """The arrays of a coalesced call: an empty one and a single element among them."""
    sizes = [int(np.prod(step.shape)), 0, 1]
    return [values(step, rank, repeat * size) for size in sizes]


def allgather_coalesced(pg, step, new):
    parts = [[*pieces(step, r), uneven(step, r)] for r in pg.ranks]
    outputs = [[new(np.zeros_like(part)) for part in row] for row in parts]
    work = pg.allgather_coalesced(outputs, [new(part) for part in parts[pg.rank()]])
    return work, [pair for row in zip(outputs, parts) for pair in zip(*row)]


def all_gather_single_coalesced(pg, step, new):
    parts = [pieces(step, r) for r in pg.ranks]
    expected = [np.concatenate(column) for column in zip(*parts)]
    outputs = [new(np.zeros_like(part)) for part in expected]
    work = pg.all_gather_single_coalesced(outputs, [new(part) for part in parts[pg.rank()]])
    return work, list(zip(outputs, expected))


def reduce_scatter_single_coalesced(pg, step, new):
    n, me = pg.size(), pg.rank()
    parts = [pieces(step, r, repeat=n) for r in pg.ranks]
    expected = [
        reduced(step.op, [np.split(part, n)[me] for part in column]) for column in zip(*parts)
    ]
    outputs = [new(np.zeros_like(part)) for part in expected]
    inputs = [new(part) for part in parts[me]]
    work = pg.reduce_scatter_single_coalesced(outputs, inputs, getattr(ReduceOp, step.op))
    return work, list(zip(outputs, expected))


def ring(pg, step, new):
    """A message to a rank a few places on, tagged."""
    hop = step.root % pg.size()
    to, source = (pg.rank() + hop) % pg.size(), (pg.rank() - hop) % pg.size()
    x = new(np.zeros(step.shape, step.dtype))
    receiving = pg.recv(x, source, tag=step.seed)
    sending = pg.send(new(values(step, pg.ranks[pg.rank()], step.shape)), to, tag=step.seed)
    return [receiving, sending], [(x, values(step, pg.ranks[source], step.shape))]


def allgather_object(pg, step, new):
    got = pg.allgather_object((step.seed, "x" * step.extra[ME] * 1000, pg.rank()))
    expected = [(step.seed, "x" * step.extra[r] * 1000, i) for i, r in enumerate(pg.ranks)]
    assert got == expected
    return [], []


def barrier(pg, step, new):
    return pg.barrier(), []


REDUCING = (
    allreduce,
    reduce,
    scan,
    exscan,
    reduce_scatter,
    reduce_scatter_single,
    allreduce_coalesced,
    reduce_scatter_single_coalesced,
)
MOVING = (
    broadcast,
    allgather,
    all_gather_single,
    gather,
    scatter,
    alltoall,
    all_to_all_single,
    allgather_coalesced,
    all_gather_single_coalesced,
    ring,
    allgather_object,
    barrier,
)
KIND_OF = {f.__name__: f for f in (*REDUCING, *MOVING)}


@st.composite
def steps(draw):
    kind = draw(st.sampled_from(sorted(KIND_OF)))
    op = draw(st.sampled_from(["SUM", "PRODUCT", "MIN", "MAX"]))
    if KIND_OF[kind] in REDUCING and op in ("MIN", "MAX"):
        dtype = draw(st.sampled_from(ORDERED))
    else:
        dtype = draw(st.sampled_from(DTYPES))
    sizes = st.sampled_from([1, 0, 2, 3, 5, 17])
    large = draw(st.integers(0, 19)) == 19
    shape = (70_001,) if large else draw(st.lists(sizes, min_size=0, max_size=3))
    return Step(
        kind,
        dtype,
        tuple(shape),
        op,
        draw(st.integers(0, N - 1)),
        draw(st.integers(0, 9)),
        draw(st.tuples(*[st.integers(0, 3)] * N)),
        draw(st.integers(0, len(KINDS) - 1)),
        draw(st.integers(0, 2)),
        draw(st.integers(0, 3)),
        draw(st.tuples(*[st.sampled_from([0, 0, 0, 0, 1, 5, 20])] * N)),
    )


def make_groups():
    world = mc.new_group(timeout=5)
    return [world, mc.new_group("mpi", timeout=5), world.split(ME % 2)]


def run(groups, program):
    """Carry out a program; several calls stay in flight between waits."""
    in_flight = []

    def finish(count):
        for _ in range(min(count, len(in_flight))):
            step, works, kind, results = in_flight.pop(0)
            mc.wait_all(works)
            for got, expected in results:
                assert kind.same(got, expected), f"{step}:\n{kind.numpy(got)}\n{expected}"

    for step in program:
        kind = KINDS[step.arrays]
        if kind.name != "numpy" and not (TORCH and kind.holds(step.dtype)):
            kind = KINDS[0]
        if step.delays[ME]:
            time.sleep(step.delays[ME] * 1e-4)
        works, results = KIND_OF[step.kind](groups[step.group], step, kind.array)
        works = works if isinstance(works, list) else [works]
        in_flight.append((step, works, kind, results))
        finish(step.wait)
    finish(len(in_flight))


try:
    import torch  # noqa: F401

    TORCH = True
except ImportError:
    TORCH = False


@pytest.mark.parametrize("ops_per_program", [8])
def test_random_programs_equal_numpy(world, ops_per_program):
    groups = make_groups()
    examples = 0
    give_up = float("inf")

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(st.lists(steps(), min_size=1, max_size=ops_per_program))
    def programs(program):
        nonlocal groups, examples, give_up
        examples += 1
        problem = ""
        try:
            run(groups, program)
        except Exception:
            problem = traceback.format_exc(limit=4)
        mine = (zlib.crc32(repr(program).encode()), problem, time.monotonic() > give_up)
        everyone = world.allgather(mine)
        assert len({crc for crc, *_ in everyone}) == 1, "the ranks drew different programs"
        problems = [f"rank {r}:\n{text}" for r, (_, text, _) in enumerate(everyone) if text]
        if not problems:
            return
        for group in groups:
            group.abort()
        groups = make_groups()
        listed = "\n".join(["the program:", *map(str, program), *problems])
        if give_up == float("inf"):
            give_up = time.monotonic() + SHRINKING
        if everyone[0][2]:  # rank 0's clock decides for all
            raise Enough(listed)
        raise AssertionError(listed)

    try:
        programs()
    except Enough as enough:
        pytest.fail(str(enough))
    assert examples >= EXAMPLES
    for group in groups:
        group.shutdown()
