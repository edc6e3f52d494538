"""How a thread waits: for MPI and its peers by backing off, for another thread by a signal."""

from __future__ import annotations

import contextlib
import os
import time
from queue import Empty, SimpleQueue

from .library import POLL, PROGRESSED
from .process import process
from .settings import has_cores_for


class _Machine:
    """What is known of the machine that the rank shares with others."""

    crowded = False  # more ranks than cores: spinning would only hold up a peer


def share_machine(ranks: int) -> None:
    """Say how many ranks share this machine, so that waiting suits them."""
    process().the(_Machine).crowded = process().is_thread or not has_cores_for(ranks)


class Backoff:
    """How to wait: spin a little, then yield the core, then sleep, ever longer."""

    SPINS = 200
    YIELDS = 2000
    EAGERLY = 100_000  # yields to MPI's data before it is given up as stuck
    LONGEST = 1e-3

    def __init__(self, *, background: bool = False) -> None:
        self._start = self.YIELDS if background else 0
        self._crowded = process().the(_Machine).crowded
        self._yield = _let_threads_go_on if process().is_thread else os.sched_yield
        self.reset()

    def reset(self) -> None:
        """Note that something got done."""
        self._idle = self._start

    def after(self, found: int) -> None:
        """Go on at once after a pass that moved something; else give the machine back a moment.

        The longer nothing has moved the longer, but never for long where MPI is to be asked again.
        """
        if found == PROGRESSED:
            self.reset()
            return
        self._idle += 1
        if found == POLL and self._idle <= self._start + self.EAGERLY:
            if self._idle > self.SPINS or self._crowded:
                self._yield()
        elif self._idle > self.YIELDS:
            time.sleep(min(self.LONGEST, 1e-5 * (self._idle - self.YIELDS)))
        elif self._idle > self.SPINS or self._crowded:
            self._yield()


def _let_threads_go_on() -> None:
    time.sleep(0)  # lets go of the interpreter, as sched_yield does not before Python 3.13


class Signal:
    """An event to wait for.  Unlike `threading.Event`, no exception can leave it locked."""

    def __init__(self) -> None:
        self._news: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake who waits, or who waits next."""
        if self._news.empty():
            self._news.put(None)

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is set, but no longer than `timeout` seconds."""
        with contextlib.suppress(Empty):
            self._news.get(timeout=timeout)
