"""Process groups in the style of PyTorch's `_dist2`, over MPI.

    import numpy as np, mpicoll as mc
    with mc.new_group() as pg:
        x = np.full(4, pg.rank(), dtype=np.float32)
        pg.allreduce(x, op=mc.ReduceOp.SUM, timeout=30).wait()

Importing costs nothing: the library is loaded when its first name is asked for, and MPI by the
first `new_group`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors as errors
    from . import stores as stores
    from . import typing as typing
    from .arrays.ops import ReduceOp
    from .engine.call import ANY_SOURCE, PROC_NULL, Message
    from .engine.future import Future
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

_HOMES = {  # the modules of what is public
    "arrays.ops": ("ReduceOp",),
    "engine.call": ("ANY_SOURCE", "PROC_NULL", "Message"),
    "engine.future": ("Future",),
    "engine.work": ("Work", "wait_all"),
    "groups.current": ("current_process_group", "process_group"),
    "groups.group": ("ProcessGroup",),
    "groups.new": ("new_group", "parent_group"),
    "groups.registry": ("ProcessGroupFactory", "register_backend"),
    "runtime.library": ("join_world",),
    "runtime.settings": ("child_environment",),
    "stores": ("FileStore", "PrefixStore", "TCPStore"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name in ("errors", "stores", "typing"):
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME.get(name, 'errors')}", __name__)
    found = globals()[name] = getattr(module, name)
    return found
