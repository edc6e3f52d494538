"""The data of the contract suite: arrays of each kind, distinct per rank and position, and
what NumPy makes of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

SIZES = (0, 1, 3, 5, 1000, 70_001)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INTEGERS = tuple(map(np.dtype, "bhilBHIL"))
FLOATS = (*map(np.dtype, "efdg"), BFLOAT16)
COMPLEX = tuple(map(np.dtype, "FDG"))
DTYPES = (np.dtype(bool), *INTEGERS, *FLOATS, *COMPLEX)
HALF = (np.dtype("e"), BFLOAT16)
Array = npt.NDArray[Any]


def data(rank: int, shape: int | Sequence[int], dtype: Any = np.float32, seed: int = 0) -> Array:
    """Small whole numbers, so that sums are exact in any order; ranks and places differ."""
    dtype = np.dtype(dtype)
    i = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    values = (i * 3 + rank * 17 + seed * 29 + 1) % 251
    if dtype == bool:
        return np.asarray((values * (i + rank + 1)) % 3 == 0)
    if dtype.kind not in "u":
        values = values - 125
    if dtype.kind == "c":
        return np.asarray((values + 1j * ((i * 5 + rank * 7 + seed) % 13 - 6)).astype(dtype))
    return np.asarray(values.astype(dtype))


def small(rank: int, shape: int | Sequence[int], dtype: Any = np.float32, seed: int = 0) -> Array:
    """Like `data`, but 1 to 5 in size, so that products are exact too."""
    values = data(rank, shape, np.int64, seed) % 5 + 1
    return np.asarray(values.astype(dtype))


_UFUNCS: dict[str, Any] = {
    "SUM": np.add,
    "AVG": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
OPS = tuple(_UFUNCS)


def reduced(op: str, arrays: Sequence[Array]) -> Array:
    """`op` over all ranks' arrays, by NumPy; half precision in float32, rounded once."""
    dtype = arrays[0].dtype
    if dtype in HALF:
        arrays = [a.astype(np.float32) for a in arrays]
    total = reduce(_UFUNCS[op], arrays)
    if op == "AVG":
        parts = np.atleast_1d(total).view(total.real.dtype)  # complex numbers: part by part
        total = (parts / parts.dtype.type(len(arrays))).view(total.dtype).reshape(total.shape)
    return np.asarray(total.astype(dtype))


class Kind:
    """An array library."""

    name = "numpy"

    def require(self) -> None:
        """Skip the test, saying why, where the library is missing."""

    def holds(self, dtype: Any) -> bool:
        return True

    def array(self, values: Array) -> Any:
        """A new array of this kind."""
        return values.copy()

    def numpy(self, array: Any) -> Array:
        return np.asarray(array)

    def full(self, shape: int | Sequence[int], value: Any, dtype: Any = np.float32) -> Any:
        return self.array(np.full(shape, value, dtype))

    def fill(self, array: Any, values: Array) -> None:
        """Write the values into an array, or a part of one."""
        self.numpy(array)[...] = values

    def same(self, array: Any, expected: Array) -> bool:
        """Whether `array` has exactly the expected dtype, shape and values (NaN equals NaN)."""
        got = self.numpy(array)
        if (got.dtype, got.shape) != (expected.dtype, expected.shape):
            return False
        return bool(((got == expected) | ((got != got) & (expected != expected))).all())


class Torch(Kind):
    """CPU tensors; bfloat16 goes through int16, as torch and NumPy share no such type."""

    name = "torch"

    def require(self) -> None:
        if importlib.util.find_spec("torch") is None:
            pytest.skip("torch is not installed (extra: torch)")

    def holds(self, dtype: Any) -> bool:
        return np.dtype(dtype).char not in "gG"

    def array(self, values: Array) -> Any:
        torch = importlib.import_module("torch")
        if values.dtype == BFLOAT16:
            return torch.from_numpy(values.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(values.copy())

    def numpy(self, array: Any) -> Array:
        torch = importlib.import_module("torch")
        if array.dtype == torch.bfloat16:
            return np.asarray(array.detach().view(torch.int16).numpy().view(BFLOAT16))
        return np.asarray(array.detach().numpy())


NUMPY = Kind()
KINDS = (NUMPY, Torch())
