"""Which processes of this machine are still there.

A process is known by its pid, the namespace in which that pid counts, and its start time, so that a
pid that was given away again means nobody else.  Its end is noticed through a pidfd, which becomes
readable when the process dies.  Where ranks that share memory don't share a pid namespace, or the
system has no pidfds, `memory.py` lends a lock that dies with its holder.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from typing import NamedTuple

from .process import process

NOBODY = 0  # the namespace of who can't be watched by pidfd

_STARTED, _STATE, _EXIT_CODE = 19, 0, 49  # fields of /proc/PID/stat, counted behind the name


class Identity(NamedTuple):
    """One process, as another process of the machine can recognize it."""

    namespace: int
    pid: int
    started: int


def identity() -> Identity:
    """Return this process's identity; of namespace `NOBODY` where the system has no pidfds."""
    pid = os.getpid()
    try:
        os.close(os.pidfd_open(pid))
        return Identity(os.stat("/proc/self/ns/pid").st_ino, pid, int(_status(pid)[_STARTED]))
    except (AttributeError, OSError):
        return Identity(NOBODY, pid, 0)


def is_stopped(who: Identity) -> bool:
    """Return whether a process is seen to be stopped, as by SIGSTOP or a debugger."""
    try:
        return _status(who.pid)[_STATE] in "Tt"
    except OSError:
        return False


class Watch:
    """The processes that this one has been asked to watch.

    Attributes:
        dead: those that were seen to die, and how, as far as can be told.
        lost: how each of them that is of this MPI world died.
    """

    def __init__(self) -> None:
        self.dead: dict[Identity, str] = {}
        self.lost: list[str] = []
        self._foreign: set[Identity] = set()
        self._poll = select.poll()
        self._looking = threading.Lock()
        self._watched: dict[Identity, int] = {}
        self._who: dict[int, Identity] = {}

    def add(self, who: Identity, *, foreign: bool = False) -> None:
        """Watch a process of this pid namespace from now on.

        A foreign process belongs to another MPI world, which may end before this one.
        """
        if who in self._watched or who in self.dead or who == identity():
            return  # (ranks that are threads are of one process)
        if foreign:
            self._foreign.add(who)
        try:
            file = os.pidfd_open(who.pid)
        except ProcessLookupError:
            self._note_death(who, "died")
            return
        except OSError:
            return  # no more file descriptors: its death shows as a timeout
        if not _is(who):
            os.close(file)
            self._note_death(who, "died")
            return
        with self._looking:
            self._watched[who] = file
            self._who[file] = who
            self._poll.register(file, select.POLLIN)

    def look(self) -> bool:
        """Look once, without waiting; return whether a process was found to have died."""
        if not self._who or not self._looking.acquire(blocking=False):
            return False  # another thread looks just now
        try:
            found = self._poll.poll(0)
            for file, _ in found:
                who = self._who.pop(file)
                self._note_death(who, _how(who))
                self._poll.unregister(file)
                os.close(self._watched.pop(who))
        finally:
            self._looking.release()
        return bool(found)

    def _note_death(self, who: Identity, how: str) -> None:
        self.dead[who] = how
        if who not in self._foreign:
            self.lost.append(how)


def _status(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat behind the name, which may hold anything."""
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()


def _is(who: Identity) -> bool:
    """Return whether a pid is, now, that process (which may be a zombie)."""
    try:
        return int(_status(who.pid)[_STARTED]) == who.started
    except OSError:
        return False


def _how(who: Identity) -> str:
    """Say how a process died, if its parent has not yet cleared it away."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        status = _status(who.pid)
        code = int(status[_EXIT_CODE])
        if int(status[_STARTED]) == who.started and status[_STATE] in "ZX" and code:
            if code & 0x7F:
                return f"was killed by {signal.Signals(code & 0x7F).name}"
            return f"ended with exit code {code >> 8}"
    return "died"


def watch() -> Watch:
    """Return this rank's."""
    return process().the(Watch)
