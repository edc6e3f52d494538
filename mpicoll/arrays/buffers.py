"""Any array becomes a `Buffer`: one flat view of the user's own memory, and its dtype.

Nothing is ever copied here, so what cannot be viewed flat is refused, with the remedy.
Memory of a GPU becomes a `DeviceBuffer`; whether it can be moved is the transport's to say.
`Blocks` is the same for collectives with a part per rank: one array in parts, or an array each.
"""

from __future__ import annotations

import ctypes
import itertools
import reprlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InvalidCallError, UnsupportedError
from . import device as cuda_arrays
from .device import Described
from .dtypes import LAST_NATIVE, Array, DType, from_name, from_numpy, instead

_ACCEPTED = "a NumPy array, a tensor, or an object with DLPack or the buffer protocol"
_OBJECTS = (
    "use broadcast_object, allgather_object, gather_object or scatter_object, which return objects"
)
_address = ctypes.addressof
_first_byte: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer
_HOST_DEVICES = (1, 3, 11)  # DLPack's kDLCPU, kDLCUDAHost, kDLROCMHost


class Buffer:
    """A user's array, flat.

    Attributes:
        owner: the user's object, kept alive.
        array: 1-D C-contiguous array of `dtype.storage` over the user's memory.
        dtype: what the elements are.
        shape: the user's shape.
        count: number of elements.
        nbytes: number of bytes.
        writable: whether the memory may be written.
    """

    __slots__ = ("array", "count", "dtype", "nbytes", "owner", "shape", "writable")

    device: int | None = None  # the GPU whose memory it is; None: the host's

    def __init__(
        self, owner: object, array: Array, dtype: DType, shape: tuple[int, ...], writable: bool
    ) -> None:
        self.owner = owner
        self.array = array
        self.dtype = dtype
        self.shape = shape
        self.count = array.size
        self.nbytes = array.nbytes
        self.writable = writable

    @property
    def address(self) -> int:
        """Where the memory begins."""
        if self.writable and self.nbytes:
            return _address(_first_byte(self.array))
        return int(self.array.__array_interface__["data"][0])  # four times slower

    def __repr__(self) -> str:
        """Return dtype and shape."""
        return f"Buffer({self.dtype.name}, shape={self.shape})"


class DeviceBuffer(Buffer):
    """A user's array in a GPU's memory; its `array` is a `DeviceArray`, which slices likewise.

    Attributes:
        name: the argument that errors speak of.
        device: the GPU's number, or UNKNOWN.
        stream: the stream that its content is ordered by.
        keeper: what must live as long as the address is used, besides the owner.
    """

    __slots__ = ("device", "keeper", "name", "stream")

    def __init__(self, owner: object, name: str, said: Described) -> None:
        array = said.array
        self.owner = owner
        self.array = array  # type: ignore[assignment]  # it slices as an array does
        self.dtype = said.dtype
        self.shape = said.shape
        self.count = array.size
        self.nbytes = array.size * array.dtype.itemsize
        self.writable = said.writable
        self.name = name
        self.device: int = said.device
        self.stream = said.stream
        self.keeper = said.keeper

    @property
    def address(self) -> int:
        """Where the memory begins."""
        return self.array.address  # type: ignore[attr-defined, no-any-return]


def as_buffer(obj: object, name: str, *, write: bool) -> Buffer:
    """View `obj` as a flat buffer; `name` is the argument that errors speak of.

    Takes NumPy arrays, PyTorch tensors, objects with `__array_interface__`, DLPack, the buffer
    protocol or the CUDA array interface, and a list or tuple holding one of these.  `write` says
    that results will land in it.

    Raises:
        InvalidCallError: not an array, not C-contiguous, or read-only where `write`.
        UnsupportedError: its dtype or its device can't be handled.
    """
    if type(obj) is np.ndarray:
        return _from_array(obj, obj, name, write)
    if isinstance(obj, (list, tuple)):
        if len(obj) != 1 or isinstance(obj[0], (list, tuple)):
            raise InvalidCallError(
                f"{name} must be one array, but got a {type(obj).__name__} of {len(obj)}: "
                + _made_of(obj, name, write)
            )
        return as_buffer(obj[0], name, write=write)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, getattr(torch, "Tensor", ())):
        return _from_tensor(obj, torch, name, write)
    said = None if isinstance(obj, np.ndarray) else cuda_arrays.describe(obj, name)
    if said is not None:
        return _on_device(obj, said, name, write)
    return _from_array(obj, _as_array(obj, name, write), name, write)


def _on_device(obj: object, said: Described, name: str, write: bool) -> Buffer:
    if write and not said.writable:
        raise InvalidCallError(_read_only(obj, name, f"cupy.array({name})"))
    return DeviceBuffer(obj, name, said)


def _from_array(owner: object, array: Array, name: str, write: bool) -> Buffer:
    dtype = from_numpy(array.dtype, name, write)
    flags = array.flags
    writable = flags.writeable
    if write and not writable:
        raise InvalidCallError(_read_only(owner, name, _copied(owner, name)))
    if not flags.c_contiguous:
        raise InvalidCallError(_not_contiguous(owner, array, name, write))
    flat = array if array.ndim == 1 else array.ravel()
    if flat.dtype is not dtype.storage:
        flat = flat.view(dtype.storage)
    return Buffer(owner, flat, dtype, array.shape, writable)


def _read_only(owner: object, name: str, copied: str) -> str:
    return (
        f"{name} must be writable, as the result lands in it, but got a read-only "
        f"{type(owner).__name__}: make y = {copied}, pass y, and take the result from y"
    )


def _copied(owner: object, name: str) -> str:
    """Write down how to copy a host array into new memory, which is writable and C-contiguous."""
    if isinstance(owner, bytes):
        return f"bytearray({name})"
    return f'np.array({_viewed(owner, name)}, order="C")'


def _viewed(owner: object, name: str) -> str:
    """Write down how to get a NumPy array over a host array's memory."""
    if isinstance(owner, np.ndarray):
        return name
    if hasattr(owner, "__dlpack__") and not hasattr(owner, "__array_interface__"):
        return f"np.from_dlpack({name})"
    return f"np.asarray({name})"


def _not_contiguous(owner: object, array: Array, name: str, write: bool) -> str:
    got = f"{name} must be C-contiguous, but got "
    shape = f"of shape {array.shape} with strides {array.strides}"
    view = _viewed(owner, name)
    remedy = instead(view, f"np.ascontiguousarray({view})", write)
    if array.flags.f_contiguous:
        return (
            f"{got}a Fortran-ordered array {shape}: {remedy}; "
            f"or pass {view}.T if every rank's array is laid out so"
        )
    return f"{got}a strided array {shape}: {remedy}"


def _made_of(obj: object, name: str, write: bool) -> str:
    """Say what to pass in place of what is no array."""
    if obj is None:
        return (
            "make an array of the shape and dtype that the other ranks give, such as "
            f"y = np.empty(shape, dtype), and pass y; for other things {_OBJECTS}"
        )
    try:
        numbers = np.asarray(obj).dtype.kind in "biufc"
    except (TypeError, ValueError, RuntimeError):  # such as lists of several lengths
        numbers = False
    if not numbers:
        return _OBJECTS
    if write:
        return f"make y = np.array({name}), pass y, and take the result from y"
    return f"pass np.array({name})"


def _as_array(obj: Any, name: str, write: bool) -> Array:
    """Return a NumPy array over the memory of `obj`, which is neither ndarray nor tensor."""
    if isinstance(obj, np.ma.MaskedArray):
        raise InvalidCallError(
            f"{name} must not be a masked array, as masks would be lost: "
            + instead(name, f"{name}.filled(value)", write)
            + f"; or pass {name}.data, of which the masked elements take part, too"
        )
    if isinstance(obj, np.ndarray):
        return obj.view(np.ndarray)
    if obj is None or isinstance(obj, (np.generic, str, int, float, complex)):
        raise _no_array(obj, name, write)
    try:
        if hasattr(obj, "__array_interface__"):
            return np.asarray(obj)
        if hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__"):
            device = int(obj.__dlpack_device__()[0])
            if device not in _HOST_DEVICES:
                raise _elsewhere(name, f"a {type(obj).__name__} on DLPack device type {device}")
            return np.from_dlpack(obj)
        return np.asarray(memoryview(obj))
    except TypeError as error:
        if isinstance(error, UnsupportedError):
            raise
        raise _no_array(obj, name, write) from error
    except (BufferError, RuntimeError, ValueError) as error:
        raise UnsupportedError(
            f"{name} is a {type(obj).__name__} whose memory NumPy can't view ({error}): "
            f"pass a NumPy array that holds the same"
            + (", and take the result from that" if write else "")
        ) from error


def _no_array(obj: object, name: str, write: bool) -> InvalidCallError:
    return InvalidCallError(
        f"{name} must be {_ACCEPTED}, but got {reprlib.repr(obj)} ({type(obj).__name__}): "
        + _made_of(obj, name, write)
    )


def _elsewhere(name: str, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{name} must lie in the memory of the host or of a CUDA device, but got {what}: make a "
        f"copy on the host (.cpu() in PyTorch, np.array in JAX), pass that, and copy back what "
        "lands in it"
    )


def refuse_device(buffers: Sequence[Buffer]) -> UnsupportedError:
    """Return the error of a call on host memory that was given these, some in GPU memory."""
    found = next(buffer for buffer in buffers if isinstance(buffer, DeviceBuffer))
    return UnsupportedError(
        f"{found.name} must lie in host memory, but got a {type(found.owner).__name__} in GPU "
        'memory: make the group with new_group(device="cuda"); or make a copy on the host (.cpu() '
        "in PyTorch, .get() in CuPy, np.array in JAX), pass that, and copy back what lands in it"
    )


def _from_tensor(tensor: Any, torch: Any, name: str, write: bool) -> Buffer:
    if not (tensor.is_cpu or tensor.is_cuda):
        if tensor.is_meta:
            raise InvalidCallError(
                f"{name} is a meta tensor, which holds no data: make "
                f'y = torch.empty_like({name}, device="cpu"), and pass y'
            )
        raise _elsewhere(name, f"a tensor on {tensor.device}")
    if tensor.layout is not torch.strided:
        got = f"a tensor of layout {tensor.layout}"
        raise _refused_tensor(name, got, "to_dense()", write)
    if tensor.is_quantized:
        raise _refused_tensor(name, "a quantized tensor", "dequantize()", write)
    # Into what follows a result can be copied back, unless elements of it share their memory.
    back = f"{name}.detach().copy_(y)"
    if tensor.is_conj():
        got = "a lazily conjugated tensor"
        raise _refused_tensor(name, got, "resolve_conj()", write, back)
    if tensor.is_neg():
        raise _refused_tensor(name, "a lazily negated tensor", "resolve_neg()", write, back)
    if not tensor.is_contiguous():
        got = f"a tensor of shape {tuple(tensor.shape)} with strides {tensor.stride()}"
        apart = 0 not in tensor.stride()
        raise _refused_tensor(name, got, "contiguous()", write, back if apart else "")
    if tensor.is_cuda:
        return DeviceBuffer(tensor, name, cuda_arrays.describe_tensor(tensor, torch, name))
    dtype = from_name(str(tensor.dtype), name)
    bits = tensor.detach() if tensor.requires_grad else tensor
    try:
        if dtype.code > LAST_NATIVE:  # NumPy lacks it; torch lends us its bits
            bits = bits.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        array = bits.numpy()
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(
            f"{name} is a {type(tensor).__name__} without plain memory ({error}): "
            f"pass a plain tensor with memory, such as a DTensor's .to_local()"
        ) from error
    flat = array.ravel().view(dtype.storage)
    return Buffer(tensor, flat, dtype, tuple(tensor.shape), True)


def _refused_tensor(
    name: str, got: str, remedy: str, write: bool, back: str = ""
) -> InvalidCallError:
    text = f"{name} must be a plain contiguous tensor, but got {got}: "
    if not write:
        return InvalidCallError(f"{text}pass {name}.{remedy}")
    then = f"copy the result back: {back}" if back else "take the result from y"
    return InvalidCallError(f"{text}make y = {name}.{remedy}, pass y, and {then}")


def is_tensor(value: object) -> bool:
    """Return whether an object is a tensor of PyTorch, which this does not import."""
    torch: Any = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


class Blocks:
    """One block of elements per rank, in one array or in an array each.

    Attributes:
        dtype: what the elements are.
        counts: elements in each block.
        displs: where each block begins when they lie one after the other, in elements.
        total: elements in all.
        nbytes: bytes in all.
        buffers: the arrays: one, or one per block.
    """

    __slots__ = ("_whole", "buffers", "counts", "displs", "dtype", "nbytes", "total")

    def __init__(
        self, buffers: tuple[Buffer, ...], counts: tuple[int, ...], whole: Array | None
    ) -> None:
        ends = (0, *itertools.accumulate(counts))
        self.buffers = buffers
        self.counts = counts
        self.displs = ends[:-1]
        self.total = ends[-1]
        self.dtype = buffers[0].dtype
        self.nbytes = self.total * self.dtype.itemsize
        self._whole = whole  # the array that holds all blocks in a row, where there is one

    @classmethod
    def single(cls, buffer: Buffer) -> Blocks:
        """One block: the whole buffer."""
        blocks = cls.__new__(cls)  # without the sums: every call makes one of these
        blocks.buffers = (buffer,)
        blocks.total = count = buffer.count
        blocks.counts = (count,)
        blocks.displs = (0,)
        blocks.dtype = buffer.dtype
        blocks.nbytes = buffer.nbytes
        blocks._whole = buffer.array
        return blocks

    @classmethod
    def split(cls, buffer: Buffer, counts: Sequence[int]) -> Blocks:
        """Consecutive blocks of one buffer, which they must fill."""
        counts = tuple(counts)
        each = counts[0] if counts else 0
        if each > 0 and each * len(counts) == buffer.count and counts.count(each) == len(counts):
            blocks = cls.single(buffer)  # the usual case, in a third of the time
            blocks.counts, blocks.displs = counts, tuple(range(0, buffer.count, each))
            return blocks
        if sum(counts) != buffer.count or min(counts, default=0) < 0:
            raise InvalidCallError(
                f"counts must be at least 0 and add up to the buffer's {buffer.count} elements, "
                f"but got {reprlib.repr(counts)} with sum {sum(counts)}"
            )
        return cls((buffer,), counts, buffer.array)

    @classmethod
    def each(cls, buffers: Sequence[Buffer]) -> Blocks:
        """One block per buffer; all have one dtype."""
        buffers = tuple(buffers)
        names = {buffer.dtype.name for buffer in buffers}
        if len(names) != 1:
            raise InvalidCallError(
                f"the arrays must be at least one and of one dtype, but got {sorted(names)}"
            )
        whole = buffers[0].array if len(buffers) == 1 else None
        return cls(buffers, tuple(buffer.count for buffer in buffers), whole)

    def block(self, i: int) -> Array:
        """Return block `i`, a view."""
        if self._whole is None:
            return self.buffers[i].array
        if len(self.counts) == 1:
            return self._whole
        return self._whole[self.displs[i] : self.displs[i] + self.counts[i]]

    def place(self, i: int) -> tuple[int, int]:
        """Return where block `i` begins in memory, and its bytes."""
        size = self.dtype.itemsize
        if self._whole is None:
            return self.buffers[i].address, self.counts[i] * size
        return self.buffers[0].address + self.displs[i] * size, self.counts[i] * size

    def flat(self) -> Array:
        """Return all blocks in a row, for reading: the array itself, else a packed copy."""
        if self._whole is not None:
            return self._whole
        return np.concatenate([buffer.array for buffer in self.buffers])

    def landing(self) -> Array:
        """Return room for all blocks in a row: the array itself, else scratch for `unpack`."""
        if self._whole is not None:
            return self._whole
        return np.empty(self.total, self.dtype.storage)

    def unpack(self, flat: Array) -> None:
        """Copy `flat` into the blocks; does nothing where it is the array itself."""
        if flat is self._whole:
            return
        for i, (start, count) in enumerate(zip(self.displs, self.counts, strict=True)):
            self.block(i)[:] = flat[start : start + count]
