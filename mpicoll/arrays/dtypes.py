"""Two tables: what can be moved (`DType`), and what can be reduced (`Reduction`).

They are two because moving needs only an element's size, while reducing needs an exact rule.
What is in no table (dates, strings, structures) moves by its description, which is the same text
in every process.
Each rank encodes its elements into the wire type, MPI reduces that, and each rank decodes once.
What has no exact rule is refused, with the remedy; nothing is ever approximated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import UnsupportedError
from ..runtime.digests import blake2b
from .ops import ReduceOp

Array: TypeAlias = npt.NDArray[Any]


# ---- what can be moved ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """One kind of element.  There is one instance of each, so compare by `is` or `==`.

    Attributes:
        name: such as ``"float32"``, ``"datetime64[s]"`` or ``"{id: int32, at: float64}"``.
        code: a number, the same in every process: small, or made of the name (`_DESCRIBED`).
        storage: how the bits lie in the arrays that are passed around: the dtype itself where
            NumPy knows it, else an unsigned integer of its size.
    """

    name: str
    code: int
    storage: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.storage.itemsize


# Codes travel between processes: never renumber, only add.
_CODES = {
    "bool": 1, "int8": 2, "uint8": 3, "int16": 4, "uint16": 5, "int32": 6, "uint32": 7,
    "int64": 8, "uint64": 9, "float16": 10, "float32": 11, "float64": 12, "longdouble": 13,
    "complex64": 14, "complex128": 15, "clongdouble": 16, "bfloat16": 17,
    "float8_e4m3fn": 18, "float8_e4m3fnuz": 19, "float8_e4m3b11fnuz": 20, "float8_e4m3": 21,
    "float8_e5m2": 22, "float8_e5m2fnuz": 23, "float8_e3m4": 24, "float8_e8m0fnu": 25,
    "float6_e2m3fn": 26, "float6_e3m2fn": 27, "float4_e2m1fn": 28, "float4_e2m1fn_x2": 29,
    "int4": 30, "uint4": 31, "int2": 32, "uint2": 33, "int1": 34, "uint1": 35,
}  # fmt: skip

LAST_NATIVE = 16  # the dtypes up to this code are NumPy's own


def _storage(name: str, code: int) -> np.dtype[Any]:
    if code <= LAST_NATIVE:
        return np.dtype(name)
    return np.dtype(np.uint16 if name == "bfloat16" else np.uint8)


BY_NAME = {name: DType(name, code, _storage(name, code)) for name, code in _CODES.items()}
BY_CODE = {dtype.code: dtype for dtype in BY_NAME.values()}

_BY_NUMPY = {dtype.storage: dtype for dtype in BY_NAME.values() if dtype.code <= LAST_NATIVE}

_DESCRIBED = 1 << 62  # from here on codes are made of names
_LONGEST = 120  # characters of such a name

_TYPES = (np.bytes_, np.str_, np.datetime64, np.timedelta64, np.void)  # of which there are many


def from_numpy(dtype: np.dtype[Any], name: str, write: bool = False) -> DType:
    """Return the `DType` of a NumPy dtype; `name` is the argument that errors speak of.

    `write` says that results will land in the array.

    Raises:
        UnsupportedError: objects, swapped bytes, elements of no bytes, unknown extensions.
    """
    found = _BY_NUMPY.get(dtype)
    if found is not None:
        return found
    if dtype.hasobject:
        raise UnsupportedError(
            f"{name} has dtype {dtype!r}, which holds objects of Python's: use broadcast_object, "
            "allgather_object, gather_object or scatter_object, which take any object"
        )
    if not dtype.isnative:
        order = "dtype.newbyteorder('=')"
        raise UnsupportedError(
            f"{name} must have this machine's byte order, but its dtype is {dtype!r}: "
            + instead(name, f"{name}.astype({name}.{order})", write)
        )
    if issubclass(dtype.type, _TYPES):
        if not dtype.itemsize:
            raise UnsupportedError(
                f"{name} has dtype {dtype!r}, whose elements have no bytes to send: leave it out"
            )
        return _BY_NUMPY.setdefault(dtype, described(dtype))
    # With metadata; then NumPy's second names (longlong), and the types of ml_dtypes.
    found = _BY_NUMPY.get(np.dtype(dtype.type)) or BY_NAME.get(dtype.name)
    if found is not None and found.itemsize == dtype.itemsize:
        return found
    raise UnsupportedError(
        f"{name} has dtype {dtype!r}, which is not known: convert it, or for moves pass its bytes, "
        f"{name}.view(np.uint8)"
    )


def instead(name: str, made: str, write: bool) -> str:
    """Say what to pass in place of an argument, so that the result is not lost with a copy."""
    if not write:
        return f"pass {made}"
    return f"make y = {made}, pass y, and copy the result back: {name}[...] = y"


def described(dtype: np.dtype[Any]) -> DType:
    """Return the `DType` of a NumPy dtype that is in no table: it is known by its description."""
    name = _description(dtype)
    whole = name.encode(errors="backslashreplace")
    code = int.from_bytes(blake2b(whole, 8), "little")
    code = code % _DESCRIBED + _DESCRIBED
    if len(name) > _LONGEST:  # it must fit into messages, and differ where the whole does
        name = f"{name[: _LONGEST // 2]}... of {dtype.itemsize} bytes, {code:x}}}"
    storage: np.dtype[Any]
    if dtype.kind in "mM":
        storage = np.dtype(np.int64)
    elif dtype.itemsize in (1, 2, 4, 8):
        storage = np.dtype(f"u{dtype.itemsize}")
    else:
        storage = np.dtype((np.void, dtype.itemsize))
    return _described.setdefault(code, DType(name, code, storage))


_described: dict[int, DType] = {}


def _description(dtype: np.dtype[Any]) -> str:
    """Write a dtype down: two with one text have their bits at the same places, and alike."""
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f"{_description(base)}({', '.join(map(str, shape))})"
    if dtype.names is None or dtype.fields is None:
        return str(dtype).lstrip("<>|=")
    parts, end = [], 0
    for field in dtype.names:
        kind, start = dtype.fields[field][:2]
        place = "" if start == end else f" at {start}"
        shown = field if field.isidentifier() and field.isascii() else ascii(field)
        parts.append(f"{shown}: {_description(kind)}{place}")
        end = start + kind.itemsize
    if end != dtype.itemsize:
        parts.append(f"{dtype.itemsize} bytes")
    return f"{{{', '.join(parts)}}}"


def from_name(text: str, name: str) -> DType:
    """Return the `DType` that PyTorch writes as `text`, such as ``"torch.bfloat16"``.

    Raises:
        UnsupportedError: a dtype that we don't know.
    """
    found = BY_NAME.get(text.removeprefix("torch."))
    if found is None:
        bits = f"{name}.view(torch.uint8)"
        if text.endswith("complex32"):
            bits = f"torch.view_as_real({name})"
        raise UnsupportedError(
            f"{name} has dtype {text}, which can't be sent: convert it, or for moves pass "
            f"its bits, {bits}"
        )
    return found


# ---- what can be reduced -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reduction:
    """How one dtype is reduced under one operator.

    Attributes:
        wire: what MPI reduces.
        mpi_op: the MPI operator on `wire`: SUM, PROD, MIN, MAX, LAND, LOR, LXOR, BAND, BOR, BXOR.
        direct: nothing is converted either way: MPI may read and write the user's arrays.
        encode: storage (1-D) -> a fresh array of `wire`; the source stays as it is.
        decode: (array of `wire`, destination of storage) -> None; the wire array stays as it is.
        alike: `encode` does the same on all ranks, so that any of them can do it.
    """

    wire: np.dtype[Any]
    mpi_op: str
    direct: bool
    encode: Callable[[Array], Array]
    decode: Callable[[Array, Array], None]
    alike: bool = True


_ARITHMETIC = {"SUM": "SUM", "AVG": "SUM", "PREMUL_SUM": "SUM", "PRODUCT": "PROD"}
_BITWISE = {"BAND": "BAND", "BOR": "BOR", "BXOR": "BXOR"}
_INTEGER = {"SUM": "SUM", "PRODUCT": "PROD", "MIN": "MIN", "MAX": "MAX", **_BITWISE}
_LOGICAL = {
    "SUM": "LOR", "MAX": "LOR", "BOR": "LOR",
    "PRODUCT": "LAND", "MIN": "LAND", "BAND": "LAND",
    "BXOR": "LXOR",
}  # fmt: skip


def reduction(dtype: DType, op: ReduceOp, size: int) -> Reduction:
    """Return the plan for reducing `dtype` under `op` over `size` ranks.

    Raises:
        UnsupportedError: there is no exact rule; the message says what to do instead.
    """
    if op.factor is not None:  # factors come in any number, so plans with one are not kept
        return _plan(dtype, op, size)
    key = dtype.code, op.code, size
    plan = _kept.get(key)
    if plan is None:
        plan = _kept[key] = _plan(dtype, op, size)
    return plan


def _plan(dtype: DType, op: ReduceOp, size: int) -> Reduction:
    if dtype.code >= _DESCRIBED:
        return _of_dates(dtype, op)
    if dtype.code > BY_NAME["bfloat16"].code:
        raise _refused(dtype, op, "it only moves; cast to float32, reduce that, and cast back")
    if dtype.name == "bool":
        if op.name not in _LOGICAL:
            raise _refused(dtype, op, "cast to a float dtype first, as SUM of bool is a logical or")
        return Reduction(dtype.storage, _LOGICAL[op.name], True, _fresh, _copy)
    if dtype.storage.kind in "iu" and dtype.name not in _HALF:
        if op.name == "AVG":
            raise _refused(dtype, op, "cast to a float dtype, or use SUM and divide by the ranks")
        if op.name not in _INTEGER:
            raise _refused(dtype, op, "cast to a float dtype, or multiply first and use SUM")
        return Reduction(dtype.storage, _INTEGER[op.name], True, _fresh, _copy)
    if op.name in _ARITHMETIC:
        return _arithmetic(dtype, op, size)
    if op.name in _BITWISE:
        raise _refused(dtype, op, "pass a view as integers, of which uint8 fits any dtype")
    if dtype.name in _ORDERED:
        return _ordered(dtype, op)
    if dtype.storage.kind == "c":
        raise _refused(
            dtype,
            op,
            "complex numbers have no order; reduce abs(x), or copies of x.real and x.imag",
        )
    raise _refused(dtype, op, "cast to float64, reduce that, and cast back")


_kept: dict[tuple[int, int, int], Reduction] = {}


def _refused(dtype: DType, op: ReduceOp, remedy: str) -> UnsupportedError:
    return UnsupportedError(f"op {op!r} can't be done exactly on dtype {dtype.name}: {remedy}")


# A kernel reads its first array and fills its second.  Kernels of many passes run over pieces
# that stay in the cache.

Kernel: TypeAlias = Callable[[Array, Array], None]
_PIECE = 1 << 15  # elements


def _in_pieces(kernel: Kernel) -> Kernel:
    def run(src: Array, dst: Array) -> None:
        if src.size <= _PIECE:
            return kernel(src, dst)
        for start in range(0, src.size, _PIECE):
            piece = slice(start, start + _PIECE)
            kernel(src[piece], dst[piece])

    return run


def _encoder(kernel: Kernel, wire: np.dtype[Any]) -> Callable[[Array], Array]:
    fill = _in_pieces(kernel)

    def encode(src: Array) -> Array:
        encoded: Array = np.empty(src.size, wire)
        fill(src, encoded)
        return encoded

    return encode


def _fresh(src: Array) -> Array:
    return src.copy()


def _copy(src: Array, dst: Array) -> None:
    np.copyto(dst, src)


# Sums, products and averages: half precision is widened to float32 and rounded once, at the end.


def _arithmetic(dtype: DType, op: ReduceOp, size: int) -> Reduction:
    wire, mpi_op = dtype.storage, _ARITHMETIC[op.name]
    widen: Kernel = _copy
    narrow: Kernel = _copy
    if dtype.name in _HALF:
        wire = np.dtype(np.float32)
        widen, narrow = _HALF[dtype.name]
    elif op.name in ("SUM", "PRODUCT"):
        return Reduction(wire, mpi_op, True, _fresh, _copy)
    if op.name == "AVG":
        narrow = _divided(size, wire, narrow)
    elif op.name == "PREMUL_SUM":
        widen = _multiplied(_fitting(dtype, op, wire), widen)
    alike = op.name != "PREMUL_SUM"  # each rank's factor is its own
    return Reduction(wire, mpi_op, False, _encoder(widen, wire), _in_pieces(narrow), alike)


def _fitting(dtype: DType, op: ReduceOp, wire: np.dtype[Any]) -> Any:
    """Return the factor of PREMUL_SUM as a scalar that multiplies `wire` without promoting it."""
    if isinstance(op.factor, complex) and wire.kind != "c":
        raise _refused(dtype, op, "a real dtype takes a real factor; cast to a complex dtype")
    scalar = wire.type if isinstance(op.factor, complex) else _part(wire).type
    with np.errstate(all="ignore"):
        factor = scalar(op.factor)
    if not np.isfinite(factor):
        raise _refused(dtype, op, f"the factor does not fit {wire.name}; cast to a wider dtype")
    return factor


def _part(wire: np.dtype[Any]) -> np.dtype[Any]:
    """Return the dtype of the real and imaginary parts, or `wire` itself where it is real."""
    return np.empty(0, wire).real.dtype


def _divided(size: int, wire: np.dtype[Any], narrow: Kernel) -> Kernel:
    # Complex numbers are divided part by part: NumPy's complex division turns inf into NaN.
    divisor = _part(wire).type(size)

    def divide_and_narrow(total: Array, dst: Array) -> None:
        with np.errstate(all="ignore"):
            mean = total.view(divisor.dtype) / divisor
        narrow(mean.view(wire), dst)

    return divide_and_narrow


def _multiplied(factor: Any, widen: Kernel) -> Kernel:
    def widen_and_multiply(src: Array, encoded: Array) -> None:
        widen(src, encoded)
        parts = encoded.view(factor.dtype)  # those of complex numbers, where the factor is real
        with np.errstate(all="ignore"):
            np.multiply(parts, factor, out=parts)

    return widen_and_multiply


@functools.cache
def _float16_table() -> Array:
    with np.errstate(all="ignore"):
        return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _widen_float16(src: Array, wide: Array) -> None:
    # Looked up, as NumPy's own conversion takes twice as long.
    np.take(_float16_table(), src.view(np.uint16), out=wide, mode="wrap")


def _narrow_float16(wide: Array, dst: Array) -> None:
    with np.errstate(all="ignore"):  # what is too large becomes inf, rightly
        np.copyto(dst, wide, casting="same_kind")


_16 = np.array(16, np.uint32)  # as arrays, because NumPy converts Python's numbers anew each time


def _widen_bfloat16(src: Array, wide: Array) -> None:
    bits = wide.view(np.uint32)
    np.copyto(bits, src)
    np.left_shift(bits, _16, out=bits)


def _narrow_bfloat16(wide: Array, dst: Array) -> None:
    bits = wide.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF  # half a unit of the last kept bit, less one where that bit is even
    rounded += bits
    rounded >>= 16
    np.copyto(dst, rounded, casting="unsafe")
    nan = np.isnan(wide)
    if nan.any():
        dst[nan] = (bits[nan] >> 16) | 0x40  # quiet; rounding could have carried it out of NaN


_HALF: dict[str, tuple[Kernel, Kernel]] = {
    "float16": (_widen_float16, _narrow_float16),
    "bfloat16": (_widen_bfloat16, _narrow_bfloat16),
}


# MIN and MAX of floats: MPI's comparisons leave NaN to chance, which then differs between ranks.
# So the bits become signed integers in the order of the floats, -0.0 below +0.0, and a NaN
# becomes the integer that always wins.

_ORDERED = {  # dtype -> (integer of its width, bits of +inf, bits of the quiet NaN)
    "float16": (np.int16, 0x7C00, 0x7E00),
    "bfloat16": (np.int16, 0x7F80, 0x7FC0),
    "float32": (np.int32, 0x7F800000, 0x7FC00000),
    "float64": (np.int64, 0x7FF0000000000000, 0x7FF8000000000000),
}


def _of_dates(dtype: DType, op: ReduceOp) -> Reduction:
    """MIN and MAX of dates and durations: NaT wins, as in NumPy.

    It is the lowest integer, so it wins the minimum by itself; less one it is the highest.
    """
    wire, one = np.dtype(np.int64), np.array(1, np.int64)
    if not dtype.name.startswith(("datetime64", "timedelta64")):
        raise _refused(dtype, op, "it only moves; allgather the arrays, and reduce them by NumPy")
    if op.name == "MIN":
        return Reduction(wire, "MIN", True, _fresh, _copy)
    if op.name != "MAX":
        raise _refused(
            dtype, op, "MIN and MAX can; for others allgather the arrays, and reduce them by NumPy"
        )

    def encode(src: Array, keys: Array) -> None:
        np.subtract(src, one, out=keys)

    def decode(keys: Array, dst: Array) -> None:
        np.add(keys, one, out=dst)

    return Reduction(wire, "MAX", False, _encoder(encode, wire), _in_pieces(decode))


def _ordered(dtype: DType, op: ReduceOp) -> Reduction:
    integer, *specials = _ORDERED[dtype.name]
    wire: np.dtype[Any] = np.dtype(integer)
    limits = np.iinfo(wire)
    winning = limits.max if op.name == "MAX" else limits.min
    constants = (*specials, limits.max, winning, limits.bits - 1)
    # As arrays, because NumPy converts Python's numbers anew each time, 0.3 us each.
    infinity, quiet_nan, magnitude, winner, sign_shift = (np.array(c, wire) for c in constants)

    def flip_negatives(bits: Array, flipped: Array) -> None:  # its own inverse
        np.right_shift(bits, sign_shift, out=flipped)
        np.bitwise_and(flipped, magnitude, out=flipped)
        np.bitwise_xor(flipped, bits, out=flipped)

    def encode(src: Array, keys: Array) -> None:
        bits = src.view(wire)
        flip_negatives(bits, keys)
        np.copyto(keys, winner, where=(bits & magnitude) > infinity)

    def decode(keys: Array, dst: Array) -> None:
        bits = dst.view(wire)
        flip_negatives(keys, bits)
        np.copyto(bits, quiet_nan, where=keys == winner)

    return Reduction(wire, op.name, False, _encoder(encode, wire), _in_pieces(decode))
