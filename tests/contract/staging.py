"""Staging with copies of host memory in place of a GPU's, which are late and not forgiving.

An array is known by its address alone.  A copy reads and writes nothing until it is asked whether
it is done for the fourth time; until then its target holds rubbish.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mpicoll.arrays.device import DeviceArray
from tests.contract.arrays import Array, Kind

DEVICE, STREAM = 3, 7
LOOKS = 4  # that a copy takes: so many that what is launched meanwhile could overtake it


class Elsewhere:
    """An array that says only where it lies."""

    def __init__(self, values: Array) -> None:
        self.values = values
        self.dtype = values.dtype
        self.stream = STREAM

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.values.shape,
            "typestr": self.values.dtype.str,
            "data": (self.values.ctypes.data, False),
            "version": 3,
            "stream": self.stream,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, DEVICE

    def __getitem__(self, part: Any) -> Elsewhere:
        return Elsewhere(self.values[part])


class ElsewhereKind(Kind):
    name = "elsewhere"

    def __init__(self, settle: Callable[[], None] = lambda: None) -> None:
        self.settle = settle  # waits for what the arrays' stream was given

    def holds(self, dtype: Any) -> bool:
        return True

    def array(self, values: Array) -> Elsewhere:
        return Elsewhere(values.copy())

    def numpy(self, array: Elsewhere) -> Array:
        self.settle()
        return array.values


class LateCopies:
    """Keeps `mpicoll.transports.cuda.staged.Copies`; notes what it was asked for."""

    device = DEVICE

    def __init__(self) -> None:
        self.log: list[tuple[object, ...]] = []
        self.active_now = False
        self.capturing: set[int] = set()  # streams that do
        self.queues: dict[str, list[Callable[[], None]]] = {
            way: [] for way in ("to_host", "to_device", "within")
        }

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        before, self.active_now = self.active_now, True
        try:
            yield
        finally:
            self.active_now = before

    def pinned(self, nbytes: int) -> Array:
        self.log.append(("pinned", nbytes))
        return np.full(nbytes, 0xAB, np.uint8)

    def device_of(self, address: int) -> int:
        return DEVICE

    def is_capturing(self, stream: int) -> bool:
        assert self.active_now
        return stream in self.capturing

    def mark(self, stream: int) -> object:
        assert self.active_now
        self.log.append(("mark", stream))
        return ("mark", len(self.log))

    def after(self, mark: object) -> None:
        self.log.append(("after", mark))

    def to_host(self, source: DeviceArray, into: Array) -> Callable[[], bool]:
        assert source.nbytes == into.nbytes > 0
        return self._start("to_host", into, at(source.address, source.nbytes))

    def to_device(self, source: Array, into: DeviceArray) -> Callable[[], bool]:
        assert source.nbytes == into.nbytes > 0
        return self._start("to_device", at(into.address, into.nbytes), source)

    def _start(self, way: str, into: Array, source: Array) -> Callable[[], bool]:
        self.log.append((way, into.nbytes))
        queue = self.queues[way]
        if way == "to_host":
            into[...] = 0xCD
        looks = 0

        def copy() -> None:
            into[...] = source

        def done() -> bool:
            nonlocal looks
            looks += 1
            if looks >= LOOKS:  # those of one way are done in order
                while copy in queue:
                    queue.pop(0)()
            return looks >= LOOKS

        queue.append(copy)
        return done


def at(address: int, nbytes: int) -> Array:
    return np.frombuffer((ctypes.c_char * nbytes).from_address(address), np.uint8)
