"""What a rank has once: its engine, its watch over other processes, its recordings, its end.

All of it is made on demand, and found by what makes it.  Beside it modules hold constants, caches,
what a program registers, and what belongs to the MPI library that the process has loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Process:
    """One rank, as the library sees it from inside."""

    def __init__(self) -> None:
        self._parts: dict[Callable[[], Any], Any] = {}

    def the(self, make: Callable[[], T]) -> T:
        """Return what a class or function has made for this rank; it does so once."""
        found: T | None = self._parts.get(make)
        if found is None:
            found = self._parts.setdefault(make, make())  # another thread may have been faster
        return found


_process = Process()


def process() -> Process:
    """Return the rank that the calling thread belongs to."""
    return _process
