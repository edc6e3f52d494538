"""Which groups have the compiled core, and what it is given.

It is the direct way of small calls on one node, in C.  Without it, where the library was installed
without a compiler, or MPICOLL_NATIVE is 0, the same calls go the general way.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from mmap import mmap
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from ...arrays.dtypes import BY_NAME as DTYPES
from ...arrays.dtypes import DType, from_numpy
from ...arrays.ops import BY_NAME
from ...engine import checks, kinds
from ...engine.arrival import BoardArrival
from ...engine.call import ANY_SOURCE, Call, Pieces, digest
from ...engine.kinds import KINDS, Kind
from ...engine.progress import engine
from ...engine.recorder import PLACES, Recorder
from ...engine.tasks import GroupState
from ...engine.work import DoneWork, MessageWork
from ...runtime.library import MPI
from ...runtime.memory import IN_LINE, MIX, READ, NodeMemory
from ...runtime.process import process
from ...runtime.settings import native_wanted
from ..tuning import Tuning
from .inline import SHARED_WORK

_native: Any
try:
    from . import _native
except ImportError:  # it was not compiled
    _native = None


if TYPE_CHECKING:
    from ._native import Chunks as Chunks
    from ._native import Core as Core
    from ._native import Moves as Moves
    from ._native import Rings as Rings


T = TypeVar("T")

LAYOUT = 10  # numbers that say where things lie in a memory


def why_not() -> str:
    """Return why calls can't go through compiled code here; "" if they can."""
    if process().is_thread:
        return "the ranks are threads, which the lock that it holds would keep from going on"
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


def direct(group_class: type[T]) -> type[T]:
    """Have the methods of a group's class ask its core first, and then do what the class says."""
    if _native is not None:
        _native.direct(group_class)
    return group_class


@functools.cache
def _dtypes() -> dict[int, DType]:
    found: dict[int, DType] = {}
    for code in "?bBhHiIlLqQefdgFDG":
        dtype = np.dtype(code)
        found[dtype.num] = from_numpy(dtype, "", False)
    return found


_CHECKS: dict[Kind, Callable[..., Call]] = {  # of the calls that it knows
    kinds.ALLREDUCE: checks.allreduce,
    kinds.BROADCAST: checks.broadcast,
    kinds.REDUCE: checks.reduce,
    kinds.BARRIER: lambda rank, size: Call(kinds.BARRIER),
    kinds.ALLGATHER: checks.allgather,
    kinds.ALL_GATHER_SINGLE: checks.all_gather_single,
    kinds.GATHER: checks.gather,
    kinds.SCATTER: checks.scatter,
    kinds.REDUCE_SCATTER: checks.reduce_scatter,
    kinds.REDUCE_SCATTER_SINGLE: checks.reduce_scatter_single,
    kinds.ALLTOALL: checks.alltoall,
    kinds.ALL_TO_ALL_SINGLE: checks.all_to_all_single,
    kinds.SCAN: checks.scan,
    kinds.EXSCAN: checks.exscan,
}


def shared() -> dict[str, Any]:
    """Return what is the same for all groups, as the core is told."""
    return {
        "read": (READ, SHARED_WORK),
        "all_kinds": KINDS,
        "dtypes": _dtypes(),
        "all_dtypes": {dtype.code: dtype for dtype in DTYPES.values()},
        "all_ops": BY_NAME.values(),
        "the_engine": engine(),
        "done_work": DoneWork,
        "group_state": GroupState,
        "arrival": BoardArrival,
        "checkers": [_CHECKS.get(kind) for kind in KINDS],
        "places": PLACES,
        "digest": digest,
        "pieces": Pieces,
        "mix": MIX,
        "in_line": IN_LINE,
    }


@functools.cache
def _configure() -> None:
    """Tell the core what all groups share, and when this process is a rank no more."""
    _native.configure(**shared())
    _native.configure_messages(
        the_engine=engine(), any_source_of=ANY_SOURCE, message_work=MessageWork
    )
    os.register_at_fork(after_in_child=_native.cease)
    key = MPI.Comm.Create_keyval(delete_fn=lambda *_: _native.cease())
    MPI.COMM_SELF.Set_attr(key, None)  # which MPI_Finalize deletes


def _where(memory: NodeMemory) -> tuple[mmap, tuple[int, ...], bool]:
    return memory.mapping, memory.layout, memory.crowded


def chunks(memory: NodeMemory) -> Chunks | None:
    """Return what reduces a group's large arrays on one node in compiled code, or None."""
    if not available():
        return None
    made: Chunks = _native.Chunks(*_where(memory), memory.slots_mapping)
    return made


def moves(memory: NodeMemory, processes: Sequence[int] | None) -> Moves:
    """Return what moves a group's data on one node in compiled code, which is there.

    Args:
        processes: the ranks', if they may read one another's memory.
    """
    made: Moves = _native.Moves(*_where(memory), memory.slots_mapping, processes=processes)
    return made


def rings(
    mapping: mmap, place: tuple[int, int], crowded: bool, *, processes: Sequence[int], **sizes: int
) -> Rings:
    """Return the compiled part of a group's messages; `place`: this rank, and the number of all."""
    _configure()
    nothing = (0,) * (LAYOUT - len(place))
    made: Rings = _native.Rings(mapping, (*place, *nothing), crowded, processes=processes, **sizes)
    return made


class Numbering(Protocol):
    """What numbers the uses of the slots, alike on all ranks of a group."""

    epoch: int


def make(
    numbering: Numbering,
    memory: NodeMemory,
    tuning: Tuning,
    arrival: BoardArrival,
    group_state: GroupState,
    recorder: Recorder,
) -> Core | None:
    """Return the core of a group on one node, or None."""
    if not available():
        return None
    _configure()
    made: Core = _native.Core(
        *_where(memory),
        most=tuning.inline,
        at_once=tuning.at_once,
        numbering=numbering,
        group_state=group_state,
        arrival=arrival,
        ring=recorder.ring,
    )
    return made
