"""Which transport a group gets.

The choice is made when a group is created and agreed by all its ranks, never at a call.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..engine import communicators
from ..engine.arrival import Arrival, BoardArrival, NodesArrival
from ..engine.board import NO_BOARD, Board, NodeBoard
from ..engine.call import digest
from ..engine.peers import Peers
from ..errors import InvalidCallError, UnsupportedError
from ..runtime import agreement, memory
from ..runtime.agreement import first_reason
from ..runtime.library import IDLE, MPI
from ..runtime.process import process
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
from .hierarchical import HierarchicalTransport
from .mpi import MpiTransport
from .shm import rings
from .shm.inline import Inline
from .shm.rings import RingMemory
from .shm.transport import ShmTransport
from .tuning import Tuning

if TYPE_CHECKING:  # what is in `cuda` is imported by the groups that use it
    from .cuda.gpu import Gpu
    from .cuda.nccl import Nccl

OWN = ("auto", "gloo", "mpi", "staged", "nccl")
"""The names that mpicoll serves itself.  "gloo" means "auto", so that _dist2 scripts run."""

NCCL_NAME = 128  # bytes of the name of one of NCCL's communicators
NCCL_SHARES = 23000  # the version of NCCL that lets ranks share a GPU, where that is set


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
class GroupOptions:
    """What a group was asked to run on: the same on all its ranks, and handed to its children.

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

    @property
    def device_kind(self) -> str:
        """The device without its number: "cpu" or "cuda"."""
        return self.device.partition(":")[0]

    def on(self, gpu: Gpu) -> GroupOptions:
        """Return the same on a GPU of this rank's: there its group's children stay."""
        return replace(self, device=f"cuda:{gpu.device}")

    def as_json(self) -> dict[str, Any]:
        """Return the same as JSON can hold it, for ranks that are yet to take their GPUs."""
        return {**asdict(self), "device": self.device_kind}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> GroupOptions:
        """Return what `as_json` said."""
        return cls(**{**said, "sizes": tuple(said["sizes"])})

    def digest(self) -> int:
        """Return a number that differs where ranks want different things."""
        on_gpu = self.device != "cpu"
        return digest(*self.choice.encode(), -1, *self.checks.encode(), -1, *self.sizes, -1, on_gpu)

    def alike(self) -> str:
        """Return what must be the same in groups that merge, in words."""
        return f"backend={self.choice!r}, device={self.device_kind!r}, checks={self.checks!r}"

    def __str__(self) -> str:
        """Say it as it was asked for."""
        nodes = f", MPICOLL_NODES={','.join(map(str, self.sizes))}" if self.sizes else ""
        device = "" if self.device == "cpu" else f", device={self.device!r}"
        return f"{self.backend!r}{device}, checks={self.checks!r}{nodes}"


@dataclass(frozen=True, slots=True)
class Resources:
    """What the ranks of a group have between them; which of it there is chooses the transport.

    Attributes:
        comm: the group's private communicator.
        shared: the memory of this rank's node, where it is used.
        rings: that of its messages, where they don't go by MPI.
        nodes: who is on which node, where there are several and their memory is used.
        near, across: then, the communicators of this node and of this rank's stripe.
        neighbours: ranks that are watched by their pids, those of this node and pid namespace.
        gpu: this rank's, in a group on GPU memory.
        nccl: the communicator of NCCL, where that moves the GPUs' memory.
        aware: whether MPI takes addresses of the GPUs' memory, where NCCL doesn't move it.
    """

    comm: MPI.Intracomm
    shared: memory.NodeMemory | None = None
    rings: RingMemory | None = None
    nodes: Nodes | None = None
    near: MPI.Intracomm | None = None
    across: MPI.Intracomm | None = None
    neighbours: dict[int, Identity] = field(default_factory=dict)
    gpu: Gpu | None = None
    nccl: Nccl | None = None
    aware: bool = False

    @property
    def comms(self) -> list[MPI.Intracomm]:
        """All communicators, to be given back with the group."""
        return [comm for comm in (self.near, self.across, self.comm) if comm is not None]


Prepares: TypeAlias = "Generator[int, None, Resources]"


def prepare(
    comm: MPI.Intracomm, options: GroupOptions, deadline: float, nccl: Nccl | None = None
) -> Prepares:
    """Find what the ranks of a new group have between them.  All have arrived.

    Args:
        nccl: their communicator of NCCL, where there is one already.

    Raises:
        UnsupportedError: on all ranks, if one can't use the GPU that it is to, or NCCL was asked
            for and can't be had.
    """
    resources = yield from _share(comm, options, deadline)
    if options.device == "cpu":
        return resources
    from .cuda import probe
    from .cuda.gpu import open_gpu

    gpu, why = None, ""
    try:
        gpu = open_gpu(options.device, (yield from _local_rank(comm, options)))
    except UnsupportedError as error:
        why = str(error)
    rank, reason = yield from first_reason(comm, why)
    if reason:
        yield from communicators.free(resources.comms, deadline)
        raise UnsupportedError(
            f"device {options.device!r}: rank {rank} can't use a GPU. {why or reason}"
        )
    assert gpu is not None
    resources, why = replace(resources, gpu=gpu), ""
    if options.choice in ("auto", "nccl"):
        if nccl is None:
            nccl, why = yield from _nccl(comm, gpu)
        if nccl is not None:
            return replace(resources, nccl=nccl)
    if options.choice in ("auto", "mpi"):
        own = yield from probe.takes_gpu_memory(gpu.device)
        rank, reason = yield from first_reason(comm, own)
        if not reason:
            return replace(resources, aware=True)
        why = f"rank {rank} finds that its MPI library is not CUDA-aware: {own or reason}"
    if options.backend in ("nccl", "mpi"):
        yield from communicators.free(resources.comms, deadline)
        raise UnsupportedError(
            f"backend {options.backend!r} can't be had for GPU memory: {why}. "
            "Pass 'auto' or 'staged'"
        )
    return resources


_FindsNccl: TypeAlias = "Generator[int, None, tuple[Nccl | None, str]]"


def _nccl(comm: MPI.Intracomm, gpu: Gpu) -> _FindsNccl:
    """Make a communicator of NCCL, on all ranks or on none; in the second case return why."""
    from .cuda import binding

    size, own = comm.Get_size(), comm.Get_rank()
    version, identity, why = 0, "", ""
    order_nccl_launches()
    try:
        version, identity = binding.version(), gpu.identity()
    except UnsupportedError as error:
        why = str(error)
    except Exception as error:  # of CuPy, in a class of its own
        why = f"{type(error).__name__}: {error}"
    table = yield from agreement.rows(comm, digest(*identity.encode()), version)
    threads = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
    why = why or no_nccl(table.tolist(), own, shares=nccl_shares_gpus(), threads=threads)
    name = b""
    if own == 0 and not why:
        try:
            name = binding.unique_id()
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    rank, reason = yield from first_reason(comm, why)
    if reason:
        return None, f"rank {rank} says: {reason}"
    name = yield from agreement.bytes_of(comm, name, NCCL_NAME)
    made, why = yield from _made(lambda: binding.join(gpu, size, name, own))
    rank, reason = yield from first_reason(comm, why)
    if not reason:
        return made, ""
    if made is not None:
        made.abort()
    return None, f"on rank {rank} it could not be initialized: {reason}"


def _made(begin: Callable[[], Nccl]) -> _FindsNccl:
    """Begin to make a communicator of NCCL, and wait until it is made; else return why not."""
    made: Nccl | None = None
    try:
        made = begin()
        while not made.settled():
            yield IDLE
    except Exception as error:  # of NCCL, in classes of its own
        if made is not None:
            made.abort()
        return None, f"{type(error).__name__}: {error}"
    except BaseException:  # no call waits for it any more
        if made is not None:
            made.abort()
        raise
    return made, ""


def split_nccl(parent: Resources, comm: MPI.Intracomm | None) -> Generator[int, None, Nccl | None]:
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
    _, reason = yield from first_reason(parent.comm, why)
    if reason and part is not None:
        part.abort()
    return None if reason or comm is None else part


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


def _local_rank(comm: MPI.Intracomm, options: GroupOptions) -> Generator[int, None, int]:
    """Return this rank's number on its node: the launcher's, else that within the group."""
    launched = local_rank(environment())
    if launched is not None:
        return launched
    nodes, _ = yield from communicators.nodes_of(comm, options.sizes)
    return nodes.locate(comm.Get_rank())[1]


def _share(comm: MPI.Intracomm, options: GroupOptions, deadline: float) -> Prepares:
    """Find the nodes, and let their ranks share memory; where one node can't, none does."""
    if comm.Get_size() == 1:
        return Resources(comm, None if options.backend == "mpi" else memory.alone())
    nodes, processes = yield from communicators.nodes_of(comm, options.sizes)
    spaces = {who.namespace for who in processes.values()}
    mine = processes[comm.Get_rank()].namespace
    neighbours = {r: who for r, who in processes.items() if mine == who.namespace != NOBODY}
    if options.backend == "mpi" or max(map(len, nodes.members)) == 1:
        return Resources(comm, neighbours=neighbours)
    locked = spaces != {mine} or mine == NOBODY
    if len(nodes.members) == 1:
        shared = yield from memory.share(comm, locked=locked)
        messages = None if shared is None else (yield from rings.share(comm))
        return Resources(comm, shared, messages, neighbours=neighbours)
    node, place = nodes.locate(comm.Get_rank())
    near = yield from communicators.split(comm, node, place, deadline)
    assert near is not None
    shared = yield from memory.share(near, locked=locked)
    (everywhere,) = yield from agreement.unanimous(comm, shared is not None)
    if not everywhere:
        yield from communicators.free([near], deadline)
        return Resources(comm, neighbours=neighbours)
    stripe = place if place < nodes.stripes else None
    across = yield from communicators.split(comm, stripe, node, deadline)
    return Resources(comm, shared, None, nodes, near, across, neighbours)


def prepare_survivors(comm: MPI.Intracomm, options: GroupOptions, deadline: float) -> Prepares:
    """`prepare` for the survivors of a failure; if one dies meanwhile, for those that are left."""
    while survives_deaths():
        resources = None
        try:
            resources = yield from prepare(comm, options, deadline)
        except MPI.Exception:  # a member died, or has seen one die
            pass
        fine = yield from communicators.all_succeeded(comm, resources is not None, deadline)
        if fine and resources is not None:
            return resources
        comm = yield from communicators.survivors(comm, deadline)
    return (yield from prepare(comm, options, deadline))


tuning = Tuning()
"""Of the groups that are made from now on; the tests replace it, on all ranks alike."""


def transport(resources: Resources) -> Transport:
    """Return the transport of a group."""
    host = _host_transport(resources)
    if resources.gpu is None:
        return host
    from .cuda.aware import AwareTransport
    from .cuda.nccl import NcclTransport, Turns
    from .cuda.staged import StagedTransport

    if resources.nccl is not None:
        return NcclTransport(host, resources.gpu, resources.nccl, process().the(Turns), tuning)
    if resources.aware:
        return AwareTransport(host, resources.gpu, resources.comm, tuning)
    return StagedTransport(host, resources.gpu, tuning)


def _host_transport(resources: Resources) -> Transport:
    if resources.shared is None:
        return MpiTransport(resources.comm, tuning)
    if resources.nodes is None:
        return ShmTransport(resources.comm, resources.shared, tuning, resources.rings)
    assert resources.near is not None
    return HierarchicalTransport(
        resources.comm, resources.nodes, resources.near, resources.shared, resources.across, tuning
    )


def board(resources: Resources) -> Board:
    """Return what a group's ranks on one node show each other."""
    shared = resources.shared
    if shared is None:
        return NO_BOARD
    if resources.nodes is None:
        return NodeBoard(shared, range(shared.size))
    node, _ = resources.nodes.locate(resources.comm.Get_rank())
    return NodeBoard(shared, resources.nodes.members[node])


def arrival(resources: Resources, peers: Peers, options: GroupOptions) -> Arrival:
    """Return how the ranks of a group meet in its calls."""
    comm, there = resources.comm, peers.board
    if not isinstance(there, NodeBoard):
        return Arrival(comm, peers)
    if resources.nodes is None:
        return BoardArrival(comm, peers, there, Inline(there.memory, tuning.inline))
    assert resources.near is not None
    _, place = resources.nodes.locate(comm.Get_rank())
    return NodesArrival(
        comm,
        peers,
        there,
        near=resources.near,
        leaders=resources.across if place == 0 else None,
        everywhere=options.checks != "node",
    )
