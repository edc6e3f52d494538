"""A receive from whichever rank sends first.

MPI is asked which message is there, and only then for that one.  MPICH 5.0 loses messages that come
before a receive from any source, where some ranks of the communicator share memory and others
don't: on several nodes, and where MPI worlds have merged.
"""

from __future__ import annotations

from collections.abc import Callable

from .calls import Call
from .library import IDLE, MPI, Steps


def recv(comm: MPI.Comm, call: Call, move: Callable[[Call], Steps]) -> Steps:
    """Wait for a message of the call's tag, and have `move` receive it."""
    status = MPI.Status()
    while not comm.Iprobe(MPI.ANY_SOURCE, call.tag, status):
        yield IDLE
    call.peer = status.Get_source()
    yield from move(call)
