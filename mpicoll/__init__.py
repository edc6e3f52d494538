"""Process groups in the style of PyTorch's `_dist2`, over MPI.

    import numpy as np, mpicoll as mc
    with mc.new_group() as pg:
        x = np.full(4, pg.rank(), dtype=np.float32)
        pg.allreduce(x, op=mc.ReduceOp.SUM, timeout=30).wait()

Importing costs little and touches no MPI; the first `new_group` loads it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .arrays.ops import ReduceOp
from .engine.call import ANY_SOURCE, PROC_NULL, Message
from .engine.work import Work, wait_all
from .errors import (
    CallInterruptedError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DroppedWorkWarning,
    GroupBrokenError,
    GroupClosedError,
    InvalidCallError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
    TransportError,
    UnsupportedError,
)
from .groups.current import current_process_group, process_group
from .groups.group import ProcessGroup
from .groups.new import new_group, parent_group
from .groups.registry import ProcessGroupFactory, register_backend
from .runtime.library import join_world
from .runtime.settings import child_environment

if TYPE_CHECKING:
    from .engine.future import Future
    from .stores import FileStore, PrefixStore, TCPStore

__version__ = "0.2.0"

__all__ = [
    "ANY_SOURCE",
    "PROC_NULL",
    "CallInterruptedError",
    "CollectiveMismatchError",
    "CollectiveTimeoutError",
    "DroppedWorkWarning",
    "FileStore",
    "Future",
    "GroupBrokenError",
    "GroupClosedError",
    "InvalidCallError",
    "Message",
    "MpicollError",
    "PrefixStore",
    "ProcessGroup",
    "ProcessGroupFactory",
    "RankFailedError",
    "ReduceOp",
    "RemoteRankError",
    "TCPStore",
    "TransportError",
    "UnsupportedError",
    "Work",
    "__version__",
    "child_environment",
    "current_process_group",
    "join_world",
    "new_group",
    "parent_group",
    "process_group",
    "register_backend",
    "wait_all",
]


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


_LATER = {  # what few programs need, and takes a while to load
    "Future": "engine.future",
    "FileStore": "stores",
    "PrefixStore": "stores",
    "TCPStore": "stores",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_LATER[name]}", __name__), name)
    return globals()[name]
