"""Which groups have the compiled core, and what it is given.

It is the direct way of small calls on one node, in C.  Without it, where the library was installed
without a compiler, or MPICOLL_NATIVE is 0, the same calls go the general way.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays.dtypes import BY_NAME as DTYPES
from ...arrays.dtypes import DType, from_numpy
from ...arrays.ops import BY_NAME
from ...engine import calls
from ...engine.arrival import BoardArrival
from ...engine.calls import KINDS, Call
from ...engine.progress import Lane, engine
from ...engine.recorder import Recorder, ours
from ...engine.work import DoneWork
from ...runtime.library import MPI
from ...runtime.memory import NodeMemory
from ...runtime.settings import native_wanted
from .inline import READ

_native: Any
try:
    from . import _native
except ImportError:  # it was not compiled
    _native = None


if TYPE_CHECKING:
    from ._native import Chunks as Chunks
    from ._native import Core as Core


def why_not() -> str:
    """Return why calls can't go through compiled code here; "" if they can."""
    if _native is None:
        return "it was not compiled when mpicoll was installed"
    if not native_wanted():
        return "MPICOLL_NATIVE=0"
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "it counts on the lock that this interpreter does without"
    return ""


def available() -> bool:
    """Return whether calls can go through compiled code here."""
    return not why_not()


@functools.cache
def _dtypes() -> dict[int, DType]:
    found: dict[int, DType] = {}
    for code in "?bBhHiIlLqQefdgFDG":
        dtype = np.dtype(code)
        found[dtype.num] = from_numpy(dtype, "", False)
    return found


@functools.cache
def _note_ends() -> None:
    """Have no call go through the core in a forked child, nor once MPI is finalized."""
    os.register_at_fork(after_in_child=_native.cease)
    key = MPI.Comm.Create_keyval(delete_fn=lambda *_: _native.cease())
    MPI.COMM_SELF.Set_attr(key, None)


def chunks(memory: NodeMemory) -> Chunks | None:
    """Return what reduces a group's large arrays on one node in compiled code, or None."""
    if not available():
        return None
    made: Chunks = _native.Chunks(memory.mapping, memory.layout, memory.crowded)
    return made


def make(memory: NodeMemory, arrival: BoardArrival, lane: Lane, recorder: Recorder) -> Core:
    """Return the core of a group on one node."""
    _note_ends()
    rank, size = memory.rank, memory.size
    checks: dict[str, Callable[..., Call]] = {
        kind: partial(getattr(calls, kind), rank, size)
        for kind in (
            *("allreduce", "broadcast", "reduce", "allgather", "all_gather_single", "gather"),
            *("scatter", "reduce_scatter", "reduce_scatter_single", "alltoall"),
            "all_to_all_single",
        )
    }
    checks["barrier"] = partial(Call, "barrier")
    for kind in ("scan", "exscan"):
        checks[kind] = partial(calls.scan, kind, rank, size)
    made: Core = _native.Core(
        *(memory.mapping, memory.layout, memory.crowded),
        read=READ,
        kinds=KINDS,
        dtypes=_dtypes(),
        listed={dtype.code: dtype for dtype in DTYPES.values()},
        ops=BY_NAME.values(),
        engine=engine,
        lane=lane,
        arrival=arrival,
        ring=recorder.ring,
        work=DoneWork,
        checks=checks,
        ours=ours,
        digest=calls.digest,
    )
    return made
