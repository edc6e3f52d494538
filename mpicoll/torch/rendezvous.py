"""How the ranks of `torch.distributed` find one another: rank, size and a store from MPI.

`init_process_group("mpicoll")` without a store and without MASTER_ADDR makes the group of all MPI
ranks first, and the store with its help.  Where the caller or the environment (torchrun's, or
`python -m mpicoll run`'s) says where the store is, PyTorch goes its own way, and `create` is given
rank, size and store: then MPI's world must be the same ranks, or is made of them (`join_world`).
"""

from __future__ import annotations

import functools
import inspect
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

import mpicoll as mc

from ..runtime.settings import environment
from .errors import translated

_WRAPPED = "knows_mpicoll"

_MADE: list[mc.ProcessGroup] = []
"""The group of all ranks that `init_process_group` has made, until `create` takes it."""


def wrap(dist: Any, check: Callable[[], None]) -> None:
    """Have `init_process_group` and `monitored_barrier` know this backend.

    Args:
        check: raises where the backend could not be registered.
    """
    c10d = dist.distributed_c10d
    if hasattr(c10d.init_process_group, _WRAPPED):
        return
    for name, wrapped in (
        ("init_process_group", _initializing(c10d.init_process_group, check)),
        ("monitored_barrier", _monitored(c10d.monitored_barrier, c10d)),
    ):
        setattr(wrapped, _WRAPPED, True)
        setattr(c10d, name, wrapped)
        setattr(dist, name, wrapped)


def _initializing(original: Any, check: Callable[[], None]) -> Any:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init_process_group(*args: Any, **kwargs: Any) -> Any:
        backend = kwargs.get("backend", args[0] if args else None)
        if not isinstance(backend, str) or "mpicoll" not in backend.lower():
            return original(*args, **kwargs)
        check()
        given = signature.bind(*args, **kwargs).arguments
        _check_alone(backend)
        if given.get("store") is None and given.get("init_method") in (None, "env://"):
            known = environment()
            if "MASTER_ADDR" not in known or "MASTER_PORT" not in known:
                given |= _met(given, known)
                given.pop("init_method", None)
            else:
                given |= _numbered(given, known)
        try:
            return original(**given)
        except BaseException:
            while _MADE:
                _MADE.pop().abort("init_process_group failed")
            raise

    return init_process_group


def _monitored(original: Any, c10d: Any) -> Any:
    @functools.wraps(original)
    def monitored_barrier(
        group: Any = None, timeout: Any = None, wait_all_ranks: bool = False
    ) -> None:
        from .group import TorchGroup

        found = group or c10d.GroupMember.WORLD
        if isinstance(found, TorchGroup):
            found.monitored_barrier(timeout, wait_all_ranks)
        else:
            original(group, timeout, wait_all_ranks)

    return monitored_barrier


def _check_alone(backend: str) -> None:
    """Refuse a backend for each device: the group of this one takes the tensors of all."""
    if backend.lower() != "mpicoll":
        raise ValueError(
            f"backend must be 'mpicoll' alone, but got {backend!r}: its groups take tensors on "
            "every device, so there is none beside it. A group of another backend can be made "
            "with new_group(backend=...)"
        )


def _numbered(given: dict[str, Any], known: Any) -> dict[str, Any]:
    """Fill in rank and size from MPI where only the store's address is known."""
    missing = {
        name: value
        for name, value, variable in (
            ("rank", "rank", "RANK"),
            ("world_size", "size", "WORLD_SIZE"),
        )
        if given.get(name, -1) == -1 and variable not in known
    }
    if not missing:
        return {}
    world = _world(given.get("timeout"))
    _MADE.append(world)
    return {name: getattr(world, method)() for name, method in missing.items()}


def _met(given: dict[str, Any], known: Any) -> dict[str, Any]:
    """Make the group of all ranks, and a store on its rank 0; return rank, size and store."""
    world = _world(given.get("timeout"))
    for name, variable, mine in (
        ("rank", "RANK", world.rank()),
        ("world_size", "WORLD_SIZE", world.size()),
    ):
        said = given.get(name, -1)
        where = f"init_process_group's {name}"
        if said == -1 and variable in known:
            said, where = int(known[variable]), variable
        if said not in (-1, mine):
            world.abort("its rank and size are not what MPI says")
            raise ValueError(_contradiction(where, said, mine))
    timeout = {} if given.get("timeout") is None else {"timeout": given["timeout"]}
    store = None
    if world.rank() == 0:
        store = _store("127.0.0.1", 0, world.size(), True, timeout)
    names = world.allgather_object(socket.gethostname())
    host = "127.0.0.1" if len(set(names)) == 1 else names[0]
    port = world.broadcast_object(store.port if store is not None else 0, 0)
    if store is None:
        store = _store(host, port, world.size(), False, timeout)
    _MADE.append(world)
    return {"store": store, "rank": world.rank(), "world_size": world.size()}


def _store(host: str, port: int, size: int, serves: bool, timeout: dict[str, Any]) -> Any:
    return torch.distributed.TCPStore(
        host, port, size, is_master=serves, wait_for_workers=False, **timeout
    )


def _world(timeout: timedelta | None) -> mc.ProcessGroup:
    """Make the group of all MPI ranks."""
    limit = torch.distributed.distributed_c10d.default_pg_timeout if timeout is None else timeout
    return mc.new_group(timeout=limit, device=_device(), group_name="default_pg")


def _device() -> str:
    """Return the device whose memory the groups are to move, besides the host's."""
    if not torch.cuda.is_available():
        return "cpu"
    try:
        import cupy  # noqa: F401
    except ImportError:
        return "cpu"  # tensors on a GPU are refused then, and that says what is missing
    return "cuda"


@translated
def create(asked: Any, options: Any) -> Any:
    """Make the group that `torch.distributed` asks for.

    Args:
        asked: PyTorch's options of an extended backend: store, rank, size, timeout, name, and the
            members' ranks; none for the default group.
        options: the caller's `pg_options`; there are none for this backend.
    """
    from .group import TorchGroup

    ranks = list(asked.global_ranks_in_group)
    if not ranks:
        if not _MADE:
            mc.join_world(asked.store, asked.group_rank, asked.group_size, asked.timeout)
        made = _MADE.pop() if _MADE else _world(asked.timeout)
        for name, said, mine in (
            ("world_size", asked.group_size, made.size()),
            ("rank", asked.group_rank, made.rank()),
        ):
            if said != mine:
                made.abort("its rank and size are not what MPI says")
                raise ValueError(_contradiction(name, said, mine))
        return TorchGroup(made, asked.store, asked.group_id, "default_pg")
    parent = torch.distributed.distributed_c10d.GroupMember.WORLD
    if not isinstance(parent, TorchGroup):
        raise ValueError(
            "new_group(backend='mpicoll') makes a part of a default group of this backend, but "
            f"that is of {torch.distributed.get_backend()!r}: start with "
            "init_process_group('mpicoll'); groups of other backends can be made beside it"
        )
    part = parent.mpicoll.subgroup(ranks, timeout=asked.timeout, group_name=asked.group_id)
    return TorchGroup(part, asked.store, asked.group_id, "")


def _contradiction(name: str, said: int, mine: int) -> str:
    word = "rank" if "rank" in name.lower() else "size of the world"
    return (
        f"{name} is {said}, but MPI says that the {word} is {mine}: start the program with mpiexec "
        "or srun, and leave rank, world_size, RANK and WORLD_SIZE away; or give what MPI says"
    )
