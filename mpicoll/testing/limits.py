"""How long a test may take, and what is said of a rank that takes longer.

Past the limit an exception is raised in the test, which ends it on this rank.  A rank that is in C
code does not come to it.  Its stack is asked for by a signal, which needs no Python there.
"""

from __future__ import annotations

import faulthandler
import math
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from types import FrameType

from _pytest.outcomes import Failed

from ..engine.progress import engine
from ..runtime.process import monotonic

TEARDOWN = 3.0  # seconds past the limit that a tear-down has, or the limit once more
AFTER = 2.0  # seconds later a rank that can be stopped has come to its end
LAST = 3.0  # seconds later it says where all are, if it can, and ends the job
VERY_LAST = 15.0  # seconds later it is ended, if none of its code in Python can run
_HALT = 0.01  # seconds before its time that a limit may strike; else the clock has stood still
_MORE = 0.5  # seconds that a rank has which waits: those that it waits for may say more
_ASK = signal.SIGURG  # for a stack; ignored where nobody has asked for it to be noticed
_PYTEST = re.compile(r"[/\\](_pytest|pluggy)[/\\]")
_ANSWER = 0.3  # seconds that a rank gets to write its stack


class Limit:
    """The limit of the test that runs on this rank.

    Args:
        is_halted: says whether the rank's clock is to stand still.
    """

    def __init__(self, is_halted: Callable[[], bool]) -> None:
        self.seconds = math.inf
        self.until = math.inf  # on the rank's clock, which a debugger's prompt stops
        self._has_more = False
        self._is_halted = is_halted

    def begin(self, seconds: float) -> None:
        """Have a test begin that may take so many seconds."""
        self.seconds, self.until = seconds, monotonic() + seconds
        self._has_more = False

    @property
    def patience(self) -> float:
        """Seconds from now in which all ranks have ended the test, or can't be stopped."""
        return max(0.0, self.until - monotonic()) + self.teardown + AFTER

    @property
    def teardown(self) -> float:
        """Seconds past the limit that a tear-down has."""
        return min(TEARDOWN, self.seconds)

    @contextmanager
    def kept(self, least: float = 0.05) -> Iterator[None]:
        """Stop the body once the limit has passed, but `least` seconds from now at the earliest."""
        if self.until == math.inf or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGALRM, self._stop)
        signal.setitimer(signal.ITIMER_REAL, max(least, self.until - monotonic()))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def pause(self) -> None:
        """Let it not strike, as while a debugger's prompt is open on this rank."""
        signal.setitimer(signal.ITIMER_REAL, 0)

    def go_on(self) -> None:
        """Have it strike again."""
        if self.until < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(0.05, self.until - monotonic()))

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self._is_halted() or self.until - monotonic() > _HALT:
            self.go_on()
            return
        if _waits() and not self._has_more:
            self._has_more = True
            signal.setitimer(signal.ITIMER_REAL, _MORE)
            return
        raise Overdue(f"took longer than its limit of {self.seconds:g} s{_waits()}")


class Overdue(Failed):
    """The test took longer than its limit; not an Exception, so that it is rarely caught."""

    @property
    def waited(self) -> bool:
        """Whether the rank waited for others."""
        return ", and waits" in str(self)


Overdue.__name__ = Overdue.__qualname__ = "Failed"
Overdue.__module__ = "builtins"


def _waits() -> str:
    """Say which calls this rank waits in."""
    tasks = [state.tasks()[0] for state in engine().active() if state.busy]
    said = []
    for task in tasks:
        number = f"call #{task.seq} of " if task.seq else ""
        said.append(f"{task.call.describe()}, {number}group {task.group_state.name!r}")
    return f", and waits in {' and in '.join(said)}" if said else ""


class Stacks:
    """The stacks of this machine's ranks, each written to a file of its own that has no name.

    Attributes:
        place: the process and the number of the file there.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        self.place = os.getpid(), self._file.fileno()
        faulthandler.register(_ASK, self._file, all_threads=False)

    def close(self) -> None:
        """Write no more."""
        faulthandler.unregister(_ASK)
        self._file.close()


def ask(places: dict[int, tuple[int, int]]) -> dict[int, str]:
    """Return where ranks of this machine are, given by their `place`, without pytest's frames."""
    for pid, _ in places.values():
        with suppress(OSError):
            os.kill(pid, _ASK)
    time.sleep(_ANSWER)
    found = {}
    for rank, (pid, file) in places.items():
        lines = []
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/fd/{file}").read_text().splitlines()
        frames = takewhile(lambda line: not _PYTEST.search(line), lines[1:])
        found[rank] = "\n".join(["It is at (the innermost call first):", *frames])
    return found
