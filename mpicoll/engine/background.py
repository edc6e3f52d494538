"""Threads that take steps although nobody waits: one that progresses, one that keeps deadlines."""

from __future__ import annotations

import sys
import time

from ..errors import InvalidCallError
from ..runtime.library import MPI
from ..runtime.process import monotonic, process, start_thread
from ..runtime.waiting import Backoff, Signal
from ..runtime.watchdog import watchdog
from .progress import QUIET, Engine, engine

KEEPING = QUIET / 4  # seconds between looks at deadlines that nobody waits for
PARKED = 1.0  # seconds without anything under way after which these looks end


class Background:
    """The threads that work for one engine."""

    def __init__(self, of: Engine) -> None:
        self._engine = of
        self._wake = Signal()
        self._thread = False  # whether there is a thread that progresses what is under way
        self._stay = False  # whether that outlives the work at hand
        self._stop = False
        self._keeper = False  # whether there is a thread that keeps deadlines
        self._parked = False  # the keeper waits until something is under way again
        self._unpark = Signal()
        self._looked_at = -1  # the number of the step that was the last when the watchdog looked

    def progress(self, *, stay: bool = False) -> None:
        """Have a thread progress what is under way until it is done; with `stay`, for good."""
        self._stay = self._stay or stay
        if not self._thread:
            check_threads()
            if sys.is_finalizing():  # Python 3.11 would wait for ever
                raise InvalidCallError(
                    "at the end of the interpreter no thread can be started, as progress from a "
                    "thread needs: use wait() instead of futures there"
                )
            self._engine.alarms[self._wake] = None
            self._thread = True  # nothing strikes before the next call returns
            start_thread(self._work)
        self._wake.set()

    def _work(self) -> None:
        backoff = Backoff(background=True)
        while not self._stop:
            found = self._engine.turn(self._goes_on)
            if found is None:
                return
            if self._stop or self._engine.busy:
                backoff.after(found)
            else:
                self._wake.wait()
                backoff.reset()
        self._thread = False

    def _goes_on(self) -> bool:
        """Return whether the thread is to go on; under the lock, so that it misses no launch."""
        going = self._engine.busy or self._stay
        if not going:
            self._engine.alarms.pop(self._wake, None)
        self._thread = going
        return going

    def keep_deadlines(self) -> None:
        """Have a thread look, now and then, at what is under way, though nobody waits for it.

        So a call that is left to the GPU keeps its deadline, at no cost to the calls: a thread that
        progressed all the time would contend with the user's for the interpreter.  The thread that
        watches over calls that block watches over the steps, too: one that is stuck inside NCCL
        past its deadline it frees, whichever thread took it.
        """
        if not (self._keeper or sys.is_finalizing()):
            check_threads()
            watchdog().add(self._look_at_steps)
            self._keeper = True  # nothing strikes before the next call returns
            start_thread(self._keep)
            watchdog().wake()

    def _keep(self) -> None:
        quiet = 0.0
        while not self._stop:
            if self._engine.busy:
                quiet = 0.0
                self._engine.test()
            elif quiet >= PARKED:
                self._parked = True
                self._engine.alarms[self._unpark] = None
                if not self._engine.busy:  # or it was launched before it could see the alarm
                    self._unpark.wait()
                self._engine.alarms.pop(self._unpark, None)
                self._parked, quiet = False, 0.0
                watchdog().wake()
            time.sleep(KEEPING)
            quiet += KEEPING

    def _look_at_steps(self) -> bool:
        self._looked_at = self._engine.free_a_stuck_step(self._looked_at)
        return not self._parked

    def stop(self) -> None:
        """End the threads."""
        self._stop = True
        self._wake.set()
        self._unpark.set()
        until = monotonic() + 1.0
        while self._thread and monotonic() < until:
            time.sleep(1e-3)


def check_threads() -> None:
    """Refuse what needs a thread that calls MPI, where MPI allows none."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise InvalidCallError(
            "progress from a thread (progress='thread', futures, await) needs "
            "MPI_THREAD_MULTIPLE, but MPI was initialized with less: leave mpi4py.rc.thread_level "
            "and mpi4py.rc.threads as they are, or ask for MPI.THREAD_MULTIPLE; or use wait()"
        )


def background() -> Background:
    """Return this rank's."""
    return process().the(_make)


def _make() -> Background:
    return Background(engine())
