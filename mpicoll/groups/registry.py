"""Backends that users register, and how `new_group` has one make its group."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

from ..errors import InvalidCallError
from ..runtime.library import MPI
from ..transports.select import OWN
from .group import ProcessGroup


class ProcessGroupFactory(Protocol):
    """What `register_backend` takes: called on every rank, it returns a group of its own kind.

    The arguments are those of `_dist2`: a `TCPStore` that rank 0 serves, a `timedelta`, the device
    (a `torch.device` where torch is loaded), and the options that `new_group` was given, by name: a
    factory that has none need not take any.
    """

    def __call__(
        self, store: Any, rank: int, world_size: int, timeout: timedelta, device: Any, /
    ) -> Any:
        """Make a group."""


_factories: dict[str, ProcessGroupFactory] = {}


def register_backend(name: str, factory: ProcessGroupFactory) -> None:
    """Make `new_group(name, ...)` call your own factory.  Local: each rank registers it.

    Args:
        name: the name of the backend.
        factory: called on every rank, as `_dist2` calls it; what it returns, `new_group` returns.

    Raises:
        InvalidCallError: the name is taken.
    """
    if name in OWN or name in _factories:
        raise InvalidCallError(f"name {name!r} is registered already: choose another one")
    _factories[name] = factory


def factory_of(name: object) -> ProcessGroupFactory | None:
    """Return the registered factory of a name, or None for mpicoll's own backends."""
    if name in OWN:
        return None
    if isinstance(name, str) and name in _factories:
        return _factories[name]
    known = ", ".join(repr(n) for n in (*OWN, *_factories))
    raise InvalidCallError(f"backend must be one of {known}, but got {name!r}")


def make(
    factory: Callable[..., Any],
    base: ProcessGroup,
    timeout: float,
    device: str,
    options: dict[str, object],
) -> Any:
    """Give a factory the store that it expects, and return what it makes.

    Args:
        base: a group of the ranks, over which they learn of the store; it is shut down.
    """
    from ..stores import TCPStore  # which few programs need

    name = MPI.Get_processor_name()
    host = name if len(set(base.allgather_object(name))) > 1 else "localhost"
    secret = os.urandom(16).hex()
    store = TCPStore(host, 0, is_master=True, secret=secret) if base.rank() == 0 else None
    address = (store.host, store.port, secret) if store is not None else None
    host, port, secret = base.broadcast_object(address, 0)
    if store is None:
        store = TCPStore(host, port, secret=secret)
    base.shutdown()
    torch = sys.modules.get("torch")
    where = device if torch is None else torch.device(device)
    return factory(store, base.rank(), base.size(), timedelta(seconds=timeout), where, **options)
