"""Which transport a group gets, and backends that users register.

The choice is made when a group is created and agreed by all its ranks, never at a call.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

from . import memory
from .errors import InvalidCallError, UnsupportedError
from .library import MPI
from .transports.base import Transport
from .transports.mpi import MpiTransport
from .transports.shm import ShmTransport

OWN = ("auto", "gloo", "mpi")
"""The names that mpicoll serves itself.  "gloo" means "auto", so that _dist2 scripts run."""

Factory = Callable[..., Any]
_factories: dict[str, Factory] = {}


def register_backend(name: str, factory: Factory) -> None:
    """Make `new_group(name, ...)` call your own factory.

    Args:
        name: the name of the backend.
        factory: called on every rank, as `_dist2` calls it:
            ``factory(store, rank, world_size, timeout, device, **options)``, with a `TCPStore`
            that rank 0 serves and a `timedelta`; what it returns, `new_group` returns.

    Raises:
        InvalidCallError: the name is taken.
    """
    if name in OWN or name in _factories:
        raise InvalidCallError(f"name {name!r} is registered already: choose another one")
    _factories[name] = factory


def factory_of(name: object) -> Factory | None:
    """Return the registered factory of a name, or None for mpicoll's own backends."""
    if name in OWN:
        return None
    if isinstance(name, str) and name in _factories:
        return _factories[name]
    known = ", ".join(repr(n) for n in (*OWN, *_factories))
    raise InvalidCallError(f"backend must be one of {known}, but got {name!r}")


def check_device(device: object) -> str:
    """Return a device as a string; a `torch.device` is accepted."""
    text = str(device)
    if text.split(":")[0] != "cpu":
        raise UnsupportedError(
            f"device must be 'cpu', but got {text!r}: this version moves host memory only"
        )
    return "cpu"


def share(comm: MPI.Intracomm, backend: str) -> memory.Shares:
    """Let the ranks of a group share memory, where its backend would use it."""
    if backend == "mpi" or comm.Get_size() == 1:
        return None
    shared = yield from memory.share(comm)
    return shared


def choose(comm: MPI.Intracomm, shared: memory.NodeMemory | None) -> Transport:
    """Return the transport of a group over a private communicator."""
    return MpiTransport(comm) if shared is None else ShmTransport(comm, shared)


def factory_arguments(timeout: float, device: str) -> tuple[timedelta, Any]:
    """Return timeout and device in the types that a `_dist2` factory expects."""
    import sys

    torch = sys.modules.get("torch")
    return timedelta(seconds=timeout), device if torch is None else torch.device(device)
