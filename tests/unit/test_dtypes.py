"""Every rule of the table, against NumPy and ml_dtypes; NumPy's ufuncs stand in for MPI."""

import functools
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

from mpicoll.arrays.dtypes import BY_CODE, BY_NAME, from_name, from_numpy, reduction
from mpicoll.arrays.ops import ReduceOp
from mpicoll.errors import UnsupportedError

INTS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
HALVES = ["float16", "bfloat16"]
FLOATS = ["float32", "float64", "longdouble"]
COMPLEX = ["complex64", "complex128", "clongdouble"]
SMALL = [name for name, dtype in BY_NAME.items() if dtype.code > 17]
ALL_OPS = [
    ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX,
    ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR, ReduceOp.PREMUL_SUM(0.5),
]  # fmt: skip
MPI = {
    "SUM": np.add, "PROD": np.multiply, "MIN": np.minimum, "MAX": np.maximum,
    "LAND": np.logical_and, "LOR": np.logical_or, "LXOR": np.logical_xor,
    "BAND": np.bitwise_and, "BOR": np.bitwise_or, "BXOR": np.bitwise_xor,
}  # fmt: skip
PATTERNS = np.arange(1 << 16, dtype=np.uint16)
SIZES = [0, 1, 3, 5, (1 << 15) - 1, 1 << 15, (1 << 15) + 1, 100_003]


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def numpy_dtype(name):
    """The dtype a user's array has, where storage only has its bits."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def reduce_all(name, op, arrays):
    """Reduce one array per rank as the engine does: encode, MPI, decode."""
    dtype = BY_NAME[name]
    stored = [array.view(dtype.storage) for array in arrays]
    before = [array.copy() for array in stored]
    plans = [reduction(dtype, op, len(arrays)) for _ in arrays]
    encoded = [plan.encode(array) for plan, array in zip(plans, stored, strict=True)]
    for array, kept, wire in zip(stored, before, encoded, strict=True):
        assert array.tobytes() == kept.tobytes(), "encode changed its source"
        assert wire.dtype == plans[0].wire
        assert not np.may_share_memory(wire, array)
    with np.errstate(all="ignore"):  # MPI is silent
        total = functools.reduce(MPI[plans[0].mpi_op], encoded).astype(plans[0].wire, copy=False)
    kept_total = total.copy()
    out = np.empty_like(stored[0])
    plans[0].decode(total, out)
    assert total.tobytes() == kept_total.tobytes(), "decode changed its source"
    return out.view(arrays[0].dtype)


def is_nan(values):
    with np.errstate(all="ignore"):  # ml_dtypes warns of signalling NaN
        return np.isnan(values)


def random(name, size, seed):
    rng = np.random.default_rng(seed)
    dtype = numpy_dtype(name)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, size, dtype, endpoint=True)
    if dtype.kind == "b":
        return rng.integers(0, 2, size).astype(bool)
    if dtype.kind == "c":
        return (rng.standard_normal(size) + 1j * rng.standard_normal(size)).astype(dtype)
    return rng.standard_normal(size).astype(dtype)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    bits = f"u{a.dtype.itemsize}"
    np.testing.assert_array_equal(a.view(bits), b.view(bits))


# ---- what can be moved ----


def test_codes_are_stable():
    assert {name: dtype.code for name, dtype in BY_NAME.items()} == {
        "bool": 1, "int8": 2, "uint8": 3, "int16": 4, "uint16": 5, "int32": 6, "uint32": 7,
        "int64": 8, "uint64": 9, "float16": 10, "float32": 11, "float64": 12, "longdouble": 13,
        "complex64": 14, "complex128": 15, "clongdouble": 16, "bfloat16": 17,
        "float8_e4m3fn": 18, "float8_e4m3fnuz": 19, "float8_e4m3b11fnuz": 20, "float8_e4m3": 21,
        "float8_e5m2": 22, "float8_e5m2fnuz": 23, "float8_e3m4": 24, "float8_e8m0fnu": 25,
        "float6_e2m3fn": 26, "float6_e3m2fn": 27, "float4_e2m1fn": 28, "float4_e2m1fn_x2": 29,
        "int4": 30, "uint4": 31, "int2": 32, "uint2": 33, "int1": 34, "uint1": 35,
    }  # fmt: skip
    assert all(BY_CODE[dtype.code] is dtype for dtype in BY_NAME.values())


@pytest.mark.parametrize("name", ["bool", *INTS, "float16", *FLOATS, *COMPLEX])
def test_numpy_types(name):
    dtype = from_numpy(np.dtype(name), "x")
    assert (dtype.name, dtype.storage, dtype.itemsize) == (
        name,
        np.dtype(name),
        np.dtype(name).itemsize,
    )


@pytest.mark.parametrize("char", "?bBhHiIlLqQefdgFDG")
def test_every_number_type_of_numpy_is_known(char):
    dtype = from_numpy(np.dtype(char), "x")
    assert dtype.storage == np.dtype(char)
    assert from_numpy(np.dtype(char).newbyteorder("="), "x") is dtype


def test_metadata_does_not_hide_a_dtype():
    for name in ("float32", "clongdouble"):
        assert from_numpy(np.dtype(name, metadata={"unit": "m"}), "x") is BY_NAME[name]


@pytest.mark.parametrize("name", ["bfloat16", *SMALL])
def test_ml_dtypes(name):
    if not hasattr(ml_dtypes, name):
        pytest.skip("ml_dtypes lacks it")
    theirs = np.dtype(getattr(ml_dtypes, name))
    ours = from_numpy(theirs, "x")
    assert ours is BY_NAME[name]
    assert ours.itemsize == theirs.itemsize
    assert ours.storage == (np.uint16 if name == "bfloat16" else np.uint8)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        (">f4" if np.little_endian else "<f4", "newbyteorder"),
        (">i8" if np.little_endian else "<i8", "newbyteorder"),
        ("O", "broadcast_object"),
        ([("a", "f4"), ("b", "O")], "broadcast_object"),
        ([("a", ">f4" if np.little_endian else "<f4")], "newbyteorder"),
        ([], "leave it out"),
        (ml_dtypes.complex32, "view"),
    ],
)
def test_refused_dtypes(dtype, remedy):
    with pytest.raises(UnsupportedError) as caught:
        from_numpy(np.dtype(dtype), "input_tensors[1]")
    message = str(caught.value)
    assert message.startswith("input_tensors[1] ")
    assert repr(np.dtype(dtype)) in message
    assert remedy in message


# dtype: what we call it, and how it is stored
DESCRIBED = [
    ("S3", "S3", "V3"),
    ("S2", "S2", "u2"),
    ("U3", "U3", "V12"),
    ("V5", "V5", "V5"),
    ("V1", "V1", "u1"),
    ("M8[s]", "datetime64[s]", "i8"),
    ("M8[25ms]", "datetime64[25ms]", "i8"),
    ("m8", "timedelta64", "i8"),
    ([("a", "f4"), ("b", "i4")], "{a: float32, b: int32}", "u8"),
    ([("a", "?"), ("b c", "M8[D]")], "{a: bool, 'b c': datetime64[D]}", "V9"),
    (np.dtype([("a", "i1"), ("b", "i4")], align=True), "{a: int8, b: int32 at 4}", "u8"),
    (np.dtype([("b", "i4"), ("a", "i1")], align=True), "{b: int32, a: int8, 8 bytes}", "u8"),
    ([("at", [("x", "f8", (2, 3))], 2), ("n", "S1")], "{at: {x: float64(2, 3)}(2), n: S1}", "V97"),
    ([("half", ml_dtypes.bfloat16), ("x", "c8")], "{half: bfloat16, x: complex64}", "V10"),
]


@pytest.mark.parametrize(("dtype", "name", "storage"), DESCRIBED, ids=[d[1] for d in DESCRIBED])
def test_what_is_in_no_table_is_known_by_its_description(dtype, name, storage):
    found = from_numpy(np.dtype(dtype), "x")
    assert (found.name, found.storage) == (name, np.dtype(storage))
    assert found.itemsize == np.dtype(dtype).itemsize
    assert found is from_numpy(np.dtype(dtype), "y")
    assert 2**62 <= found.code < 2**63


def test_descriptions_have_one_code_each():
    dtypes = [from_numpy(np.dtype(dtype), "x") for dtype, _, _ in DESCRIBED]
    assert len({dtype.code for dtype in dtypes} | set(BY_CODE)) == len(DESCRIBED) + len(BY_CODE)
    code = "import numpy as np, mpicoll.arrays.dtypes as d; "
    code += "print(d.from_numpy(np.dtype('M8[s]'), 'x').code)"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert int(said) == from_numpy(np.dtype("M8[s]"), "x").code


def test_records_are_structures():
    plain = np.dtype([("a", "f4"), ("b", "i4")])
    record = np.dtype((np.record, plain))
    titled = np.dtype([(("title", "a"), "f4"), ("b", "i4")])
    assert from_numpy(record, "x") is from_numpy(plain, "x") is from_numpy(titled, "x")


def test_long_descriptions_are_cut_and_still_differ():
    one, other = (np.dtype([(f"field{i}", "f4") for i in range(n)]) for n in (99, 100))
    names = {from_numpy(dtype, "x").name for dtype in (one, other)}
    assert len(names) == 2 and max(map(len, names)) <= 120


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX], ids=repr)
@pytest.mark.parametrize("name", ["M8[s]", "m8[ns]", "M8"])
def test_dates_have_an_order_in_which_nat_wins(name, op):
    limits = np.iinfo(np.int64)
    values = [limits.min, limits.min + 1, -1, 0, 1, limits.max - 1, limits.max]
    grid = np.array(np.meshgrid(values, values)).reshape(2, -1).view(name)
    plan = reduction(from_numpy(grid.dtype, "x"), op, 2)
    wires = [plan.encode(array.view(np.int64)) for array in grid]
    got = np.empty(grid.shape[1], np.int64)
    plan.decode(MPI[plan.mpi_op](*wires), got)
    expected = {"MIN": np.minimum, "MAX": np.maximum}[op.name](*grid)
    assert got.tolist() == expected.view(np.int64).tolist()


@pytest.mark.parametrize("op", ALL_OPS, ids=repr)
@pytest.mark.parametrize("dtype", ["S3", "U2", "V8", "M8[s]", "m8[s]", [("a", "f4")]], ids=str)
def test_nothing_else_of_them_is_reduced(dtype, op):
    if np.dtype(dtype).kind in "mM" and op.name in ("MIN", "MAX"):
        return
    with pytest.raises(UnsupportedError, match="allgather"):
        reduction(from_numpy(np.dtype(dtype), "x"), op, 2)


def test_string_dtype_is_refused():
    with pytest.raises(UnsupportedError, match="broadcast_object"):
        from_numpy(np.dtypes.StringDType(), "x")


@pytest.mark.parametrize("name", ["bool", *INTS, *HALVES, "float32", "float8_e5m2", "complex64"])
def test_from_name(name):
    assert from_name(f"torch.{name}", "x") is BY_NAME[name]


@pytest.mark.parametrize("text", ["torch.complex32", "torch.qint8", "torch.bits16"])
def test_from_name_refuses(text):
    with pytest.raises(UnsupportedError, match=f"^x has dtype {text}"):
        from_name(text, "x")


def test_from_name_knows_torch():
    torch = pytest.importorskip("torch")
    for name in ("bfloat16", "half", "double", "bool", "long", "cdouble", "float8_e4m3fn"):
        dtype = getattr(torch, name)
        assert from_name(str(dtype), "x").itemsize == dtype.itemsize


# ---- what can be reduced ----


@pytest.mark.parametrize("op", ALL_OPS, ids=repr)
@pytest.mark.parametrize("name", list(BY_NAME))
def test_the_table(name, op):
    """Which combinations exist, which go straight to MPI, and what the refusals say."""
    arithmetic = op.name in ("SUM", "AVG", "PRODUCT", "PREMUL_SUM")
    if name == "bool" or name in INTS:
        allowed = op.name not in ("AVG", "PREMUL_SUM")
    elif name in HALVES or name in ("float32", "float64"):
        allowed = arithmetic or op.name in ("MIN", "MAX")
    else:
        allowed = arithmetic and name not in SMALL
    if not allowed:
        with pytest.raises(UnsupportedError) as caught:
            reduction(BY_NAME[name], op, 3)
        message = str(caught.value)
        assert repr(op) in message
        assert f"dtype {name}: " in message
        return
    plan = reduction(BY_NAME[name], op, 3)
    assert plan.mpi_op in MPI
    direct = name not in HALVES and op.name not in ("AVG", "PREMUL_SUM")
    assert plan.direct == (direct and not (name in FLOATS and not arithmetic))
    if plan.direct:
        assert plan.wire == BY_NAME[name].storage
    elif arithmetic and name in HALVES:
        assert plan.wire == np.float32


@pytest.mark.parametrize(
    ("name", "op", "remedy"),
    [
        ("int32", ReduceOp.AVG, "cast to a float dtype"),
        ("bool", ReduceOp.PREMUL_SUM(2), "cast to a float dtype"),
        ("float8_e4m3fn", ReduceOp.SUM, "cast to float32"),
        ("longdouble", ReduceOp.MAX, "float64"),
        ("complex64", ReduceOp.MIN, r"abs\(x\)"),
        ("float32", ReduceOp.BXOR, "integers"),
        ("float32", ReduceOp.PREMUL_SUM(1j), "complex dtype"),
        ("float32", ReduceOp.PREMUL_SUM(1e300), "wider dtype"),
        ("complex64", ReduceOp.PREMUL_SUM(1e300j), "wider dtype"),
    ],
)
def test_refusals_name_the_remedy(name, op, remedy):
    with pytest.raises(UnsupportedError, match=remedy):
        reduction(BY_NAME[name], op, 2)


def test_plans_are_kept():
    assert reduction(BY_NAME["bfloat16"], ReduceOp.AVG, 3) is reduction(
        BY_NAME["bfloat16"], ReduceOp.AVG, 3
    )
    assert reduction(BY_NAME["float32"], ReduceOp.AVG, 3) is not reduction(
        BY_NAME["float32"], ReduceOp.AVG, 4
    )


def test_premul_plans_do_not_mix_up_signed_zeros():
    one = np.ones(1, np.float32)
    for factor in (0.0, -0.0):
        plan = reduction(BY_NAME["float32"], ReduceOp.PREMUL_SUM(factor), 2)
        assert np.signbit(plan.encode(one)[0]) == np.signbit(factor)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (ReduceOp.SUM, np.add), (ReduceOp.PRODUCT, np.multiply),
        (ReduceOp.MIN, np.minimum), (ReduceOp.MAX, np.maximum),
        (ReduceOp.BAND, np.bitwise_and), (ReduceOp.BOR, np.bitwise_or),
        (ReduceOp.BXOR, np.bitwise_xor),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", [*INTS, "bool"])
def test_integers_and_bool(name, op, expected):
    arrays = [random(name, 1000, seed) for seed in range(3)]
    got = reduce_all(name, op, arrays)
    np.testing.assert_array_equal(got, functools.reduce(expected, arrays))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [*HALVES, *FLOATS, *COMPLEX])
def test_sums(name, size):
    dtype = numpy_dtype(name)
    wide = np.dtype(np.float32) if name in HALVES else dtype
    arrays = [random(name, size, seed) for seed in range(3)]
    wides = [array.astype(wide) for array in arrays]
    total = wides[0] + wides[1] + wides[2]
    assert_equal = np.testing.assert_array_equal
    assert_equal(reduce_all(name, ReduceOp.SUM, arrays), total.astype(dtype))
    product = wides[0] * wides[1] * wides[2]
    assert_equal(reduce_all(name, ReduceOp.PRODUCT, arrays), product.astype(dtype))
    part = wide.type(0).real.dtype.type
    average = (total.view(part) / part(3)).view(wide).astype(dtype)
    assert_equal(reduce_all(name, ReduceOp.AVG, arrays), average)
    scaled = [(w.view(part) * part(0.3)).view(wide) for w in wides]
    expected = (scaled[0] + scaled[1] + scaled[2]).astype(dtype)
    assert_equal(reduce_all(name, ReduceOp.PREMUL_SUM(0.3), arrays), expected)


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_factor(name):
    arrays = [random(name, 101, seed) for seed in range(2)]
    factor = np.dtype(name).type(1 + 2j)
    got = reduce_all(name, ReduceOp.PREMUL_SUM(1 + 2j), arrays)
    np.testing.assert_array_equal(got, arrays[0] * factor + arrays[1] * factor)


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_infinity_is_not_made_nan(name):
    x = np.array([complex(np.inf, 1)], name)
    for op in (ReduceOp.AVG, ReduceOp.PREMUL_SUM(0.5)):
        got = reduce_all(name, op, [x, np.zeros_like(x)])
        assert got[0] == complex(np.inf, 0.5)


@pytest.mark.parametrize("name", HALVES)
def test_every_half_pattern_comes_back(name):
    """Widening and rounding one rank's values changes nothing but signalling NaN."""
    values = PATTERNS.view(numpy_dtype(name))
    plan = reduction(BY_NAME[name], ReduceOp.SUM, 1)
    wide = plan.encode(values.view(BY_NAME[name].storage))
    finite = ~is_nan(values)
    assert_same_bits(wide[finite], values[finite].astype(np.float32))
    back = np.empty_like(values.view(BY_NAME[name].storage))
    plan.decode(wide, back)
    back = back.view(values.dtype)
    assert_same_bits(back[finite], values[finite])
    quiet = 0x40 if name == "bfloat16" else 0  # NumPy's float16 keeps NaN as they are
    assert_same_bits(back[~finite], (PATTERNS[~finite] | quiet).view(values.dtype))


@pytest.mark.parametrize("name", HALVES)
def test_rounding_is_to_nearest_even(name):
    """Of random bits, of all ties and their neighbours, of what overflows and underflows."""
    ties = np.arange(1 << 16, dtype=np.uint32) << 16
    bits = np.concatenate(
        [np.random.default_rng(7).integers(0, 1 << 32, 1 << 20, np.uint32)]
        + [ties | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
        + [ties | low for low in (0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001)]
    )
    wide = bits.view(np.float32)
    dtype = BY_NAME[name]
    got = np.empty(wide.size, dtype.storage)
    reduction(dtype, ReduceOp.SUM, 2).decode(wide, got)
    got = got.view(numpy_dtype(name))
    with np.errstate(all="ignore"):
        expected = wide.astype(numpy_dtype(name))
    number = ~np.isnan(wide)
    assert_same_bits(got[number], expected[number])
    assert is_nan(got[~number]).all()
    if name == "bfloat16":
        assert (got.view(np.uint16)[~number] & 0x40).all()  # quiet
    np.testing.assert_array_equal(np.signbit(got[~number]), np.signbit(wide[~number]))


def test_halves_round_once():
    """256 + 0.5 + 0.5 is 256 if rounded at each step, and 257 is then 256 or 258 in bfloat16."""
    bfloat16 = ml_dtypes.bfloat16
    arrays = [np.array([x], bfloat16) for x in (256, 1, 1)]
    assert arrays[0] + arrays[1] + arrays[2] == 256
    assert reduce_all("bfloat16", ReduceOp.SUM, arrays) == 258
    arrays = [np.array([x], np.float16) for x in (60000, 60000, -60000)]
    assert reduce_all("float16", ReduceOp.SUM, arrays) == 60000  # no overflow on the way
    arrays = [np.array([60000], np.float16)] * 3
    assert reduce_all("float16", ReduceOp.AVG, arrays) == 60000
    assert reduce_all("float16", ReduceOp.SUM, arrays) == np.inf


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", "float64", "complex64"])
def test_silence_under_strict_error_state(name):
    values = np.array([0, 1e-7, 6e4, np.inf, np.nan], np.float64)
    with np.errstate(all="ignore"):
        values = values.astype(numpy_dtype(name))
    with np.errstate(all="raise"):
        for op in (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PREMUL_SUM(3e4)):
            reduce_all(name, op, [values, values])
        if name != "complex64":
            reduce_all(name, ReduceOp.MAX, [values, values])


# ---- MIN and MAX of floats ----

ORDERED = {"float16": "u2", "bfloat16": "u2", "float32": "u4", "float64": "u8"}
QUIET_NAN = {
    "float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000, "float64": 0x7FF8000000000000,
}  # fmt: skip


def total_order(name, values):
    """Sort ranks of non-NaN values: by value, and -0.0 below +0.0."""
    return values.astype(np.float64) + np.where(np.signbit(values), -5e-324, 0.0) * (values == 0)


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX], ids=repr)
@pytest.mark.parametrize("name", HALVES)
def test_every_half_pattern_as_a_key(name, op):
    values = PATTERNS.view(numpy_dtype(name))
    plan = reduction(BY_NAME[name], op, 2)
    assert (plan.wire, plan.mpi_op) == (np.int16, op.name)
    keys = plan.encode(values.view(BY_NAME[name].storage))
    nan = is_nan(values)
    assert (keys[nan] == (32767 if op.name == "MAX" else -32768)).all()
    assert (np.abs(keys[~nan].astype(int)) < 32767).all()
    order = total_order(name, values[~nan])
    by_key = np.argsort(keys[~nan], kind="stable")
    assert (np.diff(keys[~nan][by_key].astype(int)) > 0).all()
    assert (np.diff(order[by_key]) > 0).all()
    back = np.empty(values.size, BY_NAME[name].storage)
    plan.decode(keys, back)
    expected = np.where(nan, np.uint16(QUIET_NAN[name]), PATTERNS)
    np.testing.assert_array_equal(back.view(np.uint16), expected)


@pytest.mark.parametrize("op", [ReduceOp.MIN, ReduceOp.MAX], ids=repr)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ORDERED)
def test_min_max_of_numbers(name, size, op):
    arrays = [random(name, size, seed) for seed in range(3)]
    ufunc = np.minimum if op.name == "MIN" else np.maximum
    assert_same_bits(reduce_all(name, op, arrays), functools.reduce(ufunc, arrays))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_min_max_of_random_bits(name):
    rng = np.random.default_rng(3)
    a, b = (np.frombuffer(rng.bytes(1 << 20), name) for _ in range(2))
    nan = np.isnan(a) | np.isnan(b)
    for op, ufunc in ((ReduceOp.MIN, np.minimum), (ReduceOp.MAX, np.maximum)):
        got = reduce_all(name, op, [a, b])
        with np.errstate(all="ignore"):
            assert_same_bits(got[~nan], ufunc(a, b)[~nan])
        assert np.isnan(got[nan]).all()


@pytest.mark.parametrize("name", ORDERED)
def test_min_max_of_special_values(name):
    dtype, bits = numpy_dtype(name), ORDERED[name]
    quiet_nan = np.array([QUIET_NAN[name]], bits)
    sign = np.array([1 << (8 * dtype.itemsize - 1)], bits)
    nans = [quiet_nan, quiet_nan | sign, quiet_nan | 1, ~np.zeros(1, bits), ~sign]
    numbers = [np.array([x], dtype) for x in (-np.inf, -1, -0.0, 0.0, 1, np.inf)]
    for op in (ReduceOp.MIN, ReduceOp.MAX):
        for nan in nans:
            for number in numbers:
                for pair in ((nan.view(dtype), number), (number, nan.view(dtype))):
                    assert_same_bits(reduce_all(name, op, pair), quiet_nan.view(dtype))
        for i, low in enumerate(numbers):
            for high in numbers[i:]:
                winner = low if op.name == "MIN" else high
                assert_same_bits(reduce_all(name, op, [low, high]), winner)
                assert_same_bits(reduce_all(name, op, [high, low]), winner)
