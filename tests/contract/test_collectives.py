"""Every collective against NumPy: array kinds x backends x odd sizes x roots x operators."""

from __future__ import annotations

import numpy as np
import pytest

from mpicoll import ReduceOp
from tests.contract.arrays import SIZES, data, reduced, small

pytestmark = pytest.mark.mpi
MOVED = ("f4", "i2", "c16")


@pytest.fixture(params=SIZES)
def size(request):
    return request.param


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "AVG"])
def test_allreduce(pg, kind, size, op):
    values = small if op == "PRODUCT" else data
    for dtype in ("f4", "f8") if op == "AVG" else ("f4", "i4"):
        parts = [values(r, size, dtype) for r in range(pg.size())]
        x = kind.array(parts[pg.rank()])
        assert pg.allreduce(x, getattr(ReduceOp, op)).wait() is True
        assert kind.same(x, reduced(op, parts))


def test_broadcast(pg, kind, size):
    for root in range(pg.size()):
        for dtype in MOVED:
            x = kind.array(data(pg.rank(), size, dtype, seed=root))
            pg.broadcast(x, root).wait()
            assert kind.same(x, data(root, size, dtype, seed=root)), (root, dtype)


def test_reduce_leaves_the_inputs_of_others_alone(pg, kind, size):
    for root in range(pg.size()):
        for op in ("SUM", "MAX"):
            parts = [data(r, size, "f4", seed=root) for r in range(pg.size())]
            x = kind.array(parts[pg.rank()])
            pg.reduce(x, root, getattr(ReduceOp, op)).wait()
            expected = reduced(op, parts) if pg.rank() == root else parts[pg.rank()]
            assert kind.same(x, expected), (root, op)


def test_allgather_of_differing_sizes(pg, kind, size):
    for dtype in MOVED:
        parts = [data(r, size + r, dtype) for r in range(pg.size())]
        outputs = [kind.full(size + r, 9, dtype) for r in range(pg.size())]
        pg.allgather(outputs, kind.array(parts[pg.rank()])).wait()
        assert all(map(kind.same, outputs, parts)), dtype


@pytest.mark.parametrize("stacked", [False, True])
def test_all_gather_single(pg, kind, size, stacked):
    parts = [data(r, size) for r in range(pg.size())]
    join = np.stack if stacked else np.concatenate
    output = kind.full(join(parts).shape, 9)
    pg.all_gather_single(output, kind.array(parts[pg.rank()])).wait()
    assert kind.same(output, join(parts))


def test_gather_of_differing_sizes(pg, kind, size):
    for root in range(pg.size()):
        parts = [data(r, size + r, "i8", seed=root) for r in range(pg.size())]
        at_root = pg.rank() == root
        outputs = [kind.full(size + r, 9, "i8") for r in range(pg.size())] if at_root else []
        pg.gather(outputs, kind.array(parts[pg.rank()]), root).wait()
        assert all(map(kind.same, outputs, parts)), root


def test_scatter_of_differing_sizes(pg, kind, size):
    for root in range(pg.size()):
        parts = [data(r, size + r, "i8", seed=root) for r in range(pg.size())]
        inputs = [kind.array(part) for part in parts] if pg.rank() == root else []
        output = kind.full(size + pg.rank(), 9, "i8")
        pg.scatter(output, inputs, root).wait()
        assert kind.same(output, parts[pg.rank()]), root


@pytest.mark.parametrize("op", ["SUM", "MAX"])
def test_reduce_scatter_of_differing_sizes(pg, kind, size, op):
    n, me = pg.size(), pg.rank()
    inputs = [[data(r, size + i, "i4", seed=i) for i in range(n)] for r in range(n)]
    output = kind.full(size + me, 9, "i4")
    mine = [kind.array(part) for part in inputs[me]]
    pg.reduce_scatter(output, mine, getattr(ReduceOp, op)).wait()
    assert kind.same(output, reduced(op, [inputs[r][me] for r in range(n)]))
    assert all(map(kind.same, mine, inputs[me])), "the inputs were written"


@pytest.mark.parametrize("op", ["SUM", "MIN"])
def test_reduce_scatter_single(pg, kind, size, op):
    n, me = pg.size(), pg.rank()
    inputs = [data(r, n * size) for r in range(n)]
    output, mine = kind.full(size, 9), kind.array(inputs[me])
    pg.reduce_scatter_single(output, mine, getattr(ReduceOp, op)).wait()
    assert kind.same(output, reduced(op, inputs)[me * size : (me + 1) * size])
    assert kind.same(mine, inputs[me]), "the input was written"


def test_alltoall_of_differing_sizes(pg, kind, size):
    n, me = pg.size(), pg.rank()

    def message(source, target):
        return data(source * 5 + target, size + source + 2 * target, "i2")

    outputs = [kind.full(message(j, me).shape, 9, "i2") for j in range(n)]
    pg.alltoall(outputs, [kind.array(message(me, j)) for j in range(n)]).wait()
    assert all(kind.same(out, message(j, me)) for j, out in enumerate(outputs))


@pytest.mark.parametrize("splits", ["none", "empty", "given"])
def test_all_to_all_single_even(pg, kind, size, splits):
    n, me = pg.size(), pg.rank()
    parts = [data(r, (n * size, 2)) for r in range(n)]
    output = kind.full((n * size, 2), 9)
    given = {"none": None, "empty": [], "given": [size] * n}[splits]
    pg.all_to_all_single(output, kind.array(parts[me]), given, given).wait()
    rows = slice(me * size, (me + 1) * size)
    assert kind.same(output, np.concatenate([part[rows] for part in parts]))


def test_all_to_all_single_uneven_with_zero_rows(pg, kind, size):
    n, me = pg.size(), pg.rank()

    def rows(source, target):  # none at all on one diagonal
        return 0 if (source + target) % n == n - 1 else size + source + 3 * target

    def message(source, target):
        return data(source * 5 + target, (rows(source, target), 3), "f8")

    output = kind.full((sum(rows(j, me) for j in range(n)), 3), 9, "f8")
    mine = np.concatenate([message(me, j) for j in range(n)])
    incoming, outgoing = [rows(j, me) for j in range(n)], [rows(me, j) for j in range(n)]
    pg.all_to_all_single(output, kind.array(mine), incoming, outgoing).wait()
    assert kind.same(output, np.concatenate([message(j, me) for j in range(n)]))


@pytest.mark.parametrize("op", ["SUM", "MAX"])
def test_scan_and_exscan(pg, kind, size, op):
    parts = [data(r, size) for r in range(pg.size())]
    me = pg.rank()
    inclusive, exclusive = kind.array(parts[me]), kind.array(parts[me])
    pg.scan(inclusive, getattr(ReduceOp, op)).wait()
    pg.exscan(exclusive, getattr(ReduceOp, op)).wait()
    assert kind.same(inclusive, reduced(op, parts[: me + 1]))
    assert kind.same(exclusive, reduced(op, parts[:me]) if me else parts[0])


def coalesced(r, size):
    """Three arrays of differing shape and dtype, as rank `r` holds them."""
    return [data(r, size), data(r, (size, 2), "i8", seed=1), data(r, (), "f8", seed=2)]


def test_allreduce_coalesced(pg, kind, size):
    parts = [coalesced(r, size) for r in range(pg.size())]
    mine = [kind.array(part) for part in parts[pg.rank()]]
    pg.allreduce_coalesced(mine, ReduceOp.MAX).wait()
    assert all(map(kind.same, mine, [reduced("MAX", column) for column in zip(*parts)]))


def test_allgather_coalesced(pg, kind, size):
    parts = [coalesced(r, size) for r in range(pg.size())]
    outputs = [[kind.full(part.shape, 9, part.dtype) for part in row] for row in parts]
    pg.allgather_coalesced(outputs, [kind.array(part) for part in parts[pg.rank()]]).wait()
    for row, expected in zip(outputs, parts, strict=True):
        assert all(map(kind.same, row, expected))


def test_all_gather_single_coalesced(pg, kind, size):
    parts = [coalesced(r, size)[:2] for r in range(pg.size())]
    expected = [np.concatenate(column) for column in zip(*parts)]
    outputs = [kind.full(part.shape, 9, part.dtype) for part in expected]
    inputs = [kind.array(part) for part in parts[pg.rank()]]
    pg.all_gather_single_coalesced(outputs, inputs).wait()
    assert all(map(kind.same, outputs, expected))


def test_reduce_scatter_single_coalesced(pg, kind, size):
    n, me = pg.size(), pg.rank()
    parts = [coalesced(r, n * size)[:2] for r in range(n)]
    rows = slice(me * size, (me + 1) * size)
    expected = [reduced("SUM", column)[rows] for column in zip(*parts)]
    outputs = [kind.full(part.shape, 9, part.dtype) for part in expected]
    inputs = [kind.array(part) for part in parts[me]]
    pg.reduce_scatter_single_coalesced(outputs, inputs, ReduceOp.SUM).wait()
    assert all(map(kind.same, outputs, expected))


def test_a_one_element_list_is_accepted_where_an_array_is(pg, kind):
    parts = [data(r, 5) for r in range(pg.size())]
    x = kind.array(parts[pg.rank()])
    pg.allreduce([x]).wait()
    assert kind.same(x, reduced("SUM", parts))
    pg.broadcast([x], 0).wait()
    outputs = [kind.full(5, 9) for _ in parts]
    pg.allgather(outputs, [x]).wait()
    assert all(kind.same(out, reduced("SUM", parts)) for out in outputs)


@pytest.mark.parametrize("dtype", ["f4", "f8", "c16"])
def test_premul_sum_takes_each_ranks_own_factor(pg, kind, dtype):
    parts = [data(r, 1000, dtype) for r in range(pg.size())]
    x = kind.array(parts[pg.rank()])
    pg.allreduce(x, ReduceOp.PREMUL_SUM(0.5 * (pg.rank() + 1))).wait()
    scaled = [(part * np.asarray(0.5 * (r + 1), dtype)) for r, part in enumerate(parts)]
    assert kind.same(x, reduced("SUM", scaled))


def test_barrier_waits_for_the_last(pg, world):
    """Nobody leaves before everybody has come: rank 0 comes late and says so beforehand."""
    import time

    flag = np.zeros(1)
    request = world.Irecv(flag, source=0, tag=77) if pg.rank() else None
    if pg.rank() == 0:
        time.sleep(0.05)
        for peer in range(1, pg.size()):
            world.Isend(np.ones(1), dest=peer, tag=77).Wait()
    pg.barrier().wait()
    if request is not None:
        arrived = request.Test()
        request.Wait()
        assert arrived and flag[0] == 1


def test_shapes_of_any_number_of_dimensions(pg, kind):
    for shape in [(), (1,), (3, 5), (2, 3, 4), (4, 0, 2), (1, 1, 1, 1, 7)]:
        parts = [data(r, shape, "f8") for r in range(pg.size())]
        x = kind.array(parts[pg.rank()])
        pg.allreduce(x).wait()
        assert kind.same(x, reduced("SUM", parts)), shape
        pg.broadcast(x, pg.size() - 1).wait()
        assert kind.same(x, reduced("SUM", parts)), shape
