"""Every dtype moves; every dtype x operator pair is right, or refused on every rank."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest

from mpicoll import ReduceOp
from mpicoll.errors import CollectiveMismatchError, UnsupportedError
from tests.contract.arrays import (
    BFLOAT16,
    COMPLEX,
    DTYPES,
    FLOATS,
    INTEGERS,
    NUMPY,
    OPS,
    data,
    reduced,
    small,
)

pytestmark = pytest.mark.mpi
BOOL = np.dtype(bool)
MUST_WORK = {
    *((dtype, op) for dtype in INTEGERS for op in OPS if op != "AVG"),
    *((dtype, op) for dtype in FLOATS for op in ("SUM", "AVG", "PRODUCT")),
    *((dtype, op) for dtype in FLOATS if dtype.char != "g" for op in ("MIN", "MAX")),
    *((dtype, op) for dtype in COMPLEX for op in ("SUM", "AVG", "PRODUCT")),
    *((BOOL, op) for op in ("SUM", "PRODUCT", "MIN", "MAX", "BAND", "BOR")),
}
MUST_BE_REFUSED = {
    *((dtype, "AVG") for dtype in (*INTEGERS, BOOL)),
    *((dtype, op) for dtype in (*FLOATS, *COMPLEX) for op in ("BAND", "BOR", "BXOR")),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_moves(pg, kind, dtype):
    if not kind.holds(dtype):
        pytest.skip(f"{kind.name} has no {dtype}")
    n, me = pg.size(), pg.rank()
    parts = [data(r, (n * 3, 2), dtype) for r in range(n)]
    x = kind.array(parts[me])
    for root in range(n):
        copy = kind.array(parts[me])
        pg.broadcast(copy, root).wait()
        assert kind.same(copy, parts[root])
    outputs = [kind.full((n * 3, 2), 1, dtype) for _ in range(n)]
    pg.allgather(outputs, x).wait()
    assert all(map(kind.same, outputs, parts))
    exchanged = kind.full((n * 3, 2), 1, dtype)
    pg.all_to_all_single(exchanged, x, None, None).wait()
    expected = np.concatenate([part[me * 3 : me * 3 + 3] for part in parts])
    assert kind.same(exchanged, expected)
    received = kind.full((n * 3, 2), 1, dtype)
    sending = pg.send(x, (me + 1) % n)
    pg.recv(received, (me - 1) % n).wait()
    sending.wait()
    assert kind.same(received, parts[me - 1])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "int4"])
def test_types_of_ml_dtypes_move_and_never_reduce_wrongly(pg, name):
    dtype = np.dtype(getattr(ml_dtypes, name))
    parts = [(np.arange(7) % 4 + r % 3).astype(dtype) for r in range(pg.size())]
    x = parts[pg.rank()].copy()
    pg.broadcast(x, pg.size() - 1).wait()
    assert (x == parts[-1]).all()
    with pytest.raises(UnsupportedError):
        pg.allreduce(x).wait()
    assert (x == parts[-1]).all(), "a refused call wrote its buffer"


POINT = np.dtype([("id", "i4"), ("at", "f8", 3), ("name", "U5")])
DESCRIBED = [
    *map(np.dtype, ("S5", "S2", "U3", "V7", "V8", "M8[s]", "m8[ns]", "M8", "U300", "V70001")),
    *(
        POINT,
        np.dtype([("flag", "?"), ("x", "f4")]),
        np.dtype([("a", "i1"), ("b", "i8")], align=True),
    ),
    np.dtype((np.record, POINT)),
]


def described(rank, shape, dtype, seed=0):
    """Arrays of a dtype that only moves, all of whose bytes differ between ranks."""
    count = int(np.prod(shape)) * dtype.itemsize
    octets = np.random.default_rng((rank, seed)).integers(32, 127, count, np.uint8)
    if dtype.kind == "U":
        octets.view(np.uint32)[...] &= 0x7F
    return octets.view(dtype).reshape(shape)


def as_bytes(array):
    array = np.asarray(array)
    if array.dtype.names:  # what lies between the fields NumPy doesn't copy either
        array = array.astype([(name, array.dtype[name]) for name in array.dtype.names])
    return array.tobytes()


@pytest.mark.parametrize("size", [0, 1, 3, 1000])
@pytest.mark.parametrize("dtype", DESCRIBED, ids=lambda dtype: str(dtype)[:30])
def test_what_is_in_no_table_moves(pg, dtype, size):
    n, me = pg.size(), pg.rank()
    if size == 1000 and dtype.itemsize > 10_000:
        size = 100  # 7 MB
    parts = [described(r, size, dtype) for r in range(n)]
    mine = parts[me]

    def empty(*shape):
        return np.zeros(shape or size, dtype)

    for root in {0, n - 1}:
        x = mine.copy()
        pg.broadcast(x, root).wait()
        assert as_bytes(x) == as_bytes(parts[root])
        outputs = [empty() for _ in range(n)] if me == root else []
        pg.gather(outputs, mine, root).wait()
        assert all(map(_same_bytes, outputs, parts))
        x = empty()
        pg.scatter(x, parts if me == root else [], root).wait()
        assert as_bytes(x) == as_bytes(mine)
    outputs = [empty() for _ in range(n)]
    pg.allgather(outputs, mine).wait()
    assert all(map(_same_bytes, outputs, parts))
    outputs = [empty() for _ in range(n)]
    pg.alltoall(outputs, [described(me, size, dtype, seed=j) for j in range(n)]).wait()
    assert all(map(_same_bytes, outputs, [described(r, size, dtype, seed=me) for r in range(n)]))
    output = empty(n, size)
    pg.all_gather_single(output, mine).wait()
    assert as_bytes(output) == as_bytes(np.stack(parts))
    output = empty(n, size)
    pg.all_to_all_single(output, np.stack([mine] * n), None, None).wait()
    assert as_bytes(output) == as_bytes(np.stack(parts))
    outputs, two = [empty(n, size), empty(n, size)], [mine, mine[::-1].copy()]
    pg.all_gather_single_coalesced(outputs, two).wait()
    assert as_bytes(outputs[1]) == as_bytes(np.stack([part[::-1] for part in parts]))
    x = empty()
    sending = pg.send(mine, (me + 1) % n)
    pg.recv(x, (me - 1) % n).wait()
    sending.wait()
    assert as_bytes(x) == as_bytes(parts[me - 1])


def _same_bytes(a, b):
    return as_bytes(a) == as_bytes(b)


def test_uneven_parts_of_what_is_in_no_table_move(pg):
    n, me = pg.size(), pg.rank()
    parts = [described(r, 3 * r + 1, POINT) for r in range(n)]
    outputs = [np.zeros(3 * r + 1, POINT) for r in range(n)]
    pg.allgather(outputs, parts[me]).wait()
    assert all(map(_same_bytes, outputs, parts))
    x = np.zeros(n * (me + 1), POINT)
    rows = [r + 1 for r in range(n)]
    pg.all_to_all_single(x, described(me, sum(rows), POINT), [me + 1] * n, rows).wait()
    starts = np.cumsum([0, *rows])
    expected = [described(r, sum(rows), POINT)[starts[me] : starts[me + 1]] for r in range(n)]
    assert as_bytes(x) == as_bytes(np.concatenate(expected))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("one", "other", "names"),
    [
        ("M8[s]", "M8[ms]", ("datetime64[s][3]", "datetime64[ms][3]")),
        ("M8[s]", "i8", ("datetime64[s][3]", "int64[3]")),
        ("S5", "S6", ("S5[3]", "S6[3]")),
        ("S8", "f8", ("S8[3]", "float64[3]")),
        (
            [("a", "f4"), ("b", "i4")],
            [("a", "i4"), ("b", "f4")],
            ("{a: float32, b: int32}[3]", "{a: int32, b: float32}[3]"),
        ),
    ],
    ids=str,
)
def test_descriptions_that_differ_are_a_mismatch_that_says_both(pg, one, other, names):
    x = np.zeros(3, other if pg.rank() == 1 else one)
    with pytest.raises(CollectiveMismatchError) as caught:
        pg.broadcast(x, 0).wait()
    assert all(f"broadcast({name}, root=0)" in str(caught.value) for name in names)
    if pg.rank() == 1:
        pg.send(x, 0).wait()
    elif pg.rank() == 0:
        with pytest.raises(CollectiveMismatchError) as caught:
            pg.recv(x, 1).wait()
        assert f"recv({names[0]}, src=1, tag=0): rank 1 sent {names[1]}" in str(caught.value)
    pg.barrier().wait()


@pytest.mark.parametrize("size", [1, 5, 1000, 70_001])
@pytest.mark.parametrize("op", ["MIN", "MAX"])
@pytest.mark.parametrize("dtype", ["M8[s]", "m8[ns]", "M8"])
def test_dates_have_a_minimum_and_a_maximum(pg, world, dtype, op, size):
    n, me = pg.size(), pg.rank()
    ufunc = {"MIN": np.minimum, "MAX": np.maximum}[op]
    parts = [
        np.random.default_rng((r, 7)).integers(-(2**63), 2**63, size, np.int64) for r in range(n)
    ]
    for r, part in enumerate(parts):  # NaT on one rank, or on all
        part[r::10] = np.iinfo(np.int64).min
        part[9::10] = np.iinfo(np.int64).min
        part[8::10] = np.iinfo(np.int64).max
    parts = [part.view(dtype) for part in parts]
    expected = functools.reduce(ufunc, parts)
    reduce_op = getattr(ReduceOp, op)
    x = parts[me].copy()
    pg.allreduce(x, reduce_op).wait()
    assert as_bytes(x) == as_bytes(expected)
    x = parts[me].copy()
    pg.reduce(x, n - 1, reduce_op).wait()
    assert as_bytes(x) == as_bytes(expected if me == n - 1 else parts[me])
    x = parts[me].copy()
    pg.scan(x, reduce_op).wait()
    assert as_bytes(x) == as_bytes(functools.reduce(ufunc, parts[: me + 1]))
    x = np.zeros(size, dtype)
    pg.reduce_scatter(x, parts, reduce_op).wait()
    assert as_bytes(x) == as_bytes(parts[me])
    x = np.zeros(size, dtype)
    pg.reduce_scatter_single(x, np.tile(parts[me], n), reduce_op).wait()
    assert as_bytes(x) == as_bytes(expected)
    shared = pg.empty(size, dtype)
    shared[...] = parts[me]
    pg.allreduce(shared, reduce_op).wait()
    assert as_bytes(shared) == as_bytes(expected)


def test_shared_arrays_of_what_is_in_no_table(pg):
    n, me = pg.size(), pg.rank()
    shared = pg.empty((2, 3), POINT)
    assert (shared.dtype, shared.shape) == (POINT, (2, 3))
    shared[...] = described(me, (2, 3), POINT)
    pg.broadcast(shared, n - 1).wait()
    assert as_bytes(shared) == as_bytes(described(n - 1, (2, 3), POINT))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pair_is_right_or_refused(pg, kind, world, dtype, op):
    if not kind.holds(dtype):
        pytest.skip(f"{kind.name} has no {dtype}")
    values = small if op == "PRODUCT" else data
    n, me = pg.size(), pg.rank()
    for size in (0, 1, 5, 1000):
        parts = [values(r, size, dtype) for r in range(n)]
        x = kind.array(parts[me])
        try:
            pg.allreduce(x, getattr(ReduceOp, op)).wait()
            refused = False
        except UnsupportedError as error:
            refused = True
            assert op in str(error), error
        assert world.allgather(refused) == [refused] * n, "refused on some ranks only"
        assert not (refused and (dtype, op) in MUST_WORK)
        assert refused or (dtype, op) not in MUST_BE_REFUSED
        assert kind.same(x, parts[me] if refused else reduced(op, parts)), size


@pytest.mark.parametrize("dtype", [*"efdFD", BFLOAT16, "?", "b", "L"], ids=str)
def test_the_other_reductions_agree_with_allreduce(pg, kind, dtype):
    if not kind.holds(dtype):
        pytest.skip(f"{kind.name} has no {dtype}")
    n, me = pg.size(), pg.rank()
    parts = [data(r, (n, 3), dtype) for r in range(n)]
    total = reduced("SUM", parts)
    x = kind.array(parts[me])
    pg.reduce(x, n - 1).wait()
    assert kind.same(x, total if me == n - 1 else parts[me])
    row = kind.full((1, 3), 1, dtype)
    pg.reduce_scatter_single(row, kind.array(parts[me])).wait()
    assert kind.same(row, total[me : me + 1])
    row = kind.full(3, 1, dtype)
    pg.reduce_scatter(row, [kind.array(part) for part in parts[me]]).wait()
    assert kind.same(row, total[me])
    prefix = kind.array(parts[me])
    pg.scan(prefix).wait()
    assert kind.same(prefix, reduced("SUM", parts[: me + 1]))


@pytest.mark.parametrize("dtype", ["e", BFLOAT16], ids=str)
def test_half_precision_is_rounded_once(pg, kind, dtype):
    """One large and many small terms: rounding after each addition would lose the small."""
    dtype = np.dtype(dtype)
    large = 2048.0 if dtype.char == "e" else 256.0
    parts = [np.full(70_001, large if r == 0 else 0.75, dtype) for r in range(pg.size())]
    x = kind.array(parts[pg.rank()])
    pg.allreduce(x).wait()
    assert kind.same(x, reduced("SUM", parts))


@pytest.mark.parametrize("op", ["MIN", "MAX"])
@pytest.mark.parametrize("dtype", [*"efd", BFLOAT16], ids=str)
def test_nan_wins_with_the_same_bits_everywhere(pg, kind, world, dtype, op):
    n = pg.size()
    parts = [data(r, 2 * n + 1, dtype) for r in range(n)]
    for r, part in enumerate(parts):  # a NaN on one rank; on all but one; signed zeros last
        part[r] = np.nan
        part[n : 2 * n] = np.where(np.arange(n) == r, 1, np.nan).astype(dtype)
        part[2 * n] = -0.0 if r % 2 else 0.0
    x = kind.array(parts[pg.rank()])
    pg.allreduce(x, getattr(ReduceOp, op)).wait()
    got = kind.numpy(x)
    assert np.isnan(got[:n].astype("f8")).all()
    assert np.isnan(got[n : 2 * n].astype("f8")).all() == (n > 1)
    assert len(set(world.allgather(got.tobytes()))) == 1, "the ranks hold different bits"


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX", "BXOR"])
def test_integers_of_any_size_are_reduced_as_numpy_does(pg, op):
    """Sums and products that overflow wrap around; some MPIs saturate, in long arrays only."""
    for dtype in INTEGERS:
        info, size = np.iinfo(dtype), 1003
        parts = [
            np.random.default_rng(r).integers(info.min, info.max, size, dtype, endpoint=True)
            for r in range(pg.size())
        ]
        x = parts[pg.rank()].copy()
        pg.allreduce(x, getattr(ReduceOp, op)).wait()
        assert NUMPY.same(x, reduced(op, parts)), dtype


def test_sums_have_the_same_bits_on_every_rank(pg, world):
    for dtype in "efdFD":
        rng = np.random.default_rng(pg.rank())
        x = (rng.standard_normal(10_001) * 1000).astype(dtype)
        pg.allreduce(x).wait()
        assert len(set(world.allgather(x.tobytes()))) == 1, dtype


@pytest.mark.parametrize("dtype", ["e", "f", BFLOAT16], ids=str)
def test_overflow_is_infinite_and_silent(pg, dtype, recwarn):
    with np.errstate(over="raise"):
        big = float(ml_dtypes.finfo(dtype).max)
    x = np.full(5, big, dtype)
    pg.allreduce(x).wait()
    assert np.isinf(x.astype("f8")).all() == (pg.size() > 1)
    assert not recwarn.list


def test_tensors_that_require_grad(pg):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
    x = torch.full((5,), float(pg.rank() + 1), requires_grad=True)
    pg.broadcast(x, 0).wait()
    assert x.requires_grad and x.detach().tolist() == [1.0] * 5
    gradient = torch.nn.Parameter(torch.arange(5.0) + pg.rank())
    outputs = [torch.zeros(5) for _ in range(pg.size())]
    pg.allgather(outputs, gradient).wait()
    assert [out[0].item() for out in outputs] == list(range(pg.size()))


class Interface:
    """An array known by its `__array_interface__` alone."""

    def __init__(self, array):
        self.__array_interface__ = array.__array_interface__
        self.array = array


class Capsule:
    """An array known by DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("wrap", [memoryview, Capsule, Interface], ids=lambda w: w.__name__)
def test_host_arrays_of_other_libraries(pg, wrap):
    parts = [data(r, 5) for r in range(pg.size())]
    x = parts[pg.rank()].copy()
    pg.allreduce(wrap(x)).wait()
    assert NUMPY.same(x, reduced("SUM", parts))


def test_bytes_move(pg):
    x = bytearray([pg.rank() + 1] * 5)
    pg.broadcast(x, pg.size() - 1).wait()
    assert x == bytearray([pg.size()] * 5)


@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX", "PREMUL_SUM"])
@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32)], ids=str)
@pytest.mark.parametrize("name", ["allreduce", "reduce_scatter_single"])
def test_a_large_call_gives_the_bits_of_many_small_ones(pg, dtype, op, name):
    n, each, step = pg.size(), 150_000, 10_000
    factor = ReduceOp.PREMUL_SUM(0.5 + pg.rank()) if op == "PREMUL_SUM" else getattr(ReduceOp, op)
    x = np.random.default_rng(pg.rank()).standard_normal((n, each)).astype(dtype)
    if name == "allreduce":
        whole = x.reshape(-1).copy()
        pg.allreduce(whole, op=factor).wait()
        parts = x.reshape(-1).copy()
        for start in range(0, n * each, step):
            pg.allreduce(parts[start : start + step], op=factor).wait()
    else:
        whole, parts = np.empty(each, dtype), np.empty(each, dtype)
        pg.reduce_scatter_single(whole, x, op=factor).wait()
        for start in range(0, each, step):
            some = np.ascontiguousarray(x[:, start : start + step])
            pg.reduce_scatter_single(parts[start : start + step], some, op=factor).wait()
    assert whole.tobytes() == parts.tobytes()
