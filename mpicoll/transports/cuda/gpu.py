"""One GPU by way of CuPy: streams, events, pinned memory and copies.

The only module that imports CuPy, when the first group on GPU memory is made.
"""

from __future__ import annotations

import importlib
import mmap
import platform
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from ...arrays.device import LEGACY_STREAM, DeviceArray
from ...errors import UnsupportedError

Array = np.ndarray[Any, Any]

_NOT_READY = 600  # cudaErrorNotReady
_TO_DEVICE, _TO_HOST, _WITHIN = 1, 2, 3  # cudaMemcpyHostToDevice, DeviceToHost, DeviceToDevice


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


class Mark:
    """What a stream was given by some moment: an event of CUDA, which serves again when dropped."""

    __slots__ = ("_event", "_spare", "ptr")

    def __init__(self, event: Any, ptr: int, spare: list[tuple[Any, int]]) -> None:
        self._event, self.ptr, self._spare = event, ptr, spare

    def __del__(self) -> None:
        self._spare.append((self._event, self.ptr))


class Active:
    """Makes a context of CUDA the calling thread's current one in a with-block.

    By contexts, not by numbers of GPUs: to set the number of the GPU that was current before, as
    CuPy's `Device` does, makes a context on that one, which this rank may never use.

    Args:
        before: the one that is current, and is again afterwards.
    """

    __slots__ = ("_before", "_context", "_driver")

    def __init__(self, driver: Any, context: int, before: int) -> None:
        self._driver, self._context, self._before = driver, context, before

    def __enter__(self) -> None:
        self._driver.ctxSetCurrent(self._context)

    def __exit__(self, *_: object) -> None:
        self._driver.ctxSetCurrent(self._before)


class _AsItIs:
    """A with-block in the context that is current: the usual case."""

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_as_it_is = _AsItIs()


class _Pages:
    """Memory as an array takes it: the array keeps this, and this the memory."""

    def __init__(self, pages: mmap.mmap) -> None:
        self.address: int = np.frombuffer(pages, np.uint8).ctypes.data
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (len(pages),),
            "data": (self.address, False),
        }
        self._pages = pages


class Gpu:
    """One GPU, as the protocols of `transports` want it: `Copies`, `Device`, `Queue`.

    Attributes:
        device: its number among those that this process sees.
        queue: CUDA's handle of the stream that NCCL works on.
    """

    def __init__(self, cupy: Any, device: int) -> None:
        self.device = device
        self._cuda, self._runtime, self._driver = cupy.cuda, cupy.cuda.runtime, cupy.cuda.driver
        self._spare: list[tuple[Any, int]] = []  # events that no mark has, and their handles
        self._context = self._context_there()
        with self.active():
            # They don't wait for the default stream, nor that for them; one for each direction,
            # as a GPU copies both ways at a time.
            self._outward = self._cuda.Stream(non_blocking=True)
            self._inward = self._cuda.Stream(non_blocking=True)
            self._work = self._cuda.Stream(non_blocking=True)
        self.queue = int(self._work.ptr)

    def _context_there(self) -> int:
        """Return the driver's handle of the GPU's context, which all of the process shares.

        A thread that ends at once asks for it, so that the current GPU of no other one changes.
        """
        found: list[int] = []
        failed: list[Exception] = []

        def ask() -> None:
            try:
                self._runtime.setDevice(self.device)
                self._runtime.memGetInfo()  # with a CUDA before 12 this makes the context
                found.append(int(self._driver.ctxGetCurrent()))
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=ask, name="mpicoll GPU")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]
        return found[0]

    def active(self) -> Active | _AsItIs:
        """Make it the current GPU in a with-block, which begins at once."""
        current = self._driver.ctxGetCurrent()
        if current == self._context:
            return _as_it_is
        return Active(self._driver, self._context, current)

    def pinned(self, nbytes: int) -> Array:
        # Ordinary memory that is pinned afterwards: the peers' `process_vm_readv` reads that, but
        # not what the driver allocates.  Whole pages, as no page can be pinned twice.
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        held = _Pages(pages)
        with self.active():
            self._runtime.hostRegister(held.address, nbytes, 0)
        # Of what all views keep, and what keeps the pages: it runs before they are unmapped. A
        # finalizer of the pages would come after that, and from NumPy 2.5 on, so would an array's.
        unpin = weakref.finalize(held, self._unpin, held.address)
        unpin.atexit = False  # the driver may be gone before Python
        return np.asarray(held)

    def _unpin(self, address: int) -> None:
        with self.active():
            self._runtime.hostUnregister(address)

    def device_of(self, address: int) -> int:
        with self.active():
            return int(self._runtime.pointerGetAttributes(address).device)

    def is_capturing(self, stream: int) -> bool:
        if stream == LEGACY_STREAM:
            return False  # it can't
        return bool(self._runtime.streamIsCapturing(stream))

    def mark(self, stream: int) -> Mark:
        try:
            event, ptr = self._spare.pop()
        except IndexError:
            event = self._cuda.Event(disable_timing=True)
            ptr = int(event.ptr)
        mark = Mark(event, ptr, self._spare)
        self._runtime.eventRecord(ptr, stream)
        return mark

    def after(self, mark: Any) -> None:
        with self.active():
            for stream in (self._outward, self._inward):
                self._runtime.streamWaitEvent(stream.ptr, mark.ptr)

    def to_host(self, source: DeviceArray, into: Array) -> Callable[[], bool]:
        return self._copy(into.ctypes.data, source.address, into.nbytes, _TO_HOST, self._outward)

    def to_device(self, source: Array, into: DeviceArray) -> Callable[[], bool]:
        return self._copy(into.address, source.ctypes.data, into.nbytes, _TO_DEVICE, self._inward)

    def within(self, source: DeviceArray, into: DeviceArray) -> Callable[[], bool]:
        return self._copy(into.address, source.address, into.nbytes, _WITHIN, self._inward)

    def _copy(
        self, into: int, source: int, nbytes: int, way: int, stream: Any
    ) -> Callable[[], bool]:
        with self.active():
            self._runtime.memcpyAsync(into, source, nbytes, way, stream.ptr)
            return partial(self.is_done, self.mark(int(stream.ptr)))

    def is_done(self, mark: Any) -> bool:
        with self.active():  # in a thread without a context CUDA would make one, on GPU 0
            status = self._runtime.eventQuery(mark.ptr)
        if not status:
            return True
        if status != _NOT_READY:  # CuPy's own Event.done would say False for ever
            raise self._runtime.CUDARuntimeError(status)
        return False

    def identity(self) -> str:
        """Return what differs between any two GPUs, wherever they are, parts of one included."""
        uuid = self._runtime.getDeviceProperties(self.device).get("uuid")
        if uuid:
            return bytes(uuid).hex()
        return f"{platform.node()} {self._runtime.deviceGetPCIBusId(self.device)}"

    # ---- for NCCL, which works on a stream of its own ----

    def queue_after(self, mark: Any) -> None:
        self._runtime.streamWaitEvent(self.queue, mark.ptr)

    def hold(self, mark: Any, streams: Iterable[int]) -> None:
        with self.active():
            for stream in streams:
                self._runtime.streamWaitEvent(stream, mark.ptr)
