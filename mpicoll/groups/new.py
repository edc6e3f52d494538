"""`new_group` and `parent_group`: groups over a communicator of MPI's, or over what was spawned."""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any, Literal, overload

from ..engine import communicators, kinds
from ..engine.arrival import Arrival
from ..engine.background import background, check_threads
from ..engine.call import Call
from ..engine.exit import check_process, ending
from ..engine.progress import engine
from ..engine.recorder import Recorder
from ..engine.tasks import GroupState
from ..engine.work import Work
from ..errors import (
    GroupBrokenError,
    InvalidCallError,
    MpicollError,
    TransportError,
    UnsupportedError,
)
from ..runtime import launcher
from ..runtime.library import MPI, Steps, start
from ..runtime.process import process
from ..runtime.settings import (
    default_timeout,
    environment,
    launchers,
    node_sizes,
    ranks_on_node,
    seconds,
    single,
)
from ..runtime.waiting import share_machine
from ..transports import select
from ..transports.select import GroupOptions, Resources
from ..typing import Device
from . import registry, rendezvous, spawn
from .caller import Caller, caller_on, wait_through
from .group import ProcessGroup
from .reclaim import Children


class Default:
    """What `new_group` works on where it is given no communicator.

    Attributes:
        comm: None: MPI.COMM_WORLD.
    """

    comm: MPI.Intracomm | None = None

    def enlist(self) -> None:
        """Have the engine listen there, as if a group were being made; to be told of a failure."""
        if self.comm is not None:
            _creation_state(self.comm)


def default() -> Default:
    """Return this rank's."""
    return process().the(Default)


@overload  # without options, so that a checker sees a misspelt name
def new_group(
    backend: Literal["auto", "mpi", "gloo", "staged", "nccl"] = "auto",
    timeout: float | timedelta | None = None,
    device: Device = "cpu",
    *,
    comm: MPI.Comm | None = None,
    group_name: str | None = None,
    checks: Literal["full", "node", "first"] = "full",
    progress: Literal["caller", "thread"] = "caller",
) -> ProcessGroup: ...


@overload
def new_group(
    backend: str,
    timeout: float | timedelta | None = None,
    device: Device = "cpu",
    *,
    comm: MPI.Comm | None = None,
    group_name: str | None = None,
    checks: Literal["full", "node", "first"] = "full",
    progress: Literal["caller", "thread"] = "caller",
    **options: object,
) -> ProcessGroup: ...


def new_group(
    backend: str = "auto",
    timeout: float | timedelta | None = None,
    device: Device = "cpu",
    *,
    comm: MPI.Comm | None = None,
    group_name: str | None = None,
    checks: Literal["full", "node", "first"] = "full",
    progress: Literal["caller", "thread"] = "caller",
    **options: object,
) -> ProcessGroup:
    """Make a group over MPI.COMM_WORLD, or over a communicator of yours.

    Every rank of the communicator must call it, all in the same order; it waits for them.

    Args:
        backend: "auto" (shared memory inside nodes, MPI between them), "mpi" (MPI alone), or a
            name given to `register_backend`; "gloo" means "auto".  On GPU memory "nccl" is
            NCCL (each rank needs a GPU of its own), "mpi" a CUDA-aware MPI library, "staged" goes
            through pinned host memory, and "auto" takes the first of these that can be had.
        timeout: seconds or `timedelta`: how long the making may take, and how long each call
            may take by default.  None: MPICOLL_TIMEOUT, else 1800 s.
        device: "cpu", "cuda" or "cuda:N" (or a `torch.device`).  With "cuda" each rank takes one
            of the GPUs that it sees by its number on its node.  A group on GPU memory takes host
            arrays, too, but not both in one call.  It needs CuPy.
        comm: an mpi4py intracommunicator; the group works on a duplicate of it.  With the `comm` of
            a group this is one of that group's calls.
        group_name: for messages, and to tell merging groups apart.
        checks: "full": every call is compared between all ranks.  "node": in a group over several
            nodes, an allreduce, broadcast, reduce, allgather, reduce_scatter, scan or exscan is
            compared only between the ranks of each node, which saves an exchange between the
            nodes.  Calls that differ between nodes then go unnoticed: they give wrong data, or
            time out.  A mismatch inside a node breaks the group.  "first": on GPU memory, a call by
            NCCL that was compared once, with this kind, dtype, count, op and root, is enqueued
            without waiting for the peers, so that the host can run ahead of them.  That such calls
            were the same is compared with the next call that meets, at the latest after 1,000: if
            not, the group is broken, and what they gave is undefined.
        progress: "caller": calls advance while somebody waits; "thread": from a thread as well.
        options: for a registered backend's factory.

    Returns:
        The group; of a registered backend, what its factory makes.

    Raises:
        InvalidCallError, UnsupportedError: an argument is wrong; or a rank can't use its GPU, which
            all ranks raise.
        CollectiveTimeoutError: not all ranks came; names those that are missing.
        CollectiveMismatchError: the ranks ask for different backends, or one was refused.
        TransportError: there is no MPI library, or it failed; or its ranks don't find one another,
            because another MPI's launcher started them.

    After an `InvalidCallError`, `UnsupportedError` or `CollectiveMismatchError` it may be called
    again.

    Example::

        with mc.new_group(timeout=60, checks="full") as pg:
            pg.barrier().wait()
    """
    start(timeout)
    check_process()
    parent = (default().comm or MPI.COMM_WORLD) if comm is None else comm
    if not isinstance(parent, MPI.Intracomm) or parent == MPI.COMM_NULL:
        raise InvalidCallError(
            f"comm must be an mpi4py intracommunicator, but got {parent!r}: "
            "Merge() an intercommunicator first; ranks outside a communicator make no group"
        )
    owner = caller_on(parent)
    _check_order(parent, owner)
    limit, call = default_timeout(), Call(kinds.NEW_GROUP)
    asked = refusal = None
    try:
        limit = seconds(timeout, limit)
        factory = registry.factory_of(backend)
        place = select.check_device(device, backend) if factory is None else "cpu"
        if progress not in ("caller", "thread"):
            raise InvalidCallError(f"progress must be 'caller' or 'thread', but got {progress!r}")
        if progress == "thread":
            check_threads()
        if options and factory is None:
            raise InvalidCallError(
                f"unknown options {sorted(options)}: new_group takes backend, timeout, device, "
                "comm, group_name, checks and progress"
            )
        sizes = node_sizes(MPI.COMM_WORLD.Get_size())
        asked = GroupOptions(backend, checks, sizes, place)
        call.digest, call.payload = asked.digest(), str(asked)
    except (InvalidCallError, UnsupportedError) as error:
        refusal = error
        call.refused = f"{type(error).__name__}: {error}"
    if owner is None:
        resources, children = _meet(parent, call, limit, asked, refusal)
    else:
        resources, children = _meet_in(owner, call, limit, asked, refusal)
    assert asked is not None
    name = group_name or ("world" if comm is None else "comm")
    made = Caller(resources, asked, timeout=limit, name=name, progress=progress)
    children.add(made.child)
    group = ProcessGroup(made)
    return group if factory is None else registry.make(factory, group, limit, str(device), options)


def _check_order(parent: MPI.Intracomm, owner: Caller | None) -> None:
    """Raise if an earlier failure has let the ranks of a communicator get out of step."""
    if owner is not None:
        owner.check_usable()
        return
    state, _, _ = _creation_state(parent)
    if state.broken is not None:
        raise GroupBrokenError(
            f"an earlier new_group over this communicator failed: {state.broken}"
        ) from state.broken


def _meet_in(
    owner: Caller,
    call: Call,
    limit: float,
    asked: GroupOptions | None,
    refusal: MpicollError | None,
) -> tuple[Resources, Children]:
    """Have the making be a call of the group whose own communicator is the parent.

    It has its turn among that group's calls, then, and no notice is read by the wrong one.
    """

    def check(rank: int, size: int) -> Call:
        if refusal is not None:
            raise refusal
        return call

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        return communicators.duplicate(owner.comm)

    resources, _ = owner.make_comm(kinds.NEW_GROUP, limit, check, make, parts=False, options=asked)
    assert resources is not None
    return resources, owner.children


def _meet(
    parent: MPI.Intracomm,
    call: Call,
    limit: float,
    asked: GroupOptions | None,
    refusal: MpicollError | None,
) -> tuple[Resources, Children]:
    """Wait for all ranks of a communicator, and make what the new group runs on.

    Returns that, and the groups that were made over the communicator.
    """
    state, recorder, children = _creation_state(parent)
    work = Work(state, call, state.seq + 1, limit, recorder)

    def over() -> None:
        engine().delist(state)  # `parent` may be freed from now on
        recorder.close()

    work.callbacks.append(over)
    try:
        state.seq += 1
        engine().launch(work, _create(parent, work, children, asked))
    except BaseException as error:
        engine().forsake(work, error)
        raise
    if refusal is not None:
        if parent.Get_size() > 1:
            with contextlib.suppress(InvalidCallError):  # else the peers learn of it later
                background().progress()
        raise refusal
    wait_through(work)
    resources: Resources = call.result
    return resources, children


def _creation_state(parent: MPI.Intracomm) -> tuple[GroupState, Recorder, Children]:
    """Return the state in which groups over `parent` are made, its recorder, and those groups."""
    key = process().the(_first_of_rank)
    # It is an attribute, since that goes with the communicator: a handle may come to mean another.
    made: Any = parent.Get_attr(key)
    if made is not None and made[0].broken is not None and parent.Get_size() == 1:
        made = None  # there is no other rank, with which the order could be lost
    if made is None:
        if parent != MPI.COMM_SELF:
            _refuse_singleton()
        ranks = communicators.world_ranks(parent)
        recorder = Recorder("new_group", parent.Get_rank(), ranks, frames=2)
        state = GroupState("new_group", parent, engine().active)
        # Between the makings of groups no rank listens there.
        state.peers.silence = (
            "gave no answer: it is in another group's call, busy outside mpicoll, stopped or dead"
        )
        made = state, recorder, Children()
        parent.Set_attr(key, made)
    state, recorder, children = made
    engine().enlist(state)
    recorder.open()
    return state, recorder, children


def _first_of_rank() -> int:
    """Prepare a rank for its first group; return the key of communicators' creation states."""
    if process().is_thread:
        share_machine(MPI.COMM_WORLD.Get_size())
    else:
        ending().hook()
        share_machine(ranks_on_node() or MPI.COMM_WORLD.Get_size())
    return MPI.Comm.Create_keyval()


def _refuse_singleton() -> None:
    """Refuse to work alone where the launcher has started several ranks."""
    world = MPI.COMM_WORLD.Get_size()
    if process().is_thread or world > 1 or MPI.Comm.Get_parent() != MPI.COMM_NULL or single():
        return  # a program that spawns ranks gets as many as it asked for
    vendor, _ = MPI.get_vendor()
    found = launchers(environment())
    why = launcher.singleton(world, vendor, found)
    if why:
        remedy = launcher.remedy(vendor, launcher.library_file())
        if found[0].name == "torchrun":
            remedy = f"make the first group before mpi4py.MPI is imported, or {remedy}"
        raise TransportError(
            f"{why}: {remedy}. Where single ranks are "
            "meant, set MPICOLL_SINGLE=1 or pass comm=MPI.COMM_SELF"
        )


def _create(
    parent: MPI.Intracomm, work: Work, children: Children, asked: GroupOptions | None
) -> Steps:
    """Make a communicator and what else the new group runs on, `work.call.result`."""
    made = yield from communicators.duplicate(parent)
    assert made is not None
    yield from Arrival(made, work.group_state.peers).meet(work.call, work.seq)
    if asked is None:
        return  # the peers know by their arrival that it was refused, and go no further
    yield from children.reclaim(made, work.deadline)
    yield from rendezvous.name_job(made)
    work.call.result = yield from select.prepare(made, asked, work.deadline)


def parent_group(timeout: float | timedelta | None = None) -> ProcessGroup:
    """Return the group that this program was started for, by `ProcessGroup.spawn`.

    Every rank that was started must call it, once; it waits for them.  Those that called `spawn`
    come first in the group.

    Args:
        timeout: seconds or `timedelta`: how long the making may take, and the group's default.
            None: MPICOLL_TIMEOUT, else 1800 s.

    Raises:
        InvalidCallError: this program was not spawned, or it has called this before.
        CollectiveTimeoutError: not all that were started have called, or those that called `spawn`
            have given up.
    """
    check_process()
    parents = MPI.Comm.Get_parent()
    if parents == MPI.COMM_NULL:
        raise InvalidCallError(
            "parent_group: no rank of a group has started this program, or it was called before: "
            "start it with pg.spawn([sys.executable, 'worker.py'], n)"
        )
    own = new_group(timeout=timeout, group_name="spawned")
    made = spawn.join_parents(own._caller, parents, timeout)
    own.shutdown()
    return ProcessGroup(made)
