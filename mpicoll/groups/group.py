"""`ProcessGroup`: the user's object, and how one comes to be.

A public method checks, starts and returns.  Unless said otherwise, every rank of the group
must call it, all in the same order; each takes a `timeout` (seconds or `timedelta`, counted
from the call; None: the group's) and returns a `Work`.  Arrays are C-contiguous: NumPy, torch
tensors, or anything with the buffer protocol or DLPack; on a group made with ``device="cuda"``
also arrays in GPU memory.  A list of one array is accepted where an array is; a NumPy array or a
tensor with a row per rank where a list of arrays is.  What a rank gives to itself may lie exactly
where it is to come: the call is in place there.

What a `Work` may raise, besides the errors that a method names:

- `InvalidCallError`, `UnsupportedError` at the call, before anything is sent;
- `CollectiveMismatchError`: peers called something else, or were refused; no data was moved;
- `CollectiveTimeoutError`: the deadline passed; names the ranks that had not arrived;
- `RemoteRankError`, `RankFailedError`, `TransportError`: a peer left or died, or MPI failed.

After the last two lines the group is broken, its outputs are undefined, and every further
call raises `GroupBrokenError`; after the others it is usable and no array has changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any

from ..arrays.ops import ReduceOp
from ..engine import calls, communicators
from ..engine.arrival import Arrival, BoardArrival, Once
from ..engine.calls import ANY_SOURCE, NULL, PROC_NULL, Call, Message, Peer
from ..engine.exit import check_process, ending
from ..engine.progress import Lane, Task, check_threads, engine, share_machine
from ..engine.recorder import Recorder
from ..engine.work import Work
from ..errors import (
    CallInterruptedError,
    GroupBrokenError,
    GroupClosedError,
    InvalidCallError,
    MpicollError,
    TransportError,
    Unique,
    UnsupportedError,
)
from ..runtime import launcher
from ..runtime.library import IDLE, MPI, Steps, highest_tag
from ..runtime.settings import (
    NEVER,
    default_timeout,
    environment,
    launchers,
    node_sizes,
    ranks_on_node,
    seconds,
    single,
)
from ..stores import Store, TCPStore
from ..transports import select
from ..transports.base import Transport
from ..transports.select import Ground, Wanted
from ..transports.shm import core
from . import merge, rendezvous, spawn
from .reclaim import Child, Children

SUM = ReduceOp.SUM

_VERDICT = 0.06  # seconds that one rank's verdict may take to reach its group
_SLACK = 3.0  # the same, where it waited for others than the group's ranks
_FAILURES = 64  # Works that failed and may have been dropped, which a call looks at


class ProcessGroup(Unique):
    """A group of ranks that call collectives together.  Made by `new_group` and its kin.

    ``with new_group() as pg:`` shuts the group down at the end, or aborts it if the body raises.

    Attributes:
        comm: the group's mpi4py communicator.  It is private: mpicoll's own calls run on it,
            so use it while no Work is under way, or `Dup` it.
    """

    _instead = (
        "all that use it share the one object (set it aside in the __getstate__ of what holds it, "
        "or call current_process_group() there); split(0) makes another group of the same ranks"
    )

    def __init__(
        self,
        ground: Ground,
        wanted: Wanted,
        *,
        timeout: float,
        name: str,
        desc: str = "",
        progress: str = "caller",
    ) -> None:
        self.comm = comm = ground.comm
        self._ground = ground
        if ground.gpu is not None:  # groups that are made out of this one stay on this rank's GPU
            wanted = dataclasses.replace(wanted, device=f"cuda:{ground.gpu.device}")
        self._wanted = wanted
        self._rank = comm.Get_rank()
        self._size = comm.Get_size()
        self._timeout = timeout
        self._desc = desc
        self._progress = progress
        self._highest_tag = highest_tag()
        self._lane = Lane(name, comm)
        self._transport = select.transport(ground)
        self._lane.abort = self._transport.abort
        self._arrival = select.arrival(ground, self._lane.peers, wanted)
        self._lane.exchange = self._arrival.exchange
        self._lane.gathering = self._arrival.gathering
        self._once = self._lane.once = Once() if wanted.checks == "first" else None
        self._world_ranks = communicators.world_ranks(comm)
        self._recorder = Recorder(name, self._rank, self._world_ranks, checks=wanted.checks)
        self._lane.mark = self._recorder.mark
        if ground.shared is not None:
            shared = ground.shared
            self._lane.page, self._lane.word = shared.words, shared.finished[shared.rank]
        self._lane.farewell = partial(
            _farewell, self._lane, self._arrival, self._transport, self._recorder
        )
        self._core: core.Core | None = None  # the compiled way of small calls
        inline = self._transport.inline
        if inline is not None and self._once is None and core.available():
            assert isinstance(self._arrival, BoardArrival)
            self._core = core.make(inline, self._arrival, self._lane, self._recorder)
            self._lane.core = weakref.ref(self._core)
        self._ending: Work | None = None  # the call of shutdown()
        self._children = Children()
        self._kin = Child(
            *(self, ground.comms, self._transport, self._lane, self._recorder, self._children)
        )
        engine.enlist(self._lane)
        if progress == "thread":
            engine.background(stay=True)
        if self._transport.watched:
            engine.keep_deadlines()

    # ---- what it is ----

    @property
    def is_broken(self) -> bool:
        """Whether an earlier failure left it unusable; `shrink_group` goes on from there."""
        engine.mend()
        return self._lane.broken is not None

    @property
    def is_closed(self) -> bool:
        """Whether it was shut down or aborted."""
        return bool(self._lane.closed)

    def __repr__(self) -> str:
        state = self._lane.closed or ("broken" if self._lane.broken else "")
        return (
            f"<mpicoll.ProcessGroup {self.group_name!r}: rank {self._rank} of {self._size}, "
            f"transport {self._transport.name}{', compiled' if self._core else ''}"
            f"{', ' + state if state else ''}>"
        )

    def rank(self) -> int:
        """Return this process's rank in the group, from 0."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks in the group."""
        return self._size

    def name(self) -> str:
        """Return the name of the group's transport, as `_dist2` names its backend."""
        return self._transport.name

    @property
    def group_name(self) -> str:
        """The group's name."""
        return self._lane.name

    @property
    def group_desc(self) -> str:
        """What the group is for, in its maker's words."""
        return self._desc

    @property
    def timeout(self) -> timedelta:
        """How long a call may take where it doesn't say otherwise; `timedelta.max`: for ever."""
        return timedelta.max if self._timeout >= NEVER else timedelta(seconds=self._timeout)

    @property
    def device(self) -> str:
        """The device whose memory the group moves, besides the host's: "cpu" means none."""
        return self._wanted.device

    @property
    def ranks(self) -> list[int]:
        """The members, in order, as ranks of MPI.COMM_WORLD.

        -1 stands for a member of another world: of a separately launched job, or spawned.
        """
        return list(self._world_ranks)

    def set_timeout(self, timeout: object) -> None:
        """Set how long a call may take where it doesn't say otherwise.  Local."""
        self._timeout = seconds(timeout, self._timeout)

    def _get_backend(self, device: object = None) -> Any:
        return SimpleNamespace(
            name=self.name, options=SimpleNamespace(_timeout=self.timeout, backend=self.name())
        )

    def dump(self) -> str:
        """Return the flight recorder as JSON: the group's last calls on this rank.  Local.

        Beside the group's name, rank, size and ranks it has "calls", oldest first, each with its
        number, arguments, state ("called", "finished" or "failed"), times in seconds of the
        epoch, error, and the file and line of yours that called.
        """
        return json.dumps(self._recorder.report())

    # ---- collectives on arrays ----

    def allreduce(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce an array over all ranks, in place on each.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp`, the same on all ranks (a PREMUL_SUM factor is each rank's own).
        """
        return (self._core and self._core.allreduce(tensor, op, timeout)) or self._call(
            "allreduce", timeout, calls.allreduce, tensor, op
        )

    def broadcast(self, tensor: object, root: int, timeout: object = None) -> Work:
        """Copy the root's array to all other ranks, in place.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            root: the rank that gives; the same on all ranks.
        """
        return (self._core and self._core.broadcast(tensor, root, timeout)) or self._call(
            "broadcast", timeout, calls.broadcast, tensor, root
        )

    def reduce(self, tensor: object, root: int, op: object = SUM, timeout: object = None) -> Work:
        """Reduce an array over all ranks, in place on the root; other ranks' stay as they are.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            root: the rank that gets the result; the same on all ranks.
            op: a `ReduceOp`, the same on all ranks.
        """
        return (self._core and self._core.reduce(tensor, root, op, timeout)) or self._call(
            "reduce", timeout, calls.reduce, tensor, root, op
        )

    def barrier(self, timeout: object = None) -> Work:
        """Wait for all ranks."""
        return (self._core and self._core.barrier(timeout)) or self._call(
            "barrier", timeout, lambda rank, size: Call("barrier")
        )

    def allgather(
        self, output_tensors: object, input_tensor: object, timeout: object = None
    ) -> Work:
        """Gather an array from every rank, on every rank.

        Args:
            output_tensors: a list of `size` arrays; the i-th gets rank i's input and is as
                large as that.  Sizes may differ between entries, the same way on all ranks.
            input_tensor: this rank's contribution.
        """
        return (
            self._core and self._core.allgather(output_tensors, input_tensor, timeout)
        ) or self._call("allgather", timeout, calls.allgather, output_tensors, input_tensor)

    def all_gather_single(self, output: object, input: object, timeout: object = None) -> Work:
        """Gather equal arrays from every rank into one array, on every rank.

        Args:
            output: of `size` times input's elements; rank i's input comes i-th.
            input: of one dtype and number of elements on all ranks.
        """
        return (self._core and self._core.all_gather_single(output, input, timeout)) or self._call(
            "all_gather_single", timeout, calls.all_gather_single, output, input
        )

    def gather(
        self, output_tensors: object, input_tensor: object, root: int, timeout: object = None
    ) -> Work:
        """Gather an array from every rank, on the root.

        Args:
            output_tensors: on the root a list of `size` arrays, the i-th as large as rank i's
                input; not looked at elsewhere.
            input_tensor: this rank's contribution; sizes may differ between ranks.
            root: the rank that gets; the same on all ranks.
        """
        return (
            self._core and self._core.gather(output_tensors, input_tensor, root, timeout)
        ) or self._call("gather", timeout, calls.gather, output_tensors, input_tensor, root)

    def scatter(
        self, output_tensor: object, input_tensors: object, root: int, timeout: object = None
    ) -> Work:
        """Give each rank one array of the root's list.

        Args:
            output_tensor: as large as the root's entry for this rank.
            input_tensors: on the root a list of `size` arrays; not looked at elsewhere.
            root: the rank that gives; the same on all ranks.
        """
        return (
            self._core and self._core.scatter(output_tensor, input_tensors, root, timeout)
        ) or self._call("scatter", timeout, calls.scatter, output_tensor, input_tensors, root)

    def reduce_scatter(
        self,
        output: object,
        input: object,
        op: object = SUM,
        timeout: object = None,
    ) -> Work:
        """Reduce a list of arrays over all ranks, and give the i-th result to rank i.

        Args:
            output: as large as `input[rank]`.
            input: a list of `size` arrays; sizes may differ between entries, the same way on
                all ranks.
            op: a `ReduceOp`, the same on all ranks.
        """
        return (self._core and self._core.reduce_scatter(output, input, op, timeout)) or self._call(
            "reduce_scatter", timeout, calls.reduce_scatter, output, input, op
        )

    def reduce_scatter_single(
        self,
        output: object,
        input: object,
        op: object = SUM,
        timeout: object = None,
    ) -> Work:
        """Reduce an array over all ranks, and give the i-th equal part of it to rank i.

        Args:
            output: of one number of elements on all ranks.
            input: of `size` times output's elements.
            op: a `ReduceOp`, the same on all ranks.
        """
        return (
            self._core and self._core.reduce_scatter_single(output, input, op, timeout)
        ) or self._call(
            "reduce_scatter_single", timeout, calls.reduce_scatter_single, output, input, op
        )

    def alltoall(
        self, output_tensors: object, input_tensors: object, timeout: object = None
    ) -> Work:
        """Send the j-th array to rank j, and get one from each rank.

        Args:
            output_tensors: a list of `size` arrays; the i-th is as large as what rank i sends here.
            input_tensors: a list of `size` arrays of any sizes.
        """
        return (
            self._core and self._core.alltoall(output_tensors, input_tensors, timeout)
        ) or self._call("alltoall", timeout, calls.alltoall, output_tensors, input_tensors)

    def all_to_all_single(
        self,
        output: object,
        input: object,
        output_split_sizes: Sequence[int] | None = None,
        input_split_sizes: Sequence[int] | None = None,
        timeout: object = None,
    ) -> Work:
        """Send consecutive rows of one array to the ranks in turn, and get rows from each.

        Args:
            output, input: arrays of one dtype, whose rows (entries of dimension 0) are of one size.
            output_split_sizes: rows that come from each rank; None or []: equal parts.
            input_split_sizes: rows that go to each rank; None or []: equal parts.
        """
        sizes = output_split_sizes, input_split_sizes
        return (
            self._core and self._core.all_to_all_single(output, input, *sizes, timeout)
        ) or self._call(
            "all_to_all_single", timeout, calls.all_to_all_single, output, input, *sizes
        )

    def scan(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce, on each rank, the arrays of ranks 0 to this one, in place.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp` other than AVG, the same on all ranks.
        """
        return (self._core and self._core.scan(tensor, op, timeout)) or self._call(
            "scan", timeout, self._prefix("scan"), tensor, op
        )

    def exscan(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce, on each rank, the arrays of the ranks below this one, in place.

        Rank 0's array stays as it is.  Arguments as in `scan`.
        """
        return (self._core and self._core.exscan(tensor, op, timeout)) or self._call(
            "exscan", timeout, self._prefix("exscan"), tensor, op
        )

    @staticmethod
    def _prefix(kind: str) -> Callable[..., Call]:
        return lambda rank, size, tensor, op: calls.scan(kind, rank, size, tensor, op)

    def empty(self, shape: object, dtype: object = "float32", timeout: object = None) -> Any:
        """Make an array in the node's shared memory, which every rank of the group must call for.

        Where each rank gives its array of one such call, or the like part of it, to `allreduce`,
        `reduce` or `reduce_scatter_single`, the ranks work on one another's memory without copying
        in and out (not in half precision, nor with AVG, PREMUL_SUM, or MIN and MAX of floats).
        Elsewhere it is an array like any other, and it may outlive the group.

        Args:
            shape: an int or a tuple of ints; the same number of elements on all ranks.
            dtype: a NumPy dtype, the same on all ranks.

        Returns:
            A NumPy array of undefined content.  Where ranks can't share memory, or /dev/shm has no
            room for it (which warns), an ordinary one.
        """
        work = self._call("empty", timeout, lambda rank, size: calls.empty(shape, dtype))
        work.wait()
        sides, kind = work.call.payload
        return work.call.result.view(kind).reshape(sides)

    # ---- several arrays in one call ----

    def allreduce_coalesced(
        self, tensors: Sequence[object], op: object = SUM, timeout: object = None
    ) -> Work:
        """`allreduce` of each array of a list, as one call."""

        def check(rank: int, size: int) -> Call:
            arrays = calls.several(tensors, "tensors")
            parts = [calls.allreduce(rank, size, x, op) for x in arrays]
            return calls.coalesced("allreduce_coalesced", parts, "tensors")

        return self._call("allreduce_coalesced", timeout, check)

    def allgather_coalesced(
        self,
        output_lists: Sequence[Sequence[object]],
        input_list: Sequence[object],
        timeout: object = None,
    ) -> Work:
        """`allgather` of each array of `input_list`, as one call.

        Args:
            output_lists: a list of `size` lists; the i-th is as rank i's `input_list`.
            input_list: this rank's contributions, equally many on all ranks.
        """

        def check(rank: int, size: int) -> Call:
            inputs = calls.several(input_list, "input_list")
            by_input = calls.transposed(output_lists, size, len(inputs))
            parts = [
                calls.allgather(rank, size, outs, x)
                for outs, x in zip(by_input, inputs, strict=True)
            ]
            return calls.coalesced("allgather_coalesced", parts, "output_lists", "input_list")

        return self._call("allgather_coalesced", timeout, check)

    def all_gather_single_coalesced(
        self, outputs: Sequence[object], inputs: Sequence[object], timeout: object = None
    ) -> Work:
        """`all_gather_single` of each pair of two lists, as one call."""

        def check(rank: int, size: int) -> Call:
            found = calls.pairs(outputs, inputs, "outputs", "inputs")
            parts = [calls.all_gather_single(rank, size, out, x) for out, x in found]
            return calls.coalesced("all_gather_single_coalesced", parts, "outputs", "inputs")

        return self._call("all_gather_single_coalesced", timeout, check)

    def reduce_scatter_single_coalesced(
        self,
        outputs: Sequence[object],
        inputs: Sequence[object],
        op: object = SUM,
        timeout: object = None,
    ) -> Work:
        """`reduce_scatter_single` of each pair of two lists, as one call."""

        def check(rank: int, size: int) -> Call:
            found = calls.pairs(outputs, inputs, "outputs", "inputs")
            parts = [calls.reduce_scatter_single(rank, size, out, x, op) for out, x in found]
            return calls.coalesced("reduce_scatter_single_coalesced", parts, "outputs", "inputs")

        return self._call("reduce_scatter_single_coalesced", timeout, check)

    # ---- point to point ----

    def send(self, tensor: object, dst: int | Peer, tag: int = 0, timeout: object = None) -> Work:
        """Send an array to one rank, which must `recv` it.

        Messages between two ranks with one tag are taken in the order in which they were sent.
        An expired send breaks the group: its message can't be called back.

        Args:
            tensor: stays untouched until the Work is done.
            dst: the receiving rank, or `PROC_NULL`: then the call is done at once.
            tag: from 0; lets the receiver choose.
        """
        return self._message(
            "send", timeout, lambda: calls.send(self._size, self._highest_tag, tensor, dst, tag)
        )

    def recv(
        self, tensor: object, src: int | Peer = ANY_SOURCE, tag: int = 0, timeout: object = None
    ) -> Work:
        """Receive an array from one rank, or from any.

        An expired receive is cancelled; the group stays usable, and so does the message.  Where the
        message has begun to come, and its sender goes no further, the group is broken.

        Args:
            tensor: of the dtype and number of elements that were sent.
            src: the sending rank, or `ANY_SOURCE`; `Work.source_rank()` tells which it was.  With
                `PROC_NULL` the call is done at once, and the array stays as it is.
            tag: as the sender gave it.

        Raises:
            CollectiveMismatchError: the message is of another dtype or size; it is lost, the
                array is undefined, and the group stays usable.
        """
        return self._message(
            "recv", timeout, lambda: calls.recv(self._size, self._highest_tag, tensor, src, tag)
        )

    def recv_anysource(self, tensor: object, tag: int = 0, timeout: object = None) -> Work:
        """`recv` from whichever rank sends first."""
        return self.recv(tensor, ANY_SOURCE, tag, timeout)

    def probe(self, src: int | Peer = ANY_SOURCE, tag: int = 0) -> Message | None:
        """Tell what the next message is that `recv` would take, or None, if none is here.  Local.

        It looks once, and does not wait.  So a message of unknown size is received::

            while (found := pg.probe(src)) is None:
                ...
            array = np.empty(found.count, found.dtype)
            pg.recv(array, found.source, found.tag).wait()

        Args:
            src: the sending rank, or `ANY_SOURCE`.
            tag: as the sender gave it.

        Returns:
            A `Message` (source, tag, dtype, count).  The next `recv` from that source with that
            tag takes this message.  Of `PROC_NULL` there is never one.

        Raises:
            RankFailedError, RemoteRankError: none is here, and a peer has died or left the group.
        """
        self._usable()
        peer, number = calls.probe(self._size, self._highest_tag, src, tag)
        if peer == NULL:
            return None
        found = engine.look(lambda: self._transport.probe(peer, number))
        if found is None:
            self._usable()
            engine.check_peers(self._lane)
        return found

    # ---- barriers and objects: these wait, and return values ----

    def monitored_barrier(self, timeout: object = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks; if some don't come, raise on every rank that did, naming them.

        Args:
            wait_all_ranks: accepted as in torch; all missing ranks are named either way.
        """
        self._call(
            "monitored_barrier", timeout, lambda rank, size: Call("monitored_barrier")
        ).wait()

    def broadcast_object(self, obj: object, root: int, timeout: object = None) -> Any:
        """Return the root's object on every rank.  Pickle: among trusted peers only."""
        call = self._objects("broadcast_object", obj, root, timeout)
        return obj if self._rank == call.root else pickle.loads(call.result)

    def allgather_object(self, obj: object, timeout: object = None) -> list[Any]:
        """Return the list of all ranks' objects on every rank.  Pickle: trusted peers only."""
        call = self._objects("allgather_object", obj, None, timeout)
        return [pickle.loads(piece) for piece in call.result]

    def gather_object(self, obj: object, root: int, timeout: object = None) -> list[Any] | None:
        """Return the list of all ranks' objects on the root, None elsewhere.  Pickle."""
        call = self._objects("gather_object", obj, root, timeout)
        return [pickle.loads(p) for p in call.result] if self._rank == call.root else None

    def scatter_object(
        self, objs: Sequence[object] | None, root: int, timeout: object = None
    ) -> Any:
        """Return, on each rank, its entry of the root's list of `size` objects.  Pickle."""
        call = self._objects("scatter_object", objs, root, timeout)
        return pickle.loads(call.result)

    def _objects(self, kind: str, obj: object, root: int | None, timeout: object) -> Call:
        work = self._call(
            kind, timeout, lambda rank, size: calls.object_call(kind, rank, size, obj, root)
        )
        work.wait()
        return work.call

    # ---- groups out of groups: these wait, and return groups ----

    def split_group(
        self,
        ranks: Sequence[int],
        timeout: object = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup | None:
        """Make a group of some of the ranks; every rank of this group must call.

        Args:
            ranks: members of the new group; the i-th becomes rank i.  Disjoint lists may be given
                in one call, each by its members; a rank in no list gives any of them, or [].
            timeout: how long the making may take, and the new group's default.
            opts: where it has a `_timeout`, that counts if `timeout` is None (torch's options).

        Returns:
            The new group, or None on a rank that is not in `ranks`.

        Raises:
            CollectiveMismatchError: lists overlap without being equal; raised on all ranks.
        """
        if timeout is None:
            timeout = getattr(opts, "_timeout", None)

        def make(call: Call, deadline: float) -> communicators.MakesComm:
            return communicators.split_by_lists(self.comm, call.payload, deadline)

        def check(rank: int, size: int) -> Call:
            return Call("split_group", payload=calls.split_ranks(size, ranks))

        made, call = self._comm("split_group", timeout, check, make)
        name = group_name or f"{self.group_name}:split:{list(call.payload)}"
        return self._part(made, name, group_desc, timeout)

    def split(
        self, color: int | bool | None, key: int = 0, timeout: object = None
    ) -> ProcessGroup | None:
        """Split the group as `Comm.Split` does: ranks of one color form a group.

        Args:
            color: at least 0 and below 2**31, or None to be in no new group; False and True are 0
                and 1.
            key: ranks of a new group are ordered by key, a C int, then by their rank here.
            timeout: how long the making may take, and the new group's default.
        """

        def check(rank: int, size: int) -> Call:
            return Call("split", payload=(calls.color(color), calls.int32(key, "key")))

        def make(call: Call, deadline: float) -> communicators.MakesComm:
            chosen, order = call.payload
            return communicators.split(self.comm, chosen, order, deadline)

        made, call = self._comm("split", timeout, check, make)
        return self._part(made, f"{self.group_name}:split:{call.payload[0]}", None, timeout)

    def local_group(self, timeout: object = None) -> ProcessGroup:
        """Make the group of the ranks on this rank's node, in order.

        A node is one host name and one folder for shared memory; MPICOLL_NODES pretends more.
        """
        return self._by_node("local_group", timeout)

    def cross_node_group(self, timeout: object = None) -> ProcessGroup:
        """Make the group of the ranks that have this rank's local rank on their nodes."""
        return self._by_node("cross_node_group", timeout)

    def _by_node(self, kind: str, timeout: object) -> ProcessGroup:
        def make(call: Call, deadline: float) -> communicators.MakesComm:
            nodes, _ = yield from communicators.nodes_of(self.comm, self._wanted.sizes)
            node, place = nodes.locate(self._rank)
            color = node if kind == "local_group" else place
            made = yield from communicators.split(self.comm, color, self._rank, deadline)
            return made

        made, _ = self._comm(kind, timeout, lambda rank, size: Call(kind), make)
        group = self._part(made, f"{self.group_name}:{kind}", None, timeout)
        assert group is not None
        return group

    def merge_remote_group(
        self,
        store: Store,
        size: int,
        timeout: object = 1800.0,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Merge this group with others that meet it in a store.

        Every rank of every group calls; only rank 0 of each uses the store.  Any number of
        groups can merge, of one MPI world or of separately launched jobs, if they share no rank.
        Each group keeps its inner order.  Groups of one world follow one another by their lowest
        rank there, if a group over all of the world was made before; worlds by the name of their
        first group, ties by arrival: give `new_group` a `group_name`.

        Args:
            store: anything with c10d's set, get and add, the same for all groups.  What an
                earlier run left in it does no harm.
            size: ranks of all groups together.
            timeout: how long the making may take, and the new group's default.

        Raises:
            CollectiveTimeoutError: not all groups came, which names those that did; or one that
                was there did not go on, which names it.
            InvalidCallError: sizes that don't add up, groups that share a rank or were made
                otherwise.
            UnsupportedError: the jobs' MPI libraries can't connect them; says what can.
            This group stays usable after all of these.
        """

        def check(rank: int, own: int) -> Call:
            total = calls.int32(size, "size")
            if total < own:
                raise InvalidCallError(
                    f"size must be at least this group's {own} ranks, but got {total}"
                )
            for method in ("set", "get", "add"):
                if rank == 0 and not callable(getattr(store, method, None)):
                    raise InvalidCallError(
                        f"store must have {method}(), as c10d's stores do, but got "
                        f"{type(store).__name__}: use FileStore or TCPStore"
                    )
            return Call("merge_remote_group", root=0, count=total)

        def make(call: Call, deadline: float) -> communicators.MakesComm:
            members = yield from rendezvous.members(self.comm)
            if self._rank == 0:
                mine = rendezvous.entry(self.group_name, self._wanted.alike(), members, call.count)
                plan = yield from rendezvous.meet(store, mine, deadline)
                call.payload = json.dumps(plan).encode()
            yield from self._transport.broadcast_object(call)
            call.payload = json.loads(bytes(call.result))
            made = yield from merge.merge(self.comm, call.payload, store, deadline)
            return made

        made, call = self._comm(
            "merge_remote_group", timeout, check, make, slack=_SLACK, parts=False
        )
        first = call.payload["groups"][0]["name"]
        assert made is not None
        return self._made(made, group_name or f"{first}:merge", group_desc, timeout)

    def spawn(self, argv: Sequence[str], n: int, timeout: object = None) -> ProcessGroup:
        """Start more ranks, and make a group of this group's and those; every rank calls.

        The started program calls `parent_group`, which returns the same group there: this group's
        ranks come first, then the new ones.  They form an MPI world of their own, over which their
        `new_group` works.  The program must run wherever the launcher puts its ranks.

        Args:
            argv: the program and its arguments, such as ``[sys.executable, "worker.py"]``; the
                same on all ranks.
            n: how many to start; the same on all ranks.
            timeout: how long it may take until the new ranks are in `parent_group`, and the new
                group's default.  A program that never initializes MPI, or ends before, can't be
                told from a slow one: 2 s past the deadline the job is ended.

        Raises:
            UnsupportedError: the launcher can't start more ranks, or has no room for them.
            InvalidCallError: there is no such program.
            CollectiveTimeoutError: they were started, but did not all call `parent_group` in time.
            This group stays usable after all of these.
        """

        def check(rank: int, size: int) -> Call:
            count, words = calls.int32(n, "n"), list(argv)
            if count < 1:
                raise InvalidCallError(f"n must be at least 1, but got {count}")
            if isinstance(argv, str) or not words or not all(isinstance(w, str) for w in words):
                raise InvalidCallError(f"argv must be a list of str, but got {argv!r}")
            spawned = MPI.Comm.Get_parent() != MPI.COMM_NULL
            vendor, _ = MPI.get_vendor()
            why = launcher.spawnless(vendor, launchers(environment()), spawned=spawned)
            if why:
                raise UnsupportedError(f"spawn: {why}")
            if rank == 0 and shutil.which(words[0]) is None:  # MPICH would wait for it for ever
                raise InvalidCallError(f"argv must begin with a program, but got {words[0]!r}")
            text = "\0".join(words).encode("utf-8", "surrogateescape")
            return Call("spawn", count=count, digest=calls.digest(*text), payload=words)

        def make(call: Call, deadline: float) -> communicators.MakesComm:
            wanted = dataclasses.asdict(self._wanted) | {"device": self._wanted.device[:4]}
            hello = {"name": name, "wanted": wanted}
            return spawn.spawn(self.comm, call.payload, call.count, hello, deadline)

        name = f"{self.group_name}:spawn"
        made, _ = self._comm("spawn", timeout, check, make, slack=_SLACK, parts=False)
        assert made is not None
        return self._made(made, name, None, timeout)

    def shrink_group(
        self,
        ranks_to_exclude: Sequence[int] = (),
        timeout: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Make a group of the ranks that are left after a failure, and give this one up.

        All that stay must call it, those that are excluded must not.  It works on a broken group,
        whether a call timed out or a rank died, and is what goes on from there; on a working one
        too, which it breaks.  Ranks that died are left out by themselves: where the launcher lets
        the others live, as Open MPI's does with `--with-ft ulfm`.

        Args:
            ranks_to_exclude: ranks of this group that take no part, alike on all that do.
            timeout: how long it may take, and the new group's default.

        Returns:
            The new group, in which ranks keep their order.

        Raises:
            CollectiveTimeoutError: some did not call; names them.  It may be called again.
            CollectiveMismatchError: the ranks exclude different ones.  It may be called again.
            UnsupportedError: a rank died, and one that lives is excluded.
        """
        check_process()
        lane = self._lane
        self._refuse_closed()
        out = calls.excluded(self._rank, self._size, ranks_to_exclude)
        limit = seconds(timeout, self._timeout)
        if lane.broken is None:
            engine.fail_all(lane, GroupBrokenError("shrink_group was called"))
        work = Work(lane, Call("shrink_group"), lane.seq, limit, self._recorder)
        engine.launch(work, self._shrink(work, out))
        _see_through(work)
        lane.replaced = True
        name = group_name or f"{self.group_name}:shrink"
        return self._made(work.call.result, name, group_desc, timeout)

    def _shrink(self, work: Work, out: Sequence[int]) -> Steps:
        deadline = work.deadline
        work.deadline += _VERDICT
        made = yield from communicators.shrink(self.comm, self._lane.peers, out, deadline)
        assert made is not None
        work.call.result = yield from select.prepare_survivors(made, self._wanted, deadline)

    def _comm(
        self,
        kind: str,
        timeout: object,
        check: Callable[..., Call],
        make: Callable[[Call, float], communicators.MakesComm],
        *,
        slack: float = _VERDICT,
        parts: bool = True,
    ) -> tuple[Ground | None, Call]:
        """Run a call that makes a communicator, wait for it, and return both.

        `parts` says that its members are of this group.
        """

        def then(work: Work) -> Steps:
            deadline = work.deadline
            # All ranks of this group are here.  What makes the communicator keeps the deadline
            # itself, and its verdict needs some time to reach them all.
            work.deadline += slack
            yield from self._children.reclaim(self.comm, deadline)
            comm = yield from make(work.call, deadline)
            work.call.result = nccl = None
            if parts:
                nccl = yield from select.split_nccl(self._ground, comm)
            if comm is not None:
                made = yield from select.prepare(comm, self._wanted, deadline, nccl)
                work.call.result = made

        work = self._call(kind, timeout, check, then=then)
        _see_through(work)
        return work.call.result, work.call

    def _part(
        self, made: Ground | None, name: str, desc: str | None, timeout: object
    ) -> ProcessGroup | None:
        """Return a group of some ranks of this one, which remembers it."""
        group = None if made is None else self._made(made, name, desc, timeout)
        self._children.add(None if group is None else group._kin)
        return group

    def _made(self, made: Ground, name: str, desc: str | None, timeout: object) -> ProcessGroup:
        return ProcessGroup(
            made,
            self._wanted,
            timeout=seconds(timeout, self._timeout),
            name=name,
            desc=desc or "",
            progress=self._progress,
        )

    # ---- the end ----

    def shutdown(self, timeout: object = None) -> None:
        """Finish what is under way, wait for all ranks, and give the communicator back.

        Afterwards the group raises `GroupClosedError`.  A second call does nothing.  On a
        broken group it only closes this rank's side.  The error of a Work that was dropped
        unasked is raised here at the latest; then, as where the peers call something else, no
        rank has shut the group down.

        A receive for which no message has come when all ranks are here is cancelled, and a message
        that no rank receives is dropped.  That error is raised here, too, if nobody has asked the
        Work for it before; the group is shut down then.
        """
        lane = self._lane
        if lane.closed:
            return
        messages = list(lane.beside)
        if lane.broken is None:
            for work in list(lane.enqueued):
                engine.wait(work, seconds(timeout, self._timeout))

            def then(work: Work) -> Steps:
                while lane.enqueued:
                    yield IDLE  # what was left to the GPU comes first
                yield from self._transport.clear(lane)
                engine.delist(lane)  # nobody may listen on it any more
                yield from self._transport.close()
                yield from communicators.free(self._ground.comms, work.deadline)

            try:
                # If the wait is interrupted, the next one goes on with it.
                if self._ending is None or self._ending.done:
                    self._ending = self._call(
                        "shutdown", timeout, lambda r, s: Call("shutdown"), then=then
                    )
                self._ending.wait()
            except MpicollError as error:
                if not error.breaks_group:
                    raise  # no rank has shut it down
                self._close("shut down")
                raise
        self._close("shut down")
        for message in messages:
            if message.error is not None and not message.fetched:
                message.fetch()
                raise message.error

    def abort(self, reason: str = "") -> None:
        """Give up everything under way, at once and on this rank alone.

        Args:
            reason: why; the peers' `RemoteRankError` holds it.
        """
        self._abort(f"aborted the group: {reason}" if reason else "aborted the group")

    def _abort(self, why: str) -> None:
        lane = self._lane
        if lane.closed:
            return
        engine.fail_all(lane, GroupClosedError(f"rank {self._rank} {why}"))
        self._close("aborted")

    def _close(self, how: str) -> None:
        self._lane.close(how)
        engine.delist(self._lane)
        self._recorder.close()
        if self._core is not None:
            self._core.close()
        together = self._lane.broken is None
        engine.between_steps(lambda: self._transport.release(together=together))

    def __enter__(self) -> ProcessGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.shutdown()
        else:
            self._abort(f"left its with-block: {type(error).__name__}: {error}")

    # ---- the way of one call ----

    def _call(
        self,
        kind: str,
        timeout: object,
        check: Callable[..., Call],
        *arguments: object,
        then: Callable[[Work], Steps] | None = None,
    ) -> Work:
        """Take a number, check the arguments, and launch arrival followed by the data."""
        lane = self._lane
        self._usable()
        seq = 0
        if self._core is not None and self._core.owed:
            seq = self._taken_over(kind)
        elif self._once is None:  # else it is known only later whether it takes one
            lane.seq += 1
            seq = lane.seq
        call = None
        try:
            limit = self._timeout if timeout is None else seconds(timeout, self._timeout)
            if lane.failures:
                self._raise_unfetched()
            call = check(self._rank, self._size, *arguments)
            if engine.busy:
                _refuse_busy(call, lane)
            if call.device is not None:
                self._transport.admit(call)  # the last to refuse it: it has its turn then
            work = Work(lane, call, seq, limit, self._recorder)
        except BaseException as error:  # a KeyboardInterrupt, too: the number is taken
            if call is not None and call.turn is not None:
                call.turn.over = True
            self._arrive_refused(kind, seq, error)
            raise
        try:
            in_one_go = then is None and call.device is None and self._once is None
            if not (in_one_go and engine.at_once(work, self._at_once)):
                engine.launch(work, self._steps(work, then))
        except BaseException as error:
            engine.forsake(work, error)
            raise
        return work

    def _taken_over(self, kind: str) -> int:
        """Return the number of a call that the core has posted, and left to this way."""
        lane = self._lane
        lane.seq += 1
        assert self._core is not None
        if not self._core.take_over(kind):
            error = CallInterruptedError("a call was interrupted when its peers could know of it")
            engine.fail_all(lane, error)
            self._usable()
        return lane.seq

    def _at_once(self, call: Call, seq: int) -> bool:
        """Carry out a call whose data ride on the records, if all others are there already."""
        transport = self._transport
        if not (transport.prepare(call, seq) and self._arrival.at_once(call, seq)):
            return False
        if call.largest != call.extent and not transport.rides(call):
            self._arrival.forget()  # another rank's data is too large
            return False
        transport.finish(call, seq)
        return True

    def _steps(self, work: Work, then: Callable[[Work], Steps] | None) -> Steps:
        call, transport = work.call, self._transport
        if self._once is not None and then is None and self._once.goes_without(call):
            yield from transport.steps(call)
            return
        yield from self._arrive(work)
        if then is not None:
            yield from then(work)
        elif transport.rides(call):
            transport.finish(call, work.seq)
        else:
            yield from transport.steps(call)

    def _arrive(self, work: Work) -> Steps:
        """Meet the other ranks in a call, which is the first of its queue."""
        call, record = work.call, None
        if self._once is not None:
            record = self._once.before(call)
            self._lane.seq += 1
            work.take_number(self._lane.seq)
        if not call.refused:
            self._transport.prepare(call, work.seq)
        at_once = call.device is not None and call.count != calls.UNEVEN
        if not (at_once and self._arrival.at_once(call, work.seq)):
            yield from self._arrival.steps(call, work.seq)
        if record is not None and self._once is not None and not call.refused:
            self._once.after(record)

    def _message(self, kind: str, timeout: object, check: Callable[[], Call]) -> Work:
        """Launch a send or recv: it takes no number and waits for no queue."""
        self._usable()
        limit = seconds(timeout, self._timeout)
        self._raise_unfetched()
        call = check()
        before = _refuse_busy(call, self._lane) if engine.busy else None
        if call.device is not None:
            self._transport.admit(call)
        move = self._transport.send if kind == "send" else self._transport.recv
        if call.peer == NULL:
            move = _no_message
        steps = move(call)
        if before is not None:  # the same receive, the wait for which was interrupted
            steps, call = before.steps, before.call
        work = Work(self._lane, call, 0, limit, self._recorder)
        try:
            engine.launch(work, steps)
        except BaseException as error:
            engine.forsake(work, error)
            raise
        return work

    def _arrive_refused(self, kind: str, seq: int, error: BaseException) -> None:
        """Let the peers hear in this call that this rank's arguments were refused."""
        call = Call(kind, refused=f"{type(error).__name__}: {error}")
        work = Work(self._lane, call, seq, self._timeout, self._recorder)
        engine.launch(work, self._arrive(work))
        if self._size > 1:
            with contextlib.suppress(MpicollError):
                engine.background()

    def _usable(self) -> None:
        check_process()
        lane = self._lane
        self._refuse_closed()
        if lane.broken is not None:
            lane.told = True
            raise GroupBrokenError(
                f"group {lane.name!r} can't be used after an earlier failure: {lane.broken}"
            ) from lane.broken

    def _refuse_closed(self) -> None:
        if self._lane.closed:
            raise GroupClosedError(
                f"group {self._lane.name!r} was {self._lane.closed}: "
                "make a new one with new_group()"
            )

    def _raise_unfetched(self) -> None:
        """Raise the error of a Work that was dropped before anybody asked for it."""
        failures, error = self._lane.failures, None
        for _ in range(min(len(failures), _FAILURES)):
            failure = failures.popleft()
            if failure.fetched:
                continue
            if failure.task() is not None:
                failures.append(failure)
            else:
                error = error or failure.error  # the first will do
        if error is not None:
            raise error


def _no_message(call: Call) -> Steps:
    """Send nothing to nobody, or receive it."""
    call.result = PROC_NULL
    yield from ()


def _see_through(work: Work) -> None:
    """Wait for a call of which nothing is left to wait for if an exception ends the wait."""
    try:
        work.wait()
    except BaseException as error:
        if not work.done:
            engine.forsake(work, error)
        raise


def _farewell(lane: Lane, arrival: Arrival, transport: Transport, recorder: Recorder) -> None:
    """Launch this rank's last arrival in a group, which waits for the others' for long."""
    lane.seq += 1
    call = Call("shutdown", leaving=True)
    work = Work(lane, call, lane.seq, default_timeout(), recorder)

    def steps() -> Steps:
        yield from arrival.steps(call, work.seq)
        yield from transport.clear(lane)

    engine.launch(work, steps())


def _refuse_busy(call: Call, lane: Lane) -> Task | None:
    """Refuse memory that an unfinished Work of any group is using in a way that conflicts.

    Return a receive in whose place the new call goes on, if the wait for that was interrupted.
    """
    task = engine.make_room(call, lane)
    if task is None or task.done:
        return task
    raise InvalidCallError(
        f"an array given to {call.describe()} overlaps one that an unfinished Work "
        f"is using, {task.call.describe()}: wait() for that first, or use memory of its own"
    )


# ---- making groups ----

_creation_key = 0  # of the attribute that holds a communicator's creation lane; 0: none yet


def new_group(
    backend: str = "auto",
    timeout: object = None,
    device: object = "cpu",
    *,
    comm: MPI.Intracomm | None = None,
    group_name: str | None = None,
    checks: str = "full",
    progress: str = "caller",
    **options: object,
) -> ProcessGroup:
    """Make a group over MPI.COMM_WORLD, or over a communicator of yours.

    Every rank of the communicator must call.

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
        comm: an mpi4py intracommunicator; the group works on a duplicate of it.
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

    Raises:
        InvalidCallError, UnsupportedError: an argument is wrong; or a rank can't use its GPU, which
            all ranks raise.
        CollectiveTimeoutError: not all ranks came; names those that are missing.
        CollectiveMismatchError: the ranks ask for different backends, or one was refused.
        TransportError: there is no MPI library, or it failed; or its ranks don't find one another,
            because another MPI's launcher started them.
    """
    check_process()
    parent = MPI.COMM_WORLD if comm is None else comm
    if not isinstance(parent, MPI.Intracomm) or parent == MPI.COMM_NULL:
        raise InvalidCallError(
            f"comm must be an mpi4py intracommunicator, but got {parent!r}: "
            "Merge() an intercommunicator first; ranks outside a communicator make no group"
        )
    lane, recorder, children = _creation_lane(parent)
    if lane.broken is not None:
        raise GroupBrokenError(
            f"an earlier new_group over this communicator failed: {lane.broken}"
        ) from lane.broken
    limit, call, refusal = default_timeout(), Call("new_group"), None
    try:
        limit = seconds(timeout, limit)
        factory = select.factory_of(backend)
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
        wanted = Wanted(backend, checks, node_sizes(MPI.COMM_WORLD.Get_size()), place)
        call.digest, call.payload = wanted.digest(), wanted
    except (InvalidCallError, UnsupportedError) as error:
        refusal = error
        call.refused = f"{type(error).__name__}: {error}"
    work = Work(lane, call, lane.seq + 1, limit, recorder)

    def made() -> None:
        engine.delist(lane)  # `parent` may be freed from now on
        recorder.close()

    work.callbacks.append(made)
    try:
        lane.seq += 1
        engine.launch(work, _create(parent, work, children))
    except BaseException as error:
        engine.forsake(work, error)
        raise
    if refusal is not None:
        if parent.Get_size() > 1:
            with contextlib.suppress(InvalidCallError):  # it is heard of later without a thread
                engine.background()
        raise refusal
    _see_through(work)
    name = group_name or ("world" if comm is None else "comm")
    group = ProcessGroup(call.result, wanted, timeout=limit, name=name, progress=progress)
    children.add(group._kin)
    return group if factory is None else _from_factory(group, factory, limit, str(device), options)


def _creation_lane(parent: MPI.Intracomm) -> tuple[Lane, Recorder, Children]:
    """Return the lane on which groups over `parent` are made, and what was made on it."""
    global _creation_key
    if not _creation_key:
        ending.hook()
        share_machine(ranks_on_node() or MPI.COMM_WORLD.Get_size())
        _creation_key = MPI.Comm.Create_keyval()
    # An attribute, since it goes with the communicator; a handle may come to mean another one.
    made: Any = parent.Get_attr(_creation_key)
    if made is not None and made[0].broken is not None and parent.Get_size() == 1:
        made = None  # nobody else could have lost the order
    if made is None:
        if parent != MPI.COMM_SELF:
            _refuse_stray()
        ranks = communicators.world_ranks(parent)
        recorder = Recorder("new_group", parent.Get_rank(), ranks, frames=2)
        made = Lane("new_group", parent), recorder, Children()
        # Between the makings of groups nobody listens there.
        made[
            0
        ].peers.silence = (
            "gave no answer: it is in another group's call, busy outside mpicoll, stopped or dead"
        )
        parent.Set_attr(_creation_key, made)
    lane, recorder, children = made
    engine.enlist(lane)
    recorder.open()
    return lane, recorder, children


def _refuse_stray() -> None:
    """Refuse to work alone where the launcher has started several ranks."""
    world = MPI.COMM_WORLD.Get_size()
    if world > 1 or MPI.Comm.Get_parent() != MPI.COMM_NULL or single():
        return  # ranks that another program has spawned are as many as it asked for
    vendor, _ = MPI.get_vendor()
    why = launcher.stray(world, vendor, launchers(environment()))
    if why:
        raise TransportError(
            f"{why}: {launcher.remedy(vendor, launcher.library_file())}. Where single ranks are "
            "meant, set MPICOLL_SINGLE=1 or pass comm=MPI.COMM_SELF"
        )


def _create(parent: MPI.Intracomm, work: Work, children: Children) -> Steps:
    made = yield from communicators.duplicate(parent)
    assert made is not None
    yield from Arrival(made, work.lane.peers).steps(work.call, work.seq)
    if work.call.refused:
        return  # the peers have heard of it, and go no further
    yield from children.reclaim(made, work.deadline)
    yield from rendezvous.name_job(made)
    work.call.result = yield from select.prepare(made, work.call.payload, work.deadline)


def _from_factory(
    base: ProcessGroup,
    factory: select.ProcessGroupFactory,
    limit: float,
    device: str,
    options: dict[str, object],
) -> Any:
    """Give a registered factory the store it expects, and return what it makes."""
    name = MPI.Get_processor_name()
    host = name if len(set(base.allgather_object(name))) > 1 else "localhost"
    secret = os.urandom(16).hex()
    store = TCPStore(host, 0, is_master=True, secret=secret) if base.rank() == 0 else None
    address = (store.host, store.port, secret) if store is not None else None
    host, port, secret = base.broadcast_object(address, 0)
    if store is None:
        store = TCPStore(host, port, secret=secret)
    base.shutdown()
    timeout, where = select.factory_arguments(limit, device)
    return factory(store, base.rank(), base.size(), timeout, where, **options)


def parent_group(timeout: object = None) -> ProcessGroup:
    """Return the group that this program was started for, by `ProcessGroup.spawn`.

    Every rank that was started must call, once.  Those that called `spawn` come first in it.

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

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        made, call.payload = yield from spawn.join_parents(own.comm, parents, deadline)
        wanted = call.payload["wanted"]
        own._wanted = Wanted(**wanted | {"sizes": tuple(wanted["sizes"])})  # as the parents'
        return made

    made, call = own._comm(
        "parent_group",
        timeout,
        lambda rank, size: Call("parent_group"),
        make,
        slack=_SLACK,
        parts=False,
    )
    assert made is not None
    group = own._made(made, call.payload["name"], None, timeout)
    own.shutdown()
    return group


# ---- the current group ----


class _Current(threading.local):
    group: ProcessGroup | None = None


_current = _Current()


def current_process_group() -> ProcessGroup | None:
    """Return the group of the innermost `process_group` block of this thread, or None."""
    return _current.group


@contextlib.contextmanager
def process_group(pg: ProcessGroup) -> Iterator[ProcessGroup]:
    """Make a group the current one of this thread, inside a with-block.  Blocks nest."""
    before = _current.group
    _current.group = pg
    try:
        yield pg
    finally:
        _current.group = before
