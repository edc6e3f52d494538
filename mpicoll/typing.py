"""What public signatures say of their arguments, for your annotations, too.

    from mpicoll.typing import Array

    def normalize(pg: mc.ProcessGroup, x: Array) -> None: ...

These are promises for type checkers.  What a call is really given is looked at by
`arrays/buffers.py`, `arrays/ops.py` and the checkers, which know more: layout, dtype, device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from .arrays.ops import ReduceOp

# ---- arrays ----


class HasDLPack(Protocol):
    """An array with DLPack, such as a tensor of PyTorch, or an array of CuPy or JAX."""

    def __dlpack__(self, *args: Any, **options: Any) -> Any:
        """Export the array."""

    def __dlpack_device__(self) -> Any:
        """Return where it lies."""


class HasBuffer(Protocol):
    """An object with the buffer protocol: `bytearray`, `array.array`, `memoryview`, `mmap`."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the memory."""


class HasArrayInterface(Protocol):
    """An array that says where it lies as NumPy's arrays do; not a NumPy scalar, which is none."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What NumPy asks for."""

    def __len__(self) -> int:
        """Return the extent of dimension 0."""


class HasCudaArrayInterface(Protocol):
    """An array in GPU memory, such as CuPy's and Numba's."""

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What CUDA's libraries ask for."""


Memory: TypeAlias = (
    np.ndarray[Any, Any] | HasDLPack | HasBuffer | HasArrayInterface | HasCudaArrayInterface
)
"""One array."""

Array: TypeAlias = Memory | Sequence[Memory]
"""What is accepted where a call takes one array: it, or a list of it alone, as c10d has it."""

Arrays: TypeAlias = Array | Sequence[Sequence[Memory]]
"""What is accepted for one array per rank: a list of them, or an array with a row per rank."""

# ---- operators ----


class TorchOp(Protocol):
    """A member of `torch.distributed.ReduceOp`, such as its SUM."""

    @property
    def name(self) -> str:
        """Such as "SUM"."""

    @property
    def value(self) -> Any:
        """Its number."""


class TorchPremulSum(Protocol):
    """PyTorch's PREMUL_SUM, with its factor."""

    @property
    def factor(self) -> Any:
        """What this rank's elements are multiplied by."""


Op: TypeAlias = ReduceOp | TorchOp | TorchPremulSum
"""A `ReduceOp`, or its namesake of `torch.distributed.ReduceOp`."""

# ---- devices ----


class TorchDevice(Protocol):
    """A `torch.device`."""

    @property
    def type(self) -> str:
        """Such as "cuda"."""

    @property
    def index(self) -> Any:
        """Its number, if it has one."""


Device: TypeAlias = str | TorchDevice
"""A device: "cpu", "cuda", "cuda:N", or a `torch.device`."""
