"""Which transport a group gets, and backends that users register.

The choice is made when a group is created and agreed by all its ranks, never at a call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeAlias

import numpy as np

from ..engine import communicators
from ..engine.arrival import Arrival, BoardArrival, NodesArrival
from ..engine.call import digest
from ..engine.peers import Peers
from ..errors import InvalidCallError, UnsupportedError
from ..runtime import memory
from ..runtime.library import IDLE, MPI, until
from ..runtime.processes import NOBODY, Identity
from ..runtime.settings import (
    environment,
    local_rank,
    nccl_shares_gpus,
    order_nccl_launches,
    survives_deaths,
)
from ..runtime.topology import Nodes
from .base import Transport
from .cuda import binding, probe
from .cuda import gpu as cuda
from .cuda.aware import AwareTransport
from .cuda.nccl import Nccl, NcclTransport, Turns
from .cuda.staged import StagedTransport
from .hierarchical import HierarchicalTransport
from .mpi import MpiTransport
from .shm.transport import ShmTransport

OWN = ("auto", "gloo", "mpi", "staged", "nccl")
"""The names that mpicoll serves itself.  "gloo" means "auto", so that _dist2 scripts run."""

NCCL_NAME = 128  # bytes of the name of one of NCCL's communicators
NCCL_SHARES = 23000  # the version of NCCL that lets ranks share a GPU, if it is told to

_REASON = 400  # bytes of why a rank can't use its GPU that the others are told


class ProcessGroupFactory(Protocol):
    """What `register_backend` takes: called on every rank, it returns a group of its own kind.

    The arguments are those of `_dist2`: a `TCPStore` that rank 0 serves, a `timedelta`, the device
    (a `torch.device` where torch is loaded), and the options that `new_group` was given.
    """

    def __call__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout: timedelta,
        device: Any,
        **options: Any,
    ) -> Any:
        """Make a group."""


_factories: dict[str, ProcessGroupFactory] = {}


def register_backend(name: str, factory: ProcessGroupFactory) -> None:
    """Make `new_group(name, ...)` call your own factory.

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


def check_device(device: object, backend: str) -> str:
    """Return a device as "cpu", "cuda" or "cuda:N"; a `torch.device` is accepted.

    Raises:
        UnsupportedError: another device, or a backend that doesn't move its memory.
    """
    text = str(device)
    kind, colon, number = text.partition(":")
    if kind not in ("cpu", "cuda") or (colon and not number.isdigit()):
        raise UnsupportedError(f"device must be 'cpu', 'cuda' or 'cuda:N', but got {text!r}")
    if kind == "cpu":
        if backend in ("staged", "nccl"):
            raise UnsupportedError(
                f"backend {backend!r} moves GPU memory, but device is {text!r}: pass device='cuda'"
            )
        return kind
    return text


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a group was asked to run on: alike on all its ranks, and handed to its children.

    Attributes:
        backend: one of `OWN`, or a name given to `register_backend`.
        checks: "full", "node" or "first": how far, and how often, the ranks of a call are compared.
        sizes: ranks of each node that MPICOLL_NODES pretends.
        device: "cpu", "cuda" or "cuda:N"; each rank has a number of its own.
    """

    backend: str
    checks: str
    sizes: tuple[int, ...]
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.checks not in ("full", "node", "first"):
            raise InvalidCallError(
                f"checks must be 'full' (compare all ranks of a call), 'node' (those of each node) "
                f"or 'first' (on GPU memory: compare each kind of call once), "
                f"but got {self.checks!r}"
            )
        if self.checks == "first" and self.device == "cpu":
            raise InvalidCallError(
                "checks='first' is for groups on GPU memory, where a call can go on without the "
                "host: pass device='cuda', or checks='full'"
            )

    @property
    def choice(self) -> str:
        """The backend, without its second name: "gloo" means "auto"."""
        return "auto" if self.backend == "gloo" else self.backend

    def digest(self) -> int:
        """Return a number that differs where ranks want different things."""
        on_gpu = self.device != "cpu"
        return digest(*self.choice.encode(), -1, *self.checks.encode(), -1, *self.sizes, -1, on_gpu)

    def alike(self) -> str:
        """Return what must be the same in groups that merge, in words."""
        return f"backend={self.choice!r}, device={self.device[:4]!r}, checks={self.checks!r}"

    def __str__(self) -> str:
        """Say it as it was asked for."""
        nodes = f", MPICOLL_NODES={','.join(map(str, self.sizes))}" if self.sizes else ""
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"{self.backend!r}{device}, checks={self.checks!r}{nodes}"


@dataclass(frozen=True, slots=True)
class Ground:
    """What the ranks of a group have between them; which of it there is chooses the transport.

    Attributes:
        comm: the group's private communicator.
        shared: the memory of this rank's node, where it is used.
        nodes: who is on which node, where there are several and their memory is used.
        near, across: then, the communicators of this node and of this rank's stripe.
        neighbours: ranks that are watched by their pids, those of this node and pid namespace.
        gpu: this rank's, in a group on GPU memory.
        nccl: the communicator of NCCL, where that moves the GPUs' memory.
        aware: whether MPI takes addresses of the GPUs' memory, where NCCL doesn't move it.
    """

    comm: MPI.Intracomm
    shared: memory.NodeMemory | None = None
    nodes: Nodes | None = None
    near: MPI.Intracomm | None = None
    across: MPI.Intracomm | None = None
    neighbours: dict[int, Identity] = field(default_factory=dict)
    gpu: cuda.Gpu | None = None
    nccl: Nccl | None = None
    aware: bool = False

    @property
    def comms(self) -> list[MPI.Intracomm]:
        """All communicators, to be given back with the group."""
        return [comm for comm in (self.near, self.across, self.comm) if comm is not None]


Prepares: TypeAlias = "Generator[int, None, Ground]"


def prepare(
    comm: MPI.Intracomm, wanted: Wanted, deadline: float, nccl: Nccl | None = None
) -> Prepares:
    """Find what the ranks of a new group have between them.  All have arrived.

    Args:
        nccl: their communicator of NCCL, where there is one already.

    Raises:
        UnsupportedError: on all ranks, if one can't use the GPU that it is to, or NCCL was asked
            for and can't be had.
    """
    ground = yield from _share(comm, wanted, deadline)
    if wanted.device == "cpu":
        return ground
    gpu, why = None, ""
    try:
        gpu = cuda.open_gpu(wanted.device, (yield from _local_rank(comm, wanted)))
    except UnsupportedError as error:
        why = str(error)
    rank, heard = yield from _first_reason(comm, why)
    if heard:
        yield from communicators.free(ground.comms, deadline)
        raise UnsupportedError(
            f"device {wanted.device!r}: rank {rank} can't use a GPU. {why or heard}"
        )
    assert gpu is not None
    ground, why = replace(ground, gpu=gpu), ""
    if wanted.choice in ("auto", "nccl"):
        if nccl is None:
            nccl, why = yield from _nccl(comm, gpu)
        if nccl is not None:
            return replace(ground, nccl=nccl)
    if wanted.choice in ("auto", "mpi"):
        said = yield from probe.takes_gpu_memory(gpu.device)
        rank, heard = yield from _first_reason(comm, said)
        if not heard:
            return replace(ground, aware=True)
        why = f"rank {rank} finds that its MPI library is not CUDA-aware: {said or heard}"
    if wanted.backend in ("nccl", "mpi"):
        yield from communicators.free(ground.comms, deadline)
        raise UnsupportedError(
            f"backend {wanted.backend!r} can't be had for GPU memory: {why}. "
            "Pass 'auto' or 'staged'"
        )
    return ground


_FindsNccl: TypeAlias = "Generator[int, None, tuple[Nccl | None, str]]"


def _nccl(comm: MPI.Intracomm, gpu: cuda.Gpu) -> _FindsNccl:
    """Make a communicator of NCCL, on all ranks or on none; then say why not."""
    size, own = comm.Get_size(), comm.Get_rank()
    version, identity, why = 0, "", ""
    order_nccl_launches()
    try:
        version, identity = binding.version(), gpu.identity()
    except UnsupportedError as error:
        why = str(error)
    except Exception as error:  # of CuPy, in a class of its own
        why = f"{type(error).__name__}: {error}"
    mine = np.array([digest(*identity.encode()), version], dtype=np.int64)
    table = np.empty((size, 2), dtype=np.int64)
    yield from until(comm.Iallgather([mine, MPI.INT64_T], [table, MPI.INT64_T]))
    threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
    why = why or no_nccl(table.tolist(), own, shares=nccl_shares_gpus(), threads=threads)
    name = np.zeros(NCCL_NAME, dtype=np.uint8)
    if own == 0 and not why:
        try:
            name[:] = np.frombuffer(binding.unique_id(), np.uint8)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    rank, heard = yield from _first_reason(comm, why)
    if heard:
        return None, f"rank {rank} says: {heard}"
    yield from until(comm.Ibcast([name, MPI.BYTE], 0))
    made, why = yield from _made(lambda: binding.join(gpu, size, name.tobytes(), own))
    rank, heard = yield from _first_reason(comm, why)
    if not heard:
        return made, ""
    if made is not None:
        made.abort()
    return None, f"on rank {rank} it could not be initialized: {heard}"


def _made(begin: Callable[[], Nccl]) -> _FindsNccl:
    """Begin to make a communicator of NCCL, and wait until it is made; else say why not."""
    made: Nccl | None = None
    try:
        made = begin()
        while not made.settled():
            yield IDLE
    except Exception as error:  # of NCCL, in classes of its own
        if made is not None:
            made.abort()
        return None, f"{type(error).__name__}: {error}"
    except BaseException:  # nobody waits for it any more
        if made is not None:
            made.abort()
        raise
    return made, ""


def split_nccl(parent: Ground, comm: MPI.Intracomm | None) -> Generator[int, None, Nccl | None]:
    """Split a group's communicator of NCCL as `comm` was split off.  All its ranks do so.

    Args:
        comm: what became of this rank; None: it is in no part.

    Returns:
        This rank's part; None also where NCCL could not split, on all ranks.
    """
    gpu, nccl = parent.gpu, parent.nccl
    if gpu is None or nccl is None:
        return None
    color, key = -1, 0
    if comm is not None:
        ours, everyone = comm.Get_group(), parent.comm.Get_group()
        color, key = ours.Translate_ranks([0], everyone)[0], comm.Get_rank()
        ours.Free()
        everyone.Free()
    with gpu.active():
        mark = gpu.mark(gpu.queue)
    while not gpu.is_done(mark):  # with calls under way, NCCL may come to a deadlock
        yield IDLE
    part, why = yield from _made(lambda: nccl.split(color, key))
    _, heard = yield from _first_reason(parent.comm, why)
    if heard and part is not None:
        part.abort()
    return None if heard or comm is None else part


def no_nccl(table: list[list[int]], own: int, *, shares: bool, threads: bool) -> str:
    """Return why NCCL is not for a group, as this rank sees it; "" if it is.

    Args:
        table: of each rank, what stands for its GPU, and its version of NCCL.
        own: this rank.
        shares: several ranks may share a GPU, if NCCL can do that.
        threads: MPI may be called from a thread, without which no deadline is kept.
    """
    gpu, version = table[own]
    if not version:
        return "it has no NCCL"
    if not threads:
        return "it needs MPI_THREAD_MULTIPLE, but MPI was initialized with less"
    sharing = [rank for rank, (other, _) in enumerate(table) if other == gpu]
    if len(sharing) > 1 and not (shares and version >= NCCL_SHARES):
        return (
            f"ranks {sharing} share a GPU, which NCCL refuses, unless it is 2.30 or newer and told "
            f"so by NCCL_MULTI_RANK_GPU_ENABLE=1"
        )
    return ""


def _local_rank(comm: MPI.Intracomm, wanted: Wanted) -> Generator[int, None, int]:
    """Return this rank's number on its node: the launcher's, else that within the group."""
    told = local_rank(environment())
    if told is not None:
        return told
    nodes, _ = yield from communicators.nodes_of(comm, wanted.sizes)
    return nodes.locate(comm.Get_rank())[1]


def _first_reason(comm: MPI.Intracomm, why: str) -> Generator[int, None, tuple[int, str]]:
    """Tell all ranks the lowest rank that gives a reason, and the reason; "" if none does."""
    size = comm.Get_size()
    first = np.array([comm.Get_rank() if why else size], dtype=np.int64)
    yield from until(comm.Iallreduce(MPI.IN_PLACE, [first, MPI.INT64_T], MPI.MIN))
    if first[0] == size:
        return size, ""
    text = np.zeros(_REASON, np.uint8)
    said = why.encode()[:_REASON]
    text[: len(said)] = np.frombuffer(said, np.uint8)
    yield from until(comm.Ibcast([text, MPI.BYTE], int(first[0])))
    return int(first[0]), text.tobytes().rstrip(b"\0").decode(errors="replace")


def _share(comm: MPI.Intracomm, wanted: Wanted, deadline: float) -> Prepares:
    """Find the nodes, and let their ranks share memory; where one node can't, none does."""
    if comm.Get_size() == 1:
        return Ground(comm)
    nodes, processes = yield from communicators.nodes_of(comm, wanted.sizes)
    spaces = {who.namespace for who in processes.values()}
    mine = processes[comm.Get_rank()].namespace
    neighbours = {r: who for r, who in processes.items() if mine == who.namespace != NOBODY}
    if wanted.backend == "mpi" or max(map(len, nodes.members)) == 1:
        return Ground(comm, neighbours=neighbours)
    locked = spaces != {mine} or mine == NOBODY
    if len(nodes.members) == 1:
        shared = yield from memory.share(comm, locked=locked)
        return Ground(comm, shared, neighbours=neighbours)
    node, place = nodes.locate(comm.Get_rank())
    near = yield from communicators.split(comm, node, place, deadline)
    assert near is not None
    shared = yield from memory.share(near, locked=locked)
    agreed = np.array([shared is not None], dtype=np.int64)
    yield from until(comm.Iallreduce(MPI.IN_PLACE, [agreed, MPI.INT64_T], MPI.MIN))
    if not agreed[0]:
        yield from communicators.free([near], deadline)
        return Ground(comm, neighbours=neighbours)
    stripe = place if place < nodes.stripes else None
    across = yield from communicators.split(comm, stripe, node, deadline)
    return Ground(comm, shared, nodes, near, across, neighbours)


def prepare_survivors(comm: MPI.Intracomm, wanted: Wanted, deadline: float) -> Prepares:
    """`prepare` for those who survived a failure; if one dies meanwhile, for those who are left."""
    while survives_deaths():
        ground = None
        try:
            ground = yield from prepare(comm, wanted, deadline)
        except MPI.Exception:  # a member died, or has seen one die
            pass
        fine = yield from communicators.all_succeeded(comm, ground is not None, deadline)
        if fine and ground is not None:
            return ground
        comm = yield from communicators.survivors(comm, deadline)
    return (yield from prepare(comm, wanted, deadline))


_turns = Turns()


def transport(ground: Ground) -> Transport:
    """Return the transport of a group."""
    host = _host_transport(ground)
    if ground.gpu is None:
        return host
    if ground.nccl is not None:
        return NcclTransport(host, ground.gpu, ground.nccl, _turns)
    if ground.aware:
        return AwareTransport(host, ground.gpu, ground.comm)
    return StagedTransport(host, ground.gpu)


def _host_transport(ground: Ground) -> Transport:
    if ground.shared is None:
        return MpiTransport(ground.comm)
    if ground.nodes is None:
        return ShmTransport(ground.comm, ground.shared)
    assert ground.near is not None
    return HierarchicalTransport(
        ground.comm, ground.nodes, ground.near, ground.shared, ground.across
    )


def arrival(ground: Ground, peers: Peers, wanted: Wanted) -> Arrival:
    """Return how the ranks of a group meet in its calls, and let its peers look there too."""
    peers.observe(ground.neighbours, communicators.strangers(ground.comm))
    shared = ground.shared
    if shared is None:
        return Arrival(ground.comm, peers)
    if ground.nodes is None:
        board = BoardArrival(ground.comm, peers, shared, range(shared.size))
    else:
        assert ground.near is not None
        node, place = ground.nodes.locate(ground.comm.Get_rank())
        board = NodesArrival(
            ground.comm,
            peers,
            shared,
            ground.nodes.members[node],
            near=ground.near,
            leaders=ground.across if place == 0 else None,
            everywhere=wanted.checks != "node",
        )
    peers.near, peers.has_arrived = board.places, board.has_arrived
    peers.post_notice, peers.notice = shared.post_notice, board.notice
    peers.last_seen = board.last_seen
    peers.mark_left = shared.leave
    if shared.locked:
        peers.observe_locks({r: partial(shared.has_died, p) for r, p in board.places.items()})
    return board


def factory_arguments(timeout: float, device: str) -> tuple[timedelta, Any]:
    """Return timeout and device in the types that a `_dist2` factory expects."""
    import sys

    torch = sys.modules.get("torch")
    return timedelta(seconds=timeout), device if torch is None else torch.device(device)
