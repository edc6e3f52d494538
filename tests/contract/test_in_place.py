"""What a rank gives to itself may lie where it is to come; any other overlap is refused.

Each rank decides for itself: here every second one is in place.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpicoll import ReduceOp
from mpicoll.errors import InvalidCallError
from mpicoll.transports import select
from tests.contract.arrays import NUMPY, Torch, data, reduced

pytestmark = pytest.mark.mpi
SIZES = (1, 5, 1000, 70_001, 1_200_000)  # the last is read from the peers' memory, where it can be


@pytest.fixture(params=SIZES)
def length(request):
    return request.param


@pytest.fixture(params=[0, 1, None])
def odd(request):
    """Ranks of which parity are in place; None: all."""
    return request.param


def here(pg, odd):
    return odd is None or pg.rank() % 2 == odd


def own(array, rank, length):
    return array[rank * length : (rank + 1) * length]


def test_all_gather_single_in_place(pg, kind, length, odd):
    n, me = pg.size(), pg.rank()
    parts = [data(r, length) for r in range(n)]
    output = kind.full(n * length, 9)
    source = own(output, me, length) if here(pg, odd) else kind.full(length, 0)
    kind.fill(source, parts[me])
    pg.all_gather_single(output, source).wait()
    assert kind.same(output, np.concatenate(parts))


def test_allgather_in_place(pg, kind, length, odd):
    n, me = pg.size(), pg.rank()
    parts = [data(r, length + r, "i2") for r in range(n)]
    outputs = [kind.full(length + r, 9, "i2") for r in range(n)]
    source = outputs[me] if here(pg, odd) else kind.full(length + me, 0, "i2")
    kind.fill(source, parts[me])
    pg.allgather(outputs, source).wait()
    assert all(map(kind.same, outputs, parts))


def test_gather_in_place(pg, kind, length):
    n, me = pg.size(), pg.rank()
    for root in range(n):
        parts = [data(r, length + r, "f8", seed=root) for r in range(n)]
        outputs = [kind.full(length + r, 9, "f8") for r in range(n)]
        kind.fill(outputs[me], parts[me])
        pg.gather(outputs, outputs[me], root).wait()
        if me == root:
            assert all(map(kind.same, outputs, parts))


def test_scatter_in_place(pg, kind, length):
    n, me = pg.size(), pg.rank()
    for root in range(n):
        parts = [data(r, length + r, "f8", seed=root) for r in range(n)]
        inputs = [kind.array(part) for part in parts]
        output = inputs[me] if me == root else kind.full(length + me, 9, "f8")
        pg.scatter(output, inputs, root).wait()
        assert kind.same(output, parts[me])
        assert all(map(kind.same, inputs, parts)), "an input was written"


@pytest.mark.parametrize("op", ["SUM", "MAX"])
def test_reduce_scatter_single_in_place(pg, kind, length, odd, op):
    n, me = pg.size(), pg.rank()
    inputs = [data(r, n * length) for r in range(n)]
    mine = kind.array(inputs[me])
    output = own(mine, me, length) if here(pg, odd) else kind.full(length, 9)
    pg.reduce_scatter_single(output, mine, getattr(ReduceOp, op)).wait()
    expected = own(reduced(op, inputs), me, length)
    assert kind.same(output, expected)
    if here(pg, odd):
        inputs[me][me * length : (me + 1) * length] = expected
    assert kind.same(mine, inputs[me]), "the rest of the input was written"


@pytest.mark.parametrize("op", ["SUM", "MAX"])
def test_reduce_scatter_in_place(pg, kind, length, odd, op):
    n, me = pg.size(), pg.rank()
    inputs = [[data(r, length + i, "f4", seed=i) for i in range(n)] for r in range(n)]
    mine = [kind.array(part) for part in inputs[me]]
    output = mine[me] if here(pg, odd) else kind.full(length + me, 9)
    pg.reduce_scatter(output, mine, getattr(ReduceOp, op)).wait()
    assert kind.same(output, reduced(op, [inputs[r][me] for r in range(n)]))
    others = [i for i in range(n) if i != me]
    assert all(kind.same(mine[i], inputs[me][i]) for i in others), "another input was written"


def test_alltoall_with_ones_own_in_place(pg, kind, length, odd):
    n, me = pg.size(), pg.rank()

    def message(source, target):
        return data(source * 5 + target, length + source + 2 * target, "i2")

    inputs = [kind.array(message(me, j)) for j in range(n)]
    outputs = [kind.full(message(j, me).shape, 9, "i2") for j in range(n)]
    if here(pg, odd):
        outputs[me] = inputs[me]
    pg.alltoall(outputs, inputs).wait()
    assert all(kind.same(out, message(j, me)) for j, out in enumerate(outputs))


def test_all_to_all_single_with_ones_own_in_place(pg, kind, length):
    """Each rank keeps its part; rank 0 also sends one row to each other, which is all they get."""
    n, me = pg.size(), pg.rank()
    parts = [data(r, length) for r in range(n)]
    sent = data(9, n - 1)
    if me == 0:
        source = kind.array(np.concatenate([parts[0], sent]))
        output, gives, gets = source[:length], [length] + [1] * (n - 1), [length] + [0] * (n - 1)
    else:
        output = kind.full(1 + length, 9)
        source, gives, gets = output[1:], [0] * n, [0] * n
        gives[me] = gets[me] = length
        gets[0] = 1
        kind.fill(source, parts[me])
    pg.all_to_all_single(output, source, gets, gives).wait()
    assert kind.same(
        output, np.concatenate([sent[me - 1 : me], parts[me]]) if me else parts[0].copy()
    )


def test_coalesced_calls_in_place(pg, kind, length):
    n, me = pg.size(), pg.rank()
    parts = [[data(r, length, seed=s) for r in range(n)] for s in (0, 1)]
    outputs = [kind.full(n * length, 9) for _ in parts]
    sources = [own(outputs[0], me, length), kind.full(length, 9)]
    for source, values in zip(sources, parts, strict=True):
        kind.fill(source, values[me])
    pg.all_gather_single_coalesced(outputs, sources).wait()
    assert all(kind.same(o, np.concatenate(p)) for o, p in zip(outputs, parts, strict=True))
    inputs = [kind.array(np.concatenate(p) + me) for p in parts]
    totals = [reduced("SUM", [np.concatenate(p) + r for r in range(n)]) for p in parts]
    outputs = [kind.full(length, 9), own(inputs[1], me, length)]
    pg.reduce_scatter_single_coalesced(outputs, inputs).wait()
    assert all(kind.same(o, own(t, me, length)) for o, t in zip(outputs, totals, strict=True))


def test_every_other_overlap_is_refused(pg, kind):
    n, me = pg.size(), pg.rank()
    x = kind.full(8 * n + 8, 1)
    outputs = [own(x, r, 4) for r in range(n)]
    inputs = [own(x[4 * n :], r, 4) for r in range(n)]
    another = outputs[(me + 1) % n] if n > 1 else x[1:5]
    calls = [
        lambda: pg.all_gather_single(x[: 4 * n], x[4 * me + 1 : 4 * me + 5]),
        lambda: pg.allgather(outputs, another),
        lambda: pg.gather(outputs, another, me),
        lambda: pg.scatter(another, outputs, me),
        lambda: pg.reduce_scatter(another, outputs),
        lambda: pg.reduce_scatter_single(x[4 * me + 1 : 4 * me + 5], x[: 4 * n]),
        lambda: pg.alltoall(outputs, [another] * n),
        lambda: pg.all_to_all_single(x[: 4 * n], x[2 : 4 * n + 2]),
    ]
    if n > 1:
        twice = [*inputs]
        twice[me - 1] = outputs[me]
        calls.append(lambda: pg.alltoall(outputs, twice))
    for call in calls:
        with pytest.raises(InvalidCallError, match="overlap"):
            call()


def test_what_a_part_in_place_is_of_counts_in_a_coalesced_call(pg, kind):
    n, me = pg.size(), pg.rank()
    x = kind.full(4 * n, 1)
    part = own(x, me, 4)
    for call in (
        lambda: pg.all_gather_single_coalesced([x, kind.full(4 * n, 0)], [part, x[:4]]),
        lambda: pg.reduce_scatter_single_coalesced([part, x[:4]], [x, kind.full(4 * n, 0)]),
    ):
        with pytest.raises(InvalidCallError, match="overlap"):
            call()


@pytest.mark.parametrize("odd", [0, None])
@pytest.mark.parametrize("tuning", [replace(select.tuning, mpi_elements=5)], ids=["5"])
def test_in_place_in_pieces(pg, odd):
    for length in (1, 5, 6, 17):
        test_all_gather_single_in_place(pg, NUMPY, length, odd)
        test_allgather_in_place(pg, NUMPY, length, odd)
        test_gather_in_place(pg, NUMPY, length)
        test_scatter_in_place(pg, NUMPY, length)
        test_reduce_scatter_single_in_place(pg, NUMPY, length, odd, "SUM")
        test_reduce_scatter_in_place(pg, NUMPY, length, odd, "MAX")
        test_alltoall_with_ones_own_in_place(pg, NUMPY, length, odd)
        test_all_to_all_single_with_ones_own_in_place(pg, NUMPY, length)


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_shared_arrays_in_place(pg, dtype):
    n, me = pg.size(), pg.rank()
    inputs = [data(r, n * 1000, dtype) for r in range(n)]
    shared = pg.empty(n * 1000, dtype)
    shared[...] = inputs[me]
    pg.reduce_scatter_single(own(shared, me, 1000), shared).wait()
    assert NUMPY.same(own(shared, me, 1000).copy(), own(reduced("SUM", inputs), me, 1000))


def test_rows_of_an_array_in_place(pg, kind):
    """An array that stands for a list, and its own row as the input."""
    if not (kind is NUMPY or isinstance(kind, Torch)):
        pytest.skip(f"an array of {kind.name} stands for no list")
    n, me = pg.size(), pg.rank()
    parts = [data(r, (3, 2)) for r in range(n)]
    output = kind.full((n, 3, 2), 9)
    kind.fill(output[me], parts[me])
    pg.allgather(output, output[me]).wait()
    assert kind.same(output, np.stack(parts))
