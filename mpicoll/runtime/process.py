"""What a rank has once: its engine, its watch over other processes, its recordings, its end.

All of it is made on demand, and found by what makes it.  Beside it modules hold constants, caches,
what a program registers, and what belongs to the MPI library that the process has loaded.

A rank is a process, but where a test runs several as threads of one (`mpicoll.testing.run`): then
each thread belongs to the rank that has started it.
"""

from __future__ import annotations

import threading
from _thread import start_new_thread
from collections.abc import Callable
from time import monotonic as _monotonic
from typing import Any, TypeVar

T = TypeVar("T")


class Process:
    """One rank, as the library sees it from inside.

    Args:
        mpi: what stands for the MPI library, where the rank is a thread; None: the library does.
    """

    def __init__(self, mpi: Any = None) -> None:
        self.mpi = mpi
        self.ahead = 0.0  # seconds that a test has moved this rank's clock on
        self._parts: dict[Callable[[], Any], Any] = {}

    @property
    def is_thread(self) -> bool:
        """Whether the ranks are threads: where one spins, the others do not go on."""
        return self.mpi is not None

    def the(self, make: Callable[[], T]) -> T:
        """Return what a class or function has made for this rank; it does so once."""
        found: T | None = self._parts.get(make)
        if found is None:
            found = self._parts.setdefault(make, make())  # another thread may have been faster
        return found


class _Here(threading.local):
    process = Process()  # of all threads that nobody has said otherwise of


_here = _Here()


def process() -> Process:
    """Return the rank that the calling thread belongs to."""
    return _here.process


def monotonic() -> float:
    """Return the time by which this rank keeps its deadlines, in seconds."""
    return _monotonic() + _here.process.ahead


def belong_to(rank: Process) -> None:
    """Have the calling thread belong to a rank."""
    _here.process = rank


def start_thread(work: Callable[[], None]) -> None:
    """Start a thread that belongs to the rank of the calling one, and ends with the process."""
    rank = process()

    def begin() -> None:
        belong_to(rank)
        work()

    start_new_thread(begin, ())
