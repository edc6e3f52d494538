"""The watch over calls that block inside MPI: one that never returns ends the job.

One thread watches over all of them, and over what else it is asked to look at.  With MPICH loaded,
each thread that was leaves some 300 bytes behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator

from . import world
from .library import MPI
from .memory import unlink_segments
from .process import monotonic, process, start_thread
from .processes import watch
from .settings import survives_deaths
from .waiting import Signal

LOOK_OUT = 0.1  # seconds between looks
BLOCKED = 2.0  # seconds past its deadline that a call blocked inside MPI is left alone
SAID = 0.2  # seconds that a launcher gets to pass on why the job is ended, before it ends it


class Watchdog:
    """The calls that are watched over, and the thread that does so."""

    def __init__(self) -> None:
        self._guarded: dict[int, tuple[float, str]] = {}  # until when, and what
        self._looks: list[Callable[[], bool]] = []
        self._runs = False  # whether the thread was started
        self._stop = False
        self._wake = Signal()  # there is something to watch that the thread may not know of

    @contextlib.contextmanager
    def guard(self, deadline: float, what: str) -> Iterator[None]:
        """Bound a call that blocks inside MPI: past its deadline, or if a peer dies, the job ends.

        (With MPI's fault tolerance such a call returns by itself when a peer dies.)  The end of a
        process of another MPI world is no reason: it may have nothing to do with the call.
        """
        guarded = max(deadline, monotonic()) + BLOCKED, what
        key = id(guarded)
        self._guarded[key] = guarded
        self._start()
        self._wake.set()
        try:
            yield
        finally:
            del self._guarded[key]

    def add(self, look: Callable[[], bool]) -> None:
        """Have something else looked at as well, as long as that returns True; see `wake`."""
        if look not in self._looks:  # as after an exception that struck its caller
            self._looks.append(look)
        self._start()

    def wake(self) -> None:
        """Look again, as there is something to look at once more."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread."""
        self._stop = True
        self._wake.set()

    def _start(self) -> None:
        # (At the end of the interpreter none can be started: what blocks then is not bounded.)
        if not (self._runs or sys.is_finalizing()):
            self._runs = True  # nothing strikes before the next call returns
            start_thread(self._watch)

    def _watch(self) -> None:
        while not self._stop:
            self._wake.wait()
            lost = len(_lost())
            while self._look_at_others() or self._guarded:
                if self._guarded:
                    self._look_at_guarded(lost)
                self._wake.wait(LOOK_OUT)

    def _look_at_others(self) -> bool:
        found = [look() for look in self._looks]  # every one has its look
        return any(found)

    def _look_at_guarded(self, lost: int) -> None:
        """End the job for a call that can't return; so many peers were lost before all of them."""
        watch().look()  # for who is blocked, and holds the engine's lock
        for until, what in list(self._guarded.values()):
            if len(_lost()) > lost and not survives_deaths():
                end_job(1, f"{what} can't return, since a peer {_lost()[-1]}")
            if monotonic() >= until:
                end_job(1, f"{what} never returned")


def _lost() -> list[str]:
    """Return how ranks of this world have died: here, and as our process manager has told."""
    return [*world.lost.values(), *watch().lost]


def end_job(code: int, why: str = "") -> None:
    """End all ranks of the world, at once."""
    if why:
        print(f"mpicoll: {why}; ending the job", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if why:
        time.sleep(SAID)
    unlink_segments()
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def watchdog() -> Watchdog:
    """Return this rank's."""
    return process().the(Watchdog)
