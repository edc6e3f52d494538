"""Arrays in GPU memory, as they describe themselves: an address, a dtype, a device, a stream.

Nothing here touches the memory, or needs CUDA: the CUDA array interface, DLPack and PyTorch all
say where an array lies.  No library is imported for it.
"""

from __future__ import annotations

import ctypes
import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InvalidCallError, UnsupportedError
from .dtypes import BY_NAME, DType, from_name, from_numpy

UNKNOWN = -1
"""The device of an array that doesn't say which one it lies on."""

LEGACY_STREAM = 1  # CUDA's handle of the default stream, which waits for ordinary streams

_WIDEST = 32  # bytes of an element: the rooms of staging are made for that

_DLPACK_CUDA = (2, 13)  # DLPack's kDLCUDA, kDLCUDAManaged


@dataclass(slots=True)
class DeviceArray:
    """Elements in a row in a GPU's memory: known by address, never looked at.

    It slices as a 1-D NumPy array does.
    """

    address: int
    size: int
    dtype: np.dtype[Any]

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __getitem__(self, part: slice) -> DeviceArray:
        start, stop, _ = part.indices(self.size)
        return DeviceArray(self.address + start * self.itemsize, max(0, stop - start), self.dtype)


@dataclass(slots=True)
class Described:
    """What an array in GPU memory says of itself.

    Attributes:
        array: its elements, in a row.
        dtype: what they are.
        shape: the user's shape.
        device: the GPU's number, or UNKNOWN.
        stream: the stream that the array's content is ordered by.
        writable: whether results may land in it.
        keeper: what keeps the description valid, besides the array.
    """

    array: DeviceArray
    dtype: DType
    shape: tuple[int, ...]
    device: int
    stream: int
    writable: bool
    keeper: object = None


def describe(obj: Any, name: str) -> Described | None:
    """Describe an array in GPU memory; None: it isn't one.  Tensors go to `describe_tensor`.

    Raises:
        InvalidCallError: it is not C-contiguous, or masked.
        UnsupportedError: its dtype can't be handled, or it doesn't describe itself.
    """
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None and type(obj) is cupy.ndarray:
        return _from_cupy(obj, cupy, name)
    try:
        face = getattr(obj, "__cuda_array_interface__", None)
        by_dlpack = hasattr(obj, "__dlpack__") and hasattr(obj, "__dlpack_device__")
        # An interface that knows of no streams, such as JAX's, doesn't say what its content waits
        # for; DLPack then makes a stream wait for it.
        if face is not None and not (by_dlpack and "stream" not in face):
            return _from_interface(obj, face, name)
        if by_dlpack:
            kind, device = (int(n) for n in obj.__dlpack_device__())
            if kind in _DLPACK_CUDA:
                return _from_dlpack(obj, device, name)
    except (AttributeError, BufferError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, (InvalidCallError, UnsupportedError)):
            raise
        raise UnsupportedError(
            f"{name} is a {type(obj).__name__} in GPU memory that can't be read from what it says "
            f"of itself ({error!r}): pass a CuPy array or a torch tensor of it"
        ) from error
    return None


def describe_tensor(tensor: Any, torch: Any, name: str) -> Described:
    """Describe a plain contiguous CUDA tensor, ordered by torch's current stream there."""
    dtype = _BY_TORCH.get(tensor.dtype)
    if dtype is None:
        dtype = _BY_TORCH[tensor.dtype] = from_name(str(tensor.dtype), name)
    device = tensor.device.index
    stream = torch.cuda.current_stream(device).cuda_stream or LEGACY_STREAM
    array = DeviceArray(tensor.data_ptr(), tensor.numel(), dtype.storage)
    return Described(array, dtype, tuple(tensor.shape), device, stream, True)


_BY_TORCH: dict[Any, DType] = {}  # by torch's dtype, whose name is slow to come by


def _from_cupy(obj: Any, cupy: Any, name: str) -> Described:
    """Describe a CuPy array: as its interface does, in a third of the time."""
    dtype = _known(obj.dtype, name)
    shape, memory = obj.shape, obj.data
    if not obj.flags.c_contiguous:
        _check_strides(shape, tuple(n // dtype.itemsize for n in obj.strides), name)
    stream = cupy.cuda.get_current_stream().ptr or LEGACY_STREAM
    array = DeviceArray(memory.ptr, obj.size, dtype.storage)
    return Described(array, dtype, shape, memory.device_id, stream, True)


def _known(numpy_dtype: np.dtype[Any], name: str) -> DType:
    dtype = from_numpy(numpy_dtype, name)
    if numpy_dtype.itemsize > _WIDEST:
        raise UnsupportedError(
            f"{name} has dtype {numpy_dtype!r}, of more than {_WIDEST} bytes, which can't be sent "
            f"from GPU memory: pass its bytes, {name}.view(np.uint8)"
        )
    return dtype


def stream_of(obj: Any) -> int:
    """Return the stream that orders an array's content by now: for most its library's current one.

    Its handle is good as long as nobody drops the stream; so it is asked for anew each time.
    """
    torch: Any = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        stream = torch.cuda.current_stream(obj.device.index).cuda_stream
    elif (cupy := sys.modules.get("cupy")) is not None and type(obj) is cupy.ndarray:
        stream = cupy.cuda.get_current_stream().ptr
    else:
        stream = (getattr(obj, "__cuda_array_interface__", None) or {}).get("stream")
    return int(stream or LEGACY_STREAM)


def _from_interface(obj: Any, face: dict[str, Any], name: str) -> Described:
    shape = tuple(map(int, face["shape"]))
    address, read_only = face["data"]
    if face.get("mask") is not None:
        raise InvalidCallError(f"{name} must not be a masked array, as masks would be lost")
    numpy_dtype = np.dtype(face["typestr"])
    if numpy_dtype.kind == "V" and isinstance(getattr(obj, "dtype", None), np.dtype):
        numpy_dtype = obj.dtype  # the interface has no letter for bfloat16
    dtype = _known(numpy_dtype, name)
    if face.get("strides") is not None:
        strides = tuple(n // dtype.itemsize for n in face["strides"])
        _check_strides(shape, strides, name)
    # None means that there was nothing to wait for when the array was made, which tells little.
    stream = face.get("stream") or LEGACY_STREAM
    return Described(
        DeviceArray(int(address or 0), math.prod(shape), dtype.storage),
        dtype,
        shape,
        _device_of(obj),
        int(stream),
        not (read_only or _is_immutable(obj)),
    )


def _device_of(obj: Any) -> int:
    if not hasattr(obj, "__dlpack_device__"):
        return UNKNOWN
    kind, device = obj.__dlpack_device__()
    return int(device) if int(kind) in _DLPACK_CUDA else UNKNOWN


def _is_immutable(obj: object) -> bool:
    return type(obj).__module__.partition(".")[0] in ("jax", "jaxlib")


def _check_strides(shape: tuple[int, ...], strides: tuple[int, ...], name: str) -> None:
    """Refuse what does not lie in one piece, in C order."""
    expected = 1
    if 0 in shape:
        return
    for extent, stride in zip(reversed(shape), reversed(strides), strict=True):
        if extent != 1 and stride != expected:
            raise InvalidCallError(
                f"{name} must be C-contiguous, but got a strided array in GPU memory of shape "
                f"{shape}: pass a contiguous copy (cupy.ascontiguousarray), then copy the result "
                "back if it is an output"
            )
        expected *= extent


# ---- DLPack ----


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DLPACK_NAMES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex"}
_DLPACK_BOOL = 6


def _from_dlpack(obj: Any, device: int, name: str) -> Described:
    capsule = obj.__dlpack__(stream=LEGACY_STREAM)  # now that stream waits for the content
    tensor = read_capsule(capsule)
    if (tensor.device_type, tensor.device_id) != (int(obj.__dlpack_device__()[0]), device):
        raise ValueError(f"its capsule says device {tensor.device_type}:{tensor.device_id}")
    dtype = _dlpack_dtype(tensor, name)
    shape = tuple(tensor.shape[: tensor.ndim])
    if tensor.strides:
        _check_strides(shape, tuple(tensor.strides[: tensor.ndim]), name)
    address = (tensor.data or 0) + tensor.byte_offset
    return Described(
        DeviceArray(address, math.prod(shape), dtype.storage),
        dtype,
        shape,
        device,
        LEGACY_STREAM,
        not _is_immutable(obj),
        capsule,  # not marked as used, so that it gives its memory back when it is dropped
    )


def read_capsule(capsule: object) -> _DLTensor:
    """Return the tensor that a DLPack capsule describes; it is valid while the capsule lives."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    address = pointer(capsule, b"dltensor")
    return _DLTensor.from_address(address)


def _dlpack_dtype(tensor: _DLTensor, name: str) -> DType:
    kind = _DLPACK_NAMES.get(tensor.code, "")
    text = "bool" if tensor.code == _DLPACK_BOOL else f"{kind}{tensor.bits}"
    dtype = BY_NAME.get(text)
    if dtype is None or tensor.lanes != 1 or dtype.itemsize * 8 != tensor.bits:
        raise UnsupportedError(
            f"{name} has DLPack dtype code {tensor.code} of {tensor.bits} bits and {tensor.lanes} "
            "lanes, which can't be sent: convert it, or for moves pass its bits as integers"
        )
    return dtype
