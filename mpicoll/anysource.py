"""A receive from whichever rank sends first.

MPI is asked which message is there, and only then for that one.  MPICH 5.0 loses messages that come
before a receive from any source, where some ranks of the communicator share memory and others
don't: on several nodes, and where MPI worlds have merged.  Over libfabric it goes on to tell of a
message for which a receive is posted already, so they are taken one at a time.
"""

from __future__ import annotations

from collections.abc import Callable

from .calls import Call
from .library import IDLE, MPI, Steps

_taking: set[tuple[int, int]] = set()  # communicators and tags of which a message is being received


def recv(comm: MPI.Comm, call: Call, move: Callable[[Call], Steps]) -> Steps:
    """Wait for a message of the call's tag, and have `move` receive it."""
    status, key = MPI.Status(), (comm.handle, call.tag)
    while key in _taking or not comm.Iprobe(MPI.ANY_SOURCE, call.tag, status):
        yield IDLE
    call.peer = status.Get_source()
    _taking.add(key)
    try:
        yield from move(call)
    finally:
        _taking.discard(key)
