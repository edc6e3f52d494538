"""`ProcessGroup`: the user's object.

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

import json
import pickle
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Any

from ..arrays.ops import ReduceOp
from ..engine import checks, kinds
from ..engine.call import ANY_SOURCE, Call, Message, Peer, Shape
from ..engine.kinds import Kind
from ..engine.progress import engine
from ..engine.work import Work
from ..errors import Unique
from ..runtime.settings import NEVER, seconds
from ..stores import Store
from . import coalesced, derive, merge, shrink, spawn
from .caller import Caller
from .subgroup import subgroup

SUM = ReduceOp.SUM


class ProcessGroup(Unique):
    """A group of ranks that call collectives together, as `new_group` makes it.

    ``with new_group() as pg:`` shuts the group down at the end, or aborts it if the body raises.

    Attributes:
        comm: the group's mpi4py communicator.  It is private: mpicoll's own calls run on it,
            so use it while no Work is under way, or `Dup` it.
    """

    _instead = (
        "all that use it share the one object (set it aside in the __getstate__ of what holds it, "
        "or call current_process_group() there); split(0) makes another group of the same ranks"
    )

    def __init__(self, caller: Caller) -> None:
        self.comm = caller.comm
        self._caller = caller
        self._call = caller.call  # bound once: one look-up less in each collective
        self._message = caller.message
        self._core = caller.core
        self._rings = caller.rings
        self._rank = caller.rank
        self._size = caller.size

    # ---- what it is ----

    @property
    def is_broken(self) -> bool:
        """Whether an earlier failure left it unusable; `shrink_group` goes on from there."""
        engine().mend()
        return self._caller.group_state.broken is not None

    @property
    def is_closed(self) -> bool:
        """Whether it was shut down or aborted."""
        return bool(self._caller.group_state.closed)

    def __repr__(self) -> str:
        known = self._caller.group_state
        state = known.closed or ("broken" if known.broken else "")
        return (
            f"<mpicoll.ProcessGroup {self.group_name!r}: rank {self._rank} of {self._size}, "
            f"transport {self.name()}{', compiled' if self._core else ''}"
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
        return self._caller.transport.name

    @property
    def group_name(self) -> str:
        """The group's name."""
        return self._caller.group_state.name

    @property
    def group_desc(self) -> str:
        """What the group is for, in its maker's words."""
        return self._caller.desc

    @property
    def timeout(self) -> timedelta:
        """How long a call may take where it doesn't say otherwise; `timedelta.max` is for ever."""
        limit = self._caller.timeout
        return timedelta.max if limit >= NEVER else timedelta(seconds=limit)

    @property
    def device(self) -> str:
        """The device whose memory the group moves besides the host's; "cpu" means none."""
        return self._caller.options.device

    @property
    def ranks(self) -> list[int]:
        """The members, in order, as ranks of MPI.COMM_WORLD.

        -1 stands for a member of another world: of a separately launched job, or spawned.
        """
        return list(self._caller.world_ranks)

    def set_timeout(self, timeout: object) -> None:
        """Set how long a call may take where it doesn't say otherwise.  Local."""
        self._caller.timeout = seconds(timeout, self._caller.timeout)

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
        return json.dumps(self._caller.recorder.report())

    # ---- collectives on arrays ----

    def allreduce(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce an array over all ranks, in place on each.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp`, the same on all ranks (a PREMUL_SUM factor is each rank's own).
        """
        return (self._core and self._core.allreduce(tensor, op, timeout)) or self._call(
            kinds.ALLREDUCE, timeout, checks.allreduce, tensor, op
        )

    def broadcast(self, tensor: object, root: int, timeout: object = None) -> Work:
        """Copy the root's array to all other ranks, in place.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            root: the rank that gives; the same on all ranks.
        """
        return (self._core and self._core.broadcast(tensor, root, timeout)) or self._call(
            kinds.BROADCAST, timeout, checks.broadcast, tensor, root
        )

    def reduce(self, tensor: object, root: int, op: object = SUM, timeout: object = None) -> Work:
        """Reduce an array over all ranks, in place on the root; other ranks' stay as they are.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            root: the rank that gets the result; the same on all ranks.
            op: a `ReduceOp`, the same on all ranks.
        """
        return (self._core and self._core.reduce(tensor, root, op, timeout)) or self._call(
            kinds.REDUCE, timeout, checks.reduce, tensor, root, op
        )

    def barrier(self, timeout: object = None) -> Work:
        """Wait for all ranks."""
        return (self._core and self._core.barrier(timeout)) or self._call(
            kinds.BARRIER, timeout, lambda rank, size: Call(kinds.BARRIER)
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
        ) or self._call(kinds.ALLGATHER, timeout, checks.allgather, output_tensors, input_tensor)

    def all_gather_single(self, output: object, input: object, timeout: object = None) -> Work:
        """Gather equal arrays from every rank into one array, on every rank.

        Args:
            output: of `size` times input's elements; rank i's input comes i-th.
            input: of one dtype and number of elements on all ranks.
        """
        return (self._core and self._core.all_gather_single(output, input, timeout)) or self._call(
            kinds.ALL_GATHER_SINGLE, timeout, checks.all_gather_single, output, input
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
        ) or self._call(kinds.GATHER, timeout, checks.gather, output_tensors, input_tensor, root)

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
        ) or self._call(kinds.SCATTER, timeout, checks.scatter, output_tensor, input_tensors, root)

    def reduce_scatter(
        self, output: object, input: object, op: object = SUM, timeout: object = None
    ) -> Work:
        """Reduce a list of arrays over all ranks, and give the i-th result to rank i.

        Args:
            output: as large as `input[rank]`.
            input: a list of `size` arrays; sizes may differ between entries, the same way on
                all ranks.
            op: a `ReduceOp`, the same on all ranks.
        """
        return (self._core and self._core.reduce_scatter(output, input, op, timeout)) or self._call(
            kinds.REDUCE_SCATTER, timeout, checks.reduce_scatter, output, input, op
        )

    def reduce_scatter_single(
        self, output: object, input: object, op: object = SUM, timeout: object = None
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
            kinds.REDUCE_SCATTER_SINGLE, timeout, checks.reduce_scatter_single, output, input, op
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
        ) or self._call(kinds.ALLTOALL, timeout, checks.alltoall, output_tensors, input_tensors)

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
        return (
            self._core
            and self._core.all_to_all_single(
                output, input, output_split_sizes, input_split_sizes, timeout
            )
        ) or self._call(
            kinds.ALL_TO_ALL_SINGLE,
            timeout,
            checks.all_to_all_single,
            output,
            input,
            output_split_sizes,
            input_split_sizes,
        )

    def scan(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce, on each rank, the arrays of ranks 0 to this one, in place.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp` other than AVG, the same on all ranks.
        """
        return (self._core and self._core.scan(tensor, op, timeout)) or self._call(
            kinds.SCAN, timeout, checks.scan, tensor, op
        )

    def exscan(self, tensor: object, op: object = SUM, timeout: object = None) -> Work:
        """Reduce, on each rank, the arrays of the ranks below this one, in place.

        Rank 0's array stays as it is.  Arguments as in `scan`.
        """
        return (self._core and self._core.exscan(tensor, op, timeout)) or self._call(
            kinds.EXSCAN, timeout, checks.exscan, tensor, op
        )

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
        work = self._call(kinds.EMPTY, timeout, lambda rank, size: checks.empty(shape, dtype))
        work.wait()
        shape = work.call.payload
        assert isinstance(shape, Shape)
        return work.call.result.view(shape.dtype).reshape(shape.sides)

    # ---- several arrays in one call ----

    def allreduce_coalesced(
        self, tensors: Sequence[object], op: object = SUM, timeout: object = None
    ) -> Work:
        """`allreduce` of each array of a list, as one call."""
        return self._call(kinds.ALLREDUCE_COALESCED, timeout, coalesced.allreduce, tensors, op)

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
        return self._call(
            kinds.ALLGATHER_COALESCED, timeout, coalesced.allgather, output_lists, input_list
        )

    def all_gather_single_coalesced(
        self, outputs: Sequence[object], inputs: Sequence[object], timeout: object = None
    ) -> Work:
        """`all_gather_single` of each pair of two lists, as one call."""
        return self._call(
            kinds.ALL_GATHER_SINGLE_COALESCED, timeout, coalesced.all_gather_single, outputs, inputs
        )

    def reduce_scatter_single_coalesced(
        self,
        outputs: Sequence[object],
        inputs: Sequence[object],
        op: object = SUM,
        timeout: object = None,
    ) -> Work:
        """`reduce_scatter_single` of each pair of two lists, as one call."""
        return self._call(
            kinds.REDUCE_SCATTER_SINGLE_COALESCED,
            timeout,
            coalesced.reduce_scatter_single,
            outputs,
            inputs,
            op,
        )

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
        return (self._rings and self._rings.send(tensor, dst, tag, timeout)) or self._message(
            timeout, checks.send, tensor, dst, tag
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
        return (self._rings and self._rings.recv(tensor, src, tag, timeout)) or self._message(
            timeout, checks.recv, tensor, src, tag
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
        return self._caller.probe(src, tag)

    # ---- barriers and objects: these wait, and return values ----

    def monitored_barrier(self, timeout: object = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks; if some don't come, raise on every rank that did, naming them.

        Args:
            wait_all_ranks: accepted as in torch; all missing ranks are named either way.
        """
        self._call(
            kinds.MONITORED_BARRIER, timeout, lambda rank, size: Call(kinds.MONITORED_BARRIER)
        ).wait()

    def broadcast_object(self, obj: object, root: int, timeout: object = None) -> Any:
        """Return the root's object on every rank.  Pickle: among trusted peers only."""
        got = self._objects(kinds.BROADCAST_OBJECT, obj, root, timeout)
        return obj if self._rank == root else pickle.loads(got[0])

    def allgather_object(self, obj: object, timeout: object = None) -> list[Any]:
        """Return the list of all ranks' objects on every rank.  Pickle: trusted peers only."""
        return [*map(pickle.loads, self._objects(kinds.ALLGATHER_OBJECT, obj, None, timeout))]

    def gather_object(self, obj: object, root: int, timeout: object = None) -> list[Any] | None:
        """Return the list of all ranks' objects on the root, None elsewhere.  Pickle."""
        got = self._objects(kinds.GATHER_OBJECT, obj, root, timeout)
        return [*map(pickle.loads, got)] if self._rank == root else None

    def scatter_object(
        self, objs: Sequence[object] | None, root: int, timeout: object = None
    ) -> Any:
        """Return, on each rank, its entry of the root's list of `size` objects.  Pickle."""
        return pickle.loads(self._objects(kinds.SCATTER_OBJECT, objs, root, timeout)[0])

    def _objects(self, kind: Kind, obj: object, root: int | None, timeout: object) -> list[Any]:
        """Return the pickles that this rank gets."""
        if self._core is not None:
            done = self._core.objects(kind.code, obj, root, timeout)
            if type(done) is list:
                return done
            obj = obj if done is None else done  # pickled already
        work = self._call(kind, timeout, partial(checks.object_call, kind), obj, root)
        work.wait()
        got: list[Any] = work.call.result
        return got

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
        part = derive.split_group(self._caller, ranks, timeout, opts, group_name, group_desc)
        return None if part is None else ProcessGroup(part)

    def subgroup(
        self,
        ranks: Sequence[int],
        timeout: object = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Make a group of some of the ranks; they alone must call it, and no other rank.

        Ranks that are members of several such groups make them in one order.  It does not wait for
        what this group has under way.  Where all ranks can call, `split_group` makes all parts at
        once, and gives back what is dropped without `shutdown`; this does not.

        Args:
            ranks: members of the new group, this rank among them; the i-th becomes rank i.
            timeout: how long the making may take, and the new group's default.

        Raises:
            CollectiveTimeoutError: not all members have called in time, with the same list; names
                those that have not.  This group stays usable, and it may be called again.
        """
        made = subgroup(self._caller, ranks, timeout, group_name, group_desc)
        return ProcessGroup(made)

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
        part = derive.split(self._caller, color, key, timeout)
        return None if part is None else ProcessGroup(part)

    def local_group(self, timeout: object = None) -> ProcessGroup:
        """Make the group of the ranks on this rank's node, in order.

        A node is one host name and one folder for shared memory; MPICOLL_NODES pretends more.
        """
        return ProcessGroup(derive.local_group(self._caller, timeout))

    def cross_node_group(self, timeout: object = None) -> ProcessGroup:
        """Make the group of the ranks that have this rank's local rank on their nodes."""
        return ProcessGroup(derive.cross_node_group(self._caller, timeout))

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
        merged = merge.merge_remote_group(
            self._caller, store, size, timeout, group_name, group_desc
        )
        return ProcessGroup(merged)

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
        return ProcessGroup(spawn.spawn(self._caller, argv, n, timeout))

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
        survivors = shrink.shrink_group(
            self._caller, ranks_to_exclude, timeout, group_name, group_desc
        )
        return ProcessGroup(survivors)

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
        self._caller.shutdown(timeout)

    def abort(self, reason: str = "") -> None:
        """Give up everything under way, at once and on this rank alone.

        Args:
            reason: why; the peers' `RemoteRankError` holds it.
        """
        self._caller.abort(f"aborted the group: {reason}" if reason else "aborted the group")

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
            self._caller.abort(f"left its with-block: {type(error).__name__}: {error}")
