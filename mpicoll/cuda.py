"""One GPU by way of CuPy: streams, events, pinned memory and copies.

The only module that imports CuPy, when the first group on GPU memory is made.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import platform
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from .cuda_arrays import DeviceArray
from .errors import UnsupportedError

Array = np.ndarray[Any, Any]

_NOT_READY = 600  # cudaErrorNotReady
_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost


def open_gpu(wanted: str, place: int) -> Gpu:
    """Return the GPU that is named, such as "cuda:1"; of "cuda", the one for a rank's place.

    Args:
        wanted: "cuda" or "cuda:N", counted among the devices that this process sees.
        place: this rank's number on its node.

    Raises:
        UnsupportedError: no CuPy, no driver, or no such GPU.
    """
    cupy = load_cupy()
    try:
        visible = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:  # CuPy's own class, which must not be named before it is loaded
        raise UnsupportedError(f"CUDA finds no GPU here: {error}") from error
    device = device_for(wanted, place, visible)
    try:
        return Gpu(cupy, device)
    except Exception as error:
        raise UnsupportedError(f"GPU {device} can't be used: {error}") from error


def load_cupy() -> Any:
    """Return CuPy.

    Raises:
        UnsupportedError: it can't be imported.
    """
    try:
        return importlib.import_module("cupy")
    except ImportError as error:
        raise UnsupportedError(
            f"GPU memory needs CuPy, which can't be imported ({error}): "
            "pip install 'mpicoll[cuda12]' or 'mpicoll[cuda13]', as the driver has it"
        ) from error


def load_nccl() -> Any:
    """Return CuPy's module for NCCL; its `available` tells whether there is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none may well be meant
        return importlib.import_module("cupy.cuda.nccl")


def device_for(wanted: str, place: int, visible: int) -> int:
    """Choose among the visible GPUs: the one that is named, or by a rank's place on its node.

    Raises:
        UnsupportedError: there is none, or none of that number.
    """
    if not visible:
        raise UnsupportedError("CUDA finds no GPU here: see CUDA_VISIBLE_DEVICES and nvidia-smi")
    _, _, number = wanted.partition(":")
    if not number:
        return place % visible
    if int(number) >= visible:
        raise UnsupportedError(
            f"device {wanted!r} is not among the {visible} GPUs that this process sees: "
            f"they are cuda:0 to cuda:{visible - 1}"
        )
    return int(number)


class Gpu:
    """One GPU, as the protocols of `transports` want it: `Copies`, `Device`, `Queue`.

    Attributes:
        device: its number among those that this process sees.
        queue: CUDA's handle of the stream that NCCL works on.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self.device = device
        self._cupy, self._cuda, self._runtime = cupy, cupy.cuda, cupy.cuda.runtime
        with self._cuda.Device(device):
            # They don't wait for the default stream, nor that for them; one for each direction,
            # as a GPU copies both ways at a time.
            self._outward = self._cuda.Stream(non_blocking=True)
            self._inward = self._cuda.Stream(non_blocking=True)
            self._work = self._cuda.Stream(non_blocking=True)
        self.queue = int(self._work.ptr)

    def pinned(self, nbytes: int) -> Array:
        # Ordinary memory that is pinned afterwards: the peers' `process_vm_readv` reads that, but
        # not what the driver allocates.  Whole pages, as no page can be pinned twice.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        array: Array = np.frombuffer(pages, np.uint8)
        address = array.ctypes.data
        with self._cuda.Device(self.device):
            self._runtime.hostRegister(address, nbytes, 0)
        unpin = weakref.finalize(pages, self._runtime.hostUnregister, address)
        unpin.atexit = False  # the driver may be gone before Python
        return array

    def device_of(self, address: int) -> int:
        return int(self._runtime.pointerGetAttributes(address).device)

    def mark(self, stream: int) -> object:
        return self._record(stream)

    def after(self, mark: Any) -> None:
        with self._cuda.Device(self.device):
            for stream in (self._outward, self._inward):
                self._runtime.streamWaitEvent(stream.ptr, mark.ptr)

    def to_host(self, source: DeviceArray, into: Array) -> Callable[[], bool]:
        return self._copy(into.ctypes.data, source.address, into.nbytes, _TO_HOST, self._outward)

    def to_device(self, source: Array, into: DeviceArray) -> Callable[[], bool]:
        return self._copy(into.address, source.ctypes.data, into.nbytes, _TO_DEVICE, self._inward)

    def _copy(
        self, into: int, source: int, nbytes: int, way: int, stream: Any
    ) -> Callable[[], bool]:
        with self._cuda.Device(self.device):
            self._runtime.memcpyAsync(into, source, nbytes, way, stream.ptr)
        return partial(self.is_done, self._record(stream.ptr))

    def _record(self, stream: int) -> Any:
        """Return an event that is done when all that a stream was given by now is done."""
        with self._cuda.Device(self.device):
            event = self._cuda.Event(disable_timing=True)
            self._runtime.eventRecord(event.ptr, stream)
        return event

    def is_done(self, mark: Any) -> bool:
        status = self._runtime.eventQuery(mark.ptr)
        if status not in (0, _NOT_READY):  # CuPy's own Event.done would say False for ever
            raise self._runtime.CUDARuntimeError(status)
        return bool(status == 0)

    def active(self) -> contextlib.AbstractContextManager[object]:
        device: contextlib.AbstractContextManager[object] = self._cuda.Device(self.device)
        return device

    # ---- for NCCL ----

    @cached_property
    def _nccl(self) -> Any:
        return load_nccl()

    def identity(self) -> str:
        """Return what differs between any two GPUs, wherever they are, parts of one included."""
        told = self._runtime.getDeviceProperties(self.device).get("uuid")
        if told:
            return bytes(told).hex()
        return f"{platform.node()} {self._runtime.deviceGetPCIBusId(self.device)}"

    def nccl_version(self) -> int:
        """Return NCCL's version as NCCL writes it, such as 23007; 0 if there is none."""
        return int(self._nccl.get_version()) if self._nccl.available else 0

    def nccl_id(self) -> bytes:
        """Return a new name for a communicator, which one rank gives to all."""
        return bytes(self._nccl.get_unique_id())

    def nccl(self, size: int, name: bytes, rank: int) -> Any:
        """Make a communicator; returns when all ranks have called."""
        with self._cuda.Device(self.device):  # NCCL takes the device that is current
            return self._nccl.NcclCommunicator(size, name, rank)

    @contextlib.contextmanager
    def nccl_group(self) -> Iterator[None]:
        with self._cuda.Device(self.device):
            self._nccl.groupStart()
            try:
                yield
            finally:
                self._nccl.groupEnd()

    def queue_after(self, mark: Any) -> None:
        with self._cuda.Device(self.device):
            self._runtime.streamWaitEvent(self.queue, mark.ptr)

    def hold(self, mark: Any, streams: Iterable[int]) -> None:
        with self._cuda.Device(self.device):
            current = {int(self._cuda.get_current_stream().ptr)}
            torch = sys.modules.get("torch")
            if torch is not None and torch.cuda.is_initialized():
                current.add(int(torch.cuda.current_stream(self.device).cuda_stream))
            for stream in sorted(current | set(streams)):
                self._runtime.streamWaitEvent(stream, mark.ptr)

    def scaled(self, array: DeviceArray, factor: float) -> tuple[DeviceArray, object]:
        cupy = self._cupy
        with self._cuda.Device(self.device), self._work:
            memory = self._cuda.UnownedMemory(array.address, array.nbytes, None, self.device)
            view = cupy.ndarray(array.size, array.dtype, self._cuda.MemoryPointer(memory, 0))
            product = cupy.multiply(view, array.dtype.type(factor))
        return DeviceArray(int(product.data.ptr), array.size, array.dtype), product
