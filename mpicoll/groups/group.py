"""`ProcessGroup`: the user's object.  A public method checks, starts and returns."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, TypeVar, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ..arrays.ops import ReduceOp
from ..engine import checks, kinds
from ..engine.call import ANY_SOURCE, Call, Message, Peer, Shape
from ..engine.kinds import Kind
from ..engine.progress import engine
from ..engine.work import Work
from ..errors import Unique
from ..runtime.settings import NEVER, seconds
from ..transports.shm import core
from ..typing import Array, Arrays, Op
from . import coalesced, derive, merge, shrink, spawn
from .caller import Caller
from .subgroup import subgroup

if TYPE_CHECKING:
    from ..stores import Store

SUM = ReduceOp.SUM

T = TypeVar("T")
Scalar = TypeVar("Scalar", bound=np.generic)


@core.direct
class ProcessGroup(Unique):
    """A group of ranks that call collectives together, as `new_group` makes it.

    ``with new_group() as pg:`` shuts the group down at the end, or aborts it if the body raises.

    Unless a method says otherwise, every rank of the group must call it, all in the same order.
    A `timeout` counts from the call, in seconds or as a `timedelta`; None: the group's.

    A call returns a `Work` at once.  Until its `wait()` has returned, the call's arrays are not
    yours: don't read what it writes, nor write what it reads.  They are C-contiguous: NumPy
    arrays, tensors of PyTorch, or anything with the buffer protocol or DLPack; on a group made
    with ``device="cuda"`` also arrays in GPU memory.  A list of one array is accepted where an
    array is; a NumPy array or a tensor with a row per rank where a list of arrays is.  What a rank
    gives to itself may lie exactly where it is to come: the call is in place there.

    What may be raised, besides the errors that a method names:

    - `InvalidCallError`, `UnsupportedError` by the call itself, before anything is sent;
    - `CollectiveMismatchError`: peers called something else, or were refused; no data was moved;
    - `CollectiveTimeoutError`: the deadline passed; names the ranks that had not arrived;
    - `RemoteRankError`, `RankFailedError`, `TransportError`: a peer left or died, or MPI failed.

    After the last two lines the group is broken, what the call writes is undefined, and every
    further call raises `GroupBrokenError`; after the others the group is usable, and no array has
    changed.

    Attributes:
        comm: the group's mpi4py communicator.  It is private: mpicoll's own calls run on it,
            so use it while no Work is under way, or `Dup` it.
    """

    __slots__ = ("__dict__", "__weakref__", "_core", "_rings")  # the latter for the core

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
        """Whether a failure left it unusable; `shrink_group` goes on from there.  Local."""
        engine().mend()
        return self._caller.group_state.broken is not None

    @property
    def is_closed(self) -> bool:
        """Whether it was shut down or aborted.  Local."""
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
        """Return this process's rank in the group, from 0.  Local."""
        return self._rank

    def size(self) -> int:
        """Return the number of ranks in the group.  Local."""
        return self._size

    def name(self) -> str:
        """Return the name of the group's transport, as `_dist2` names its backend.  Local."""
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

    def set_timeout(self, timeout: float | timedelta | None) -> None:
        """Set how long a call may take where it doesn't say otherwise, from the next on.  Local.

        Args:
            timeout: seconds or a `timedelta`; None leaves it as it is.

        Raises:
            InvalidCallError: it is neither, or not above 0.

        Example::

            pg.set_timeout(600)
        """
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

        Example::

            pg.barrier().wait()
            assert '"kind": "barrier"' in pg.dump()
        """
        return json.dumps(self._caller.recorder.report())

    # ---- collectives on arrays ----

    def allreduce(
        self, tensor: Array, op: Op = SUM, timeout: float | timedelta | None = None
    ) -> Work:
        """Reduce an array over all ranks, in place on each.  Every rank must call it.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp`, the same on all ranks (a PREMUL_SUM factor is each rank's own).
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` holds the result; leave it alone
            until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            x = np.full(3, rank)
            pg.allreduce(x, op=mc.ReduceOp.MAX, timeout=30).wait()
            assert x[0] == size - 1
        """
        return self._call(kinds.ALLREDUCE, timeout, checks.allreduce, tensor, op)

    def broadcast(
        self, tensor: Array, root: SupportsIndex, timeout: float | timedelta | None = None
    ) -> Work:
        """Copy the root's array to all other ranks, in place.  Every rank must call it.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            root: the rank that gives; the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` holds what the root's did; leave it
            alone until then, on the root too.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            x = np.arange(3.0) if rank == 0 else np.empty(3)
            pg.broadcast(x, root=0).wait()
            assert x[2] == 2
        """
        return self._call(kinds.BROADCAST, timeout, checks.broadcast, tensor, root)

    def reduce(
        self,
        tensor: Array,
        root: SupportsIndex,
        op: Op = SUM,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Reduce an array over all ranks, in place on the root.  Every rank must call it.

        Args:
            tensor: of one dtype and number of elements on all ranks; stays as it is on all but the
                root.
            root: the rank that gets the result; the same on all ranks.
            op: a `ReduceOp`, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, the root's `tensor` holds the result, and
            every other rank's may be changed; leave it alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            x = np.ones(3)
            pg.reduce(x, root=0).wait()
            assert x[0] == (size if rank == 0 else 1)
        """
        return self._call(kinds.REDUCE, timeout, checks.reduce, tensor, root, op)

    def barrier(self, timeout: float | timedelta | None = None) -> Work:
        """Wait for all ranks.  Every rank must call it.

        Args:
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, every rank has called; it is `wait()` that
            waits, and raises what goes wrong: `ProcessGroup` says what state that leaves.

        Example::

            pg.barrier(timeout=60).wait()
        """
        return self._call(kinds.BARRIER, timeout, lambda rank, size: Call(kinds.BARRIER))

    def allgather(
        self, output_tensors: Arrays, input_tensor: Array, timeout: float | timedelta | None = None
    ) -> Work:
        """Gather an array from every rank, on every rank.  Every rank must call it.

        Args:
            output_tensors: a list of `size` arrays; the i-th gets rank i's input and is as
                large as that.  Sizes may differ between entries, the same way on all ranks.
            input_tensor: this rank's contribution.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output_tensors` hold the inputs; leave
            them, and the input, alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            rows = np.empty((size, 3))
            pg.allgather(list(rows), np.full(3, float(rank))).wait()
            assert (rows[:, 0] == range(size)).all()
        """
        return self._call(kinds.ALLGATHER, timeout, checks.allgather, output_tensors, input_tensor)

    def all_gather_single(
        self, output: Array, input: Array, timeout: float | timedelta | None = None
    ) -> Work:
        """Gather equal arrays from every rank into one, on every rank.  Every rank must call it.

        Args:
            output: of `size` times input's elements; rank i's input comes i-th.
            input: of one dtype and number of elements on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output` holds the inputs; leave both alone
            until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            everyone = np.empty(size)
            pg.all_gather_single(everyone, np.array([float(rank)])).wait()
            assert (everyone == range(size)).all()
        """
        return self._call(kinds.ALL_GATHER_SINGLE, timeout, checks.all_gather_single, output, input)

    def gather(
        self,
        output_tensors: Arrays | None,
        input_tensor: Array,
        root: SupportsIndex,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Gather an array from every rank, on the root.  Every rank must call it.

        Args:
            output_tensors: on the root a list of `size` arrays, the i-th as large as rank i's
                input; not looked at elsewhere.
            input_tensor: this rank's contribution; sizes may differ between ranks.
            root: the rank that gets; the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, the root's `output_tensors` hold the inputs;
            leave them, and the input, alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            rows = np.empty((size, 3)) if rank == 0 else None
            pg.gather(rows, np.full(3, float(rank)), root=0).wait()
            assert rows is None or rows[-1, 0] == size - 1
        """
        return self._call(kinds.GATHER, timeout, checks.gather, output_tensors, input_tensor, root)

    def scatter(
        self,
        output_tensor: Array,
        input_tensors: Arrays | None,
        root: SupportsIndex,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Give each rank one array of the root's list.  Every rank must call it.

        Args:
            output_tensor: as large as the root's entry for this rank.
            input_tensors: on the root a list of `size` arrays; not looked at elsewhere.
            root: the rank that gives; the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output_tensor` holds this rank's entry;
            leave it, and the root's list, alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            mine = np.empty(3)
            rows = np.repeat(np.arange(float(size)), 3).reshape(size, 3) if rank == 0 else None
            pg.scatter(mine, rows, root=0).wait()
            assert mine[0] == rank
        """
        return self._call(
            kinds.SCATTER, timeout, checks.scatter, output_tensor, input_tensors, root
        )

    def reduce_scatter(
        self, output: Array, input: Arrays, op: Op = SUM, timeout: float | timedelta | None = None
    ) -> Work:
        """Reduce a list of arrays over all ranks; rank i gets the i-th.  Every rank must call it.

        Args:
            output: as large as `input[rank]`.
            input: a list of `size` arrays; sizes may differ between entries, the same way on
                all ranks.
            op: a `ReduceOp`, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output` holds the result; leave it, and the
            input, alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            mine = np.empty(rank + 1)  # uneven
            pg.reduce_scatter(mine, [np.ones(i + 1) for i in range(size)]).wait()
            assert mine[rank] == size
        """
        return self._call(kinds.REDUCE_SCATTER, timeout, checks.reduce_scatter, output, input, op)

    def reduce_scatter_single(
        self, output: Array, input: Array, op: Op = SUM, timeout: float | timedelta | None = None
    ) -> Work:
        """Reduce an array over all ranks; rank i gets its i-th equal part.  Every rank must call.

        Args:
            output: of one number of elements on all ranks.
            input: of `size` times output's elements.
            op: a `ReduceOp`, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output` holds the result; leave it, and the
            input, alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            mine = np.empty(2)
            pg.reduce_scatter_single(mine, np.ones(2 * size)).wait()
            assert mine[0] == size
        """
        return self._call(
            kinds.REDUCE_SCATTER_SINGLE, timeout, checks.reduce_scatter_single, output, input, op
        )

    def alltoall(
        self,
        output_tensors: Arrays,
        input_tensors: Arrays,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Send the j-th array to rank j, and get one from each rank.  Every rank must call it.

        Args:
            output_tensors: a list of `size` arrays; the i-th is as large as what rank i sends here.
            input_tensors: a list of `size` arrays of any sizes.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output_tensors` hold what came; leave both
            lists' arrays alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            came = np.empty((size, 3))
            pg.alltoall(came, np.full((size, 3), float(rank))).wait()
            assert (came[:, 0] == range(size)).all()
        """
        return self._call(kinds.ALLTOALL, timeout, checks.alltoall, output_tensors, input_tensors)

    def all_to_all_single(
        self,
        output: Array,
        input: Array,
        output_split_sizes: Iterable[SupportsIndex] | None = None,
        input_split_sizes: Iterable[SupportsIndex] | None = None,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Send rows of one array to the ranks in turn, and get rows.  Every rank must call it.

        Args:
            output, input: arrays of one dtype, whose rows (entries of dimension 0) are of one size.
            output_split_sizes: rows that come from each rank; None or []: equal parts.
            input_split_sizes: rows that go to each rank; None or []: equal parts.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output` holds what came; leave both arrays
            alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            came = np.empty((size, 3))
            pg.all_to_all_single(came, np.full((size, 3), float(rank))).wait()
            assert (came[:, 0] == range(size)).all()
        """
        return self._call(
            kinds.ALL_TO_ALL_SINGLE,
            timeout,
            checks.all_to_all_single,
            output,
            input,
            output_split_sizes,
            input_split_sizes,
        )

    def scan(self, tensor: Array, op: Op = SUM, timeout: float | timedelta | None = None) -> Work:
        """Reduce, on each rank, the arrays of ranks 0 to this one, in place.  Every rank must call.

        Args:
            tensor: of one dtype and number of elements on all ranks.
            op: a `ReduceOp` other than AVG, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` holds the result; leave it alone
            until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            x = np.ones(3)
            pg.scan(x).wait()
            assert x[0] == rank + 1
        """
        return self._call(kinds.SCAN, timeout, checks.scan, tensor, op)

    def exscan(self, tensor: Array, op: Op = SUM, timeout: float | timedelta | None = None) -> Work:
        """Reduce, on each rank, the arrays of the ranks below it, in place.  Every rank must call.

        Args:
            tensor: of one dtype and number of elements on all ranks; rank 0's stays as it is.
            op: a `ReduceOp` other than AVG, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` holds the result; leave it alone
            until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            rows = np.array([10])  # that this rank has; where do they begin?
            pg.exscan(rows).wait()
            start = rows[0] if rank > 0 else 0
            assert start == 10 * rank
        """
        return self._call(kinds.EXSCAN, timeout, checks.exscan, tensor, op)

    @overload
    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: Literal["float32"] = ...,
        timeout: float | timedelta | None = ...,
    ) -> NDArray[np.float32]: ...

    @overload
    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: type[Scalar] | np.dtype[Scalar],
        timeout: float | timedelta | None = ...,
    ) -> NDArray[Scalar]: ...

    @overload
    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike,
        timeout: float | timedelta | None = ...,
    ) -> NDArray[Any]: ...

    def empty(
        self,
        shape: SupportsIndex | Sequence[SupportsIndex],
        dtype: DTypeLike = "float32",
        timeout: float | timedelta | None = None,
    ) -> NDArray[Any]:
        """Make an array in the node's shared memory.  Every rank must call it; it waits.

        Where each rank gives its array of one such call, or the like part of it, to `allreduce`,
        `reduce` or `reduce_scatter_single`, the ranks work on one another's memory without copying
        in and out (not in half precision, nor with AVG, PREMUL_SUM, or MIN and MAX of floats).
        Elsewhere it is an array like any other, and it may outlive the group.

        Args:
            shape: an int or a tuple of ints; the same number of elements on all ranks.
            dtype: a NumPy dtype, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A NumPy array of undefined content.  Where ranks can't share memory, or /dev/shm has no
            room for it (which warns), an ordinary one.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            x = pg.empty((1000, 3), np.float64)
            x[:] = rank
            pg.allreduce(x).wait()
        """
        work = self._call(kinds.EMPTY, timeout, lambda rank, size: checks.empty(shape, dtype))
        work.wait()
        made = work.call.payload
        assert isinstance(made, Shape)
        array: NDArray[Any] = work.call.result.view(made.dtype).reshape(made.sides)
        return array

    # ---- several arrays in one call ----

    def allreduce_coalesced(
        self, tensors: Sequence[Array], op: Op = SUM, timeout: float | timedelta | None = None
    ) -> Work:
        """`allreduce` of each array of a list, as one call.  Every rank must call it.

        Args:
            tensors: as many on all ranks, each of one dtype and number of elements.
            op: a `ReduceOp`, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, all of `tensors` hold their results; leave
            them alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            gradients = [np.ones(3), np.ones((2, 2), np.float32)]
            pg.allreduce_coalesced(gradients).wait()
            assert gradients[1][0, 0] == size
        """
        return self._call(kinds.ALLREDUCE_COALESCED, timeout, coalesced.allreduce, tensors, op)

    def allgather_coalesced(
        self,
        output_lists: Sequence[Sequence[Array]],
        input_list: Sequence[Array],
        timeout: float | timedelta | None = None,
    ) -> Work:
        """`allgather` of each array of `input_list`, as one call.  Every rank must call it.

        Args:
            output_lists: a list of `size` lists; the i-th is as rank i's `input_list`.
            input_list: this rank's contributions, equally many on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `output_lists` hold the inputs; leave all
            arrays alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            outputs = [[np.empty(3), np.empty(1)] for _ in range(size)]
            pg.allgather_coalesced(outputs, [np.ones(3), np.zeros(1)]).wait()
            assert outputs[size - 1][0][2] == 1
        """
        return self._call(
            kinds.ALLGATHER_COALESCED, timeout, coalesced.allgather, output_lists, input_list
        )

    def all_gather_single_coalesced(
        self,
        outputs: Sequence[Array],
        inputs: Sequence[Array],
        timeout: float | timedelta | None = None,
    ) -> Work:
        """`all_gather_single` of each pair of two lists, as one call.  Every rank must call it.

        Args:
            outputs: each of `size` times its input's elements.
            inputs: this rank's contributions, equally many on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `outputs` hold the inputs; leave all arrays
            alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            outputs = [np.empty(3 * size), np.empty(size)]
            pg.all_gather_single_coalesced(outputs, [np.ones(3), np.zeros(1)]).wait()
            assert outputs[0][-1] == 1
        """
        return self._call(
            kinds.ALL_GATHER_SINGLE_COALESCED, timeout, coalesced.all_gather_single, outputs, inputs
        )

    def reduce_scatter_single_coalesced(
        self,
        outputs: Sequence[Array],
        inputs: Sequence[Array],
        op: Op = SUM,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """`reduce_scatter_single` of each pair of two lists, as one call.  Every rank must call it.

        Args:
            outputs: equally many on all ranks.
            inputs: each of `size` times its output's elements.
            op: a `ReduceOp`, the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `outputs` hold the results; leave all arrays
            alone until then.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`.  A mismatch leaves group and arrays as they were; after a
                timeout or a peer's failure the group is broken, and what it writes is undefined.

        Example::

            outputs = [np.empty(3), np.empty(1)]
            inputs = [np.ones(3 * size), np.ones(size)]
            pg.reduce_scatter_single_coalesced(outputs, inputs).wait()
            assert outputs[0][0] == size
        """
        return self._call(
            kinds.REDUCE_SCATTER_SINGLE_COALESCED,
            timeout,
            coalesced.reduce_scatter_single,
            outputs,
            inputs,
            op,
        )

    # ---- point to point ----

    def send(
        self,
        tensor: Array,
        dst: SupportsIndex | Peer,
        tag: SupportsIndex = 0,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Send an array to one rank, which must `recv` it; the others have no part in it.

        Messages between two ranks with one tag are taken in the order in which they were sent.

        Args:
            tensor: any array.
            dst: the receiving rank, or `PROC_NULL`: then the call is done at once.
            tag: from 0; lets the receiver choose.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` may be changed again; the receiver
            may have the message by then, or not yet.  An expired send breaks the group: its message
            can't be called back.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was sent.
            MpicollError: by `wait()`: the deadline passed, or a peer failed.  The group is broken.

        Example::

            after, before = (rank + 1) % size, (rank - 1) % size
            x, y = np.full(3, float(rank)), np.empty(3)
            coming = pg.recv(y, before, tag=5)
            mc.wait_all([pg.send(x, after, tag=5), coming])
            assert y[0] == before
        """
        return self._message(timeout, checks.send, tensor, dst, tag)

    def recv(
        self,
        tensor: Array,
        src: SupportsIndex | Peer = ANY_SOURCE,
        tag: SupportsIndex = 0,
        timeout: float | timedelta | None = None,
    ) -> Work:
        """Receive an array that one rank has sent, or will `send`; the others have no part in it.

        Args:
            tensor: of the dtype and number of elements that were sent.
            src: the sending rank, or `ANY_SOURCE`; `Work.source_rank()` tells which it was.  With
                `PROC_NULL` the call is done at once, and the array stays as it is.
            tag: as the sender gave it.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Returns:
            A `Work`.  When its `wait()` has returned, `tensor` holds the message; leave it alone
            until then.  An expired receive is cancelled; the group stays usable, and so does the
            message.  Where the message has begun to come, and its sender goes no further, the group
            is broken.

        Raises:
            InvalidCallError, UnsupportedError: an argument is refused; nothing was done.
            CollectiveMismatchError: by `wait()`: the message is of another dtype or size; it is
                lost, the array is undefined, and the group stays usable.

        Example::

            sent = pg.send(np.ones(3), dst=rank)  # to itself
            x = np.empty(3)
            pg.recv(x, src=rank, timeout=30).wait()
            sent.wait()
            assert x[0] == 1
        """
        return self._message(timeout, checks.recv, tensor, src, tag)

    def recv_anysource(
        self, tensor: Array, tag: SupportsIndex = 0, timeout: float | timedelta | None = None
    ) -> Work:
        """`recv` from whichever rank sends first; its help says what the call does.

        Example::

            sent = pg.send(np.ones(3), dst=rank)
            pg.recv_anysource(np.empty(3)).wait()
            sent.wait()
        """
        return self.recv(tensor, ANY_SOURCE, tag, timeout)

    def probe(
        self, src: SupportsIndex | Peer = ANY_SOURCE, tag: SupportsIndex = 0
    ) -> Message | None:
        """Tell what the next message is that `recv` would take, or None, if none is here.  Local.

        It looks once, and does not wait.

        Args:
            src: the sending rank, or `ANY_SOURCE`.
            tag: as the sender gave it.

        Returns:
            A `Message` (source, tag, dtype, count).  The next `recv` from that source with that
            tag takes this message.  Of `PROC_NULL` there is never one.

        Raises:
            RankFailedError, RemoteRankError: none is here, and a peer has died or left the group.

        Example::

            sent = pg.send(np.ones(7), dst=rank)
            while (found := pg.probe(rank)) is None:
                pass  # something useful
            x = np.empty(found.count, found.dtype)
            pg.recv(x, found.source, found.tag).wait()
            sent.wait()
        """
        return self._caller.probe(src, tag)

    # ---- barriers and objects: these wait, and return values ----

    def monitored_barrier(
        self, timeout: float | timedelta | None = None, wait_all_ranks: bool = False
    ) -> None:
        """Wait for all ranks, naming those that don't come.  Every rank must call it; it waits.

        Args:
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.
            wait_all_ranks: accepted as in torch; all missing ranks are named either way.

        Raises:
            CollectiveTimeoutError: on every rank that has come; names the others.  This group is
                broken then.

        Example::

            pg.monitored_barrier(timeout=60)
        """
        self._call(
            kinds.MONITORED_BARRIER, timeout, lambda rank, size: Call(kinds.MONITORED_BARRIER)
        ).wait()

    def broadcast_object(
        self, obj: object, root: SupportsIndex, timeout: float | timedelta | None = None
    ) -> Any:
        """Return the root's object on every rank.  Every rank must call it; it waits.

        Objects are pickled, and unpickled on the other ranks: only among peers that are trusted.

        Args:
            obj: anything that can be pickled; not looked at on all but the root.
            root: the rank that gives; the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            settings = pg.broadcast_object({"rate": 0.1} if rank == 0 else None, root=0)
            assert settings["rate"] == 0.1
        """
        got = self._objects(kinds.BROADCAST_OBJECT, obj, root, timeout)
        return obj if self._rank == root else pickle.loads(got[0])

    def allgather_object(self, obj: T, timeout: float | timedelta | None = None) -> list[T]:
        """Return the list of all ranks' objects, on every rank.  Every rank must call it; it waits.

        Objects are pickled, and unpickled on the other ranks: only among peers that are trusted.

        Args:
            obj: anything that can be pickled.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            assert pg.allgather_object(rank) == list(range(size))
        """
        return [*map(pickle.loads, self._objects(kinds.ALLGATHER_OBJECT, obj, None, timeout))]

    def gather_object(
        self, obj: T, root: SupportsIndex, timeout: float | timedelta | None = None
    ) -> list[T] | None:
        """Return the list of all ranks' objects on the root.  Every rank must call it; it waits.

        Objects are pickled, and unpickled on the root: only among peers that are trusted.

        Args:
            obj: anything that can be pickled.
            root: the rank that gets the list; the others get None.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            names = pg.gather_object(f"rank {rank}", root=0)
            assert names is None or names[0] == "rank 0"
        """
        got = self._objects(kinds.GATHER_OBJECT, obj, root, timeout)
        return [*map(pickle.loads, got)] if self._rank == root else None

    @overload
    def scatter_object(
        self, objs: None, root: SupportsIndex, timeout: float | timedelta | None = ...
    ) -> Any: ...

    @overload
    def scatter_object(
        self, objs: Sequence[T] | None, root: SupportsIndex, timeout: float | timedelta | None = ...
    ) -> T: ...

    def scatter_object(
        self,
        objs: Sequence[T] | None,
        root: SupportsIndex,
        timeout: float | timedelta | None = None,
    ) -> T:
        """Return, on each rank, its entry of the root's list.  Every rank must call it; it waits.

        Objects are pickled, and unpickled on the other ranks: only among peers that are trusted.

        Args:
            objs: on the root a list of `size` objects; not looked at elsewhere.
            root: the rank that gives; the same on all ranks.
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            task = pg.scatter_object([f"part {i}" for i in range(size)] if rank == 0 else None, 0)
            assert task == f"part {rank}"
        """
        found: T = pickle.loads(self._objects(kinds.SCATTER_OBJECT, objs, root, timeout)[0])
        return found

    def _objects(self, kind: Kind, obj: object, root: object, timeout: object) -> list[Any]:
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
        ranks: Iterable[SupportsIndex],
        timeout: float | timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup | None:
        """Make a group of some of the ranks.  Every rank of this group must call it; it waits.

        Args:
            ranks: members of the new group; the i-th becomes rank i.  Disjoint lists may be given
                in one call, each by its members; a rank in no list gives any of them, or [].
            timeout: how long the making may take, and the new group's default.
            opts: where it has a `_timeout`, that counts if `timeout` is None (torch's options).

        Returns:
            The new group, or None on a rank that is not in `ranks`.

        Raises:
            CollectiveMismatchError: lists overlap without being equal; raised on all ranks, and
                this group stays usable.  Other errors: see `ProcessGroup`.

        Example::

            half = pg.split_group([r for r in range(size) if r % 2 == rank % 2])
            assert half is not None and half.rank() == rank // 2
            half.shutdown()
        """
        part = derive.split_group(self._caller, ranks, timeout, opts, group_name, group_desc)
        return None if part is None else ProcessGroup(part)

    def subgroup(
        self,
        ranks: Iterable[SupportsIndex],
        timeout: float | timedelta | None = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Make a group of some of the ranks; they alone must call it, and no other rank.  It waits.

        Ranks that are members of several such groups make them in one order.  It does not wait for
        what this group has under way.  Where all ranks can call, `split_group` makes all parts at
        once, and gives back what is dropped without `shutdown`; this does not.

        Args:
            ranks: members of the new group, this rank among them; the i-th becomes rank i.
            timeout: how long the making may take, and the new group's default.

        Raises:
            CollectiveTimeoutError: not all members have called in time, with the same list; names
                those that have not.  This group stays usable, and it may be called again.

        Example::

            if rank < 2:
                pair = pg.subgroup(range(min(size, 2)))
                pair.shutdown()
        """
        made = subgroup(self._caller, ranks, timeout, group_name, group_desc)
        return ProcessGroup(made)

    @overload
    def split(
        self, color: None, key: SupportsIndex = ..., timeout: float | timedelta | None = ...
    ) -> None: ...

    @overload
    def split(
        self,
        color: SupportsIndex | np.bool_,
        key: SupportsIndex = ...,
        timeout: float | timedelta | None = ...,
    ) -> ProcessGroup: ...

    @overload
    def split(
        self,
        color: SupportsIndex | np.bool_ | None,
        key: SupportsIndex = ...,
        timeout: float | timedelta | None = ...,
    ) -> ProcessGroup | None: ...

    def split(
        self,
        color: SupportsIndex | np.bool_ | None,
        key: SupportsIndex = 0,
        timeout: float | timedelta | None = None,
    ) -> ProcessGroup | None:
        """Split the group: ranks of one color form a group.  Every rank must call it; it waits.

        Args:
            color: at least 0 and below 2**31, or None to be in no new group; False and True are 0
                and 1.
            key: ranks of a new group are ordered by key, a C int, then by their rank here.
            timeout: how long the making may take, and the new group's default.

        Returns:
            The new group; None where `color` is None.

        Raises:
            InvalidCallError, CollectiveMismatchError: here or on a peer; the group stays usable.
            MpicollError: a timeout, or a peer's failure; the group is broken.

        Example::

            with pg.split(rank % 2) as half:
                half.barrier().wait()
        """
        part = derive.split(self._caller, color, key, timeout)
        return None if part is None else ProcessGroup(part)

    def local_group(self, timeout: float | timedelta | None = None) -> ProcessGroup:
        """Make the group of the ranks on this rank's node.  Every rank must call it; it waits.

        A node is one host name and one folder for shared memory; MPICOLL_NODES pretends more.

        Args:
            timeout: how long the making may take, and the new group's default.

        Example::

            with pg.local_group() as node:
                local_rank = node.rank()
        """
        return ProcessGroup(derive.local_group(self._caller, timeout))

    def cross_node_group(self, timeout: float | timedelta | None = None) -> ProcessGroup:
        """Make the group of those with this rank's local rank.  Every rank must call it; it waits.

        Args:
            timeout: how long the making may take, and the new group's default.

        Example::

            with pg.cross_node_group() as peers:
                nodes = peers.size()
        """
        return ProcessGroup(derive.cross_node_group(self._caller, timeout))

    def merge_remote_group(
        self,
        store: Store,
        size: SupportsIndex,
        timeout: float | timedelta | None = 1800.0,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Merge this group with others that meet it in a store.  It waits.

        Every rank of every group must call it; only rank 0 of each uses the store.  Any number of
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

        Example::

            folder = pg.broadcast_object(tempfile.mkdtemp() if rank == 0 else None, root=0)
            with pg.split(rank) as alone:
                both = alone.merge_remote_group(mc.FileStore(folder), size, timeout=60)
            assert both.size() == size
            both.shutdown()
        """
        merged = merge.merge_remote_group(
            self._caller, store, size, timeout, group_name, group_desc
        )
        return ProcessGroup(merged)

    def spawn(
        self, argv: Sequence[str], n: SupportsIndex, timeout: float | timedelta | None = None
    ) -> ProcessGroup:
        """Start more ranks, and make a group with them.  Every rank must call it; it waits.

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

        This group stays usable after all of these.  ``examples/grow.py`` is an example.
        """
        return ProcessGroup(spawn.spawn(self._caller, argv, n, timeout))

    def shrink_group(
        self,
        ranks_to_exclude: Iterable[SupportsIndex] = (),
        timeout: float | timedelta | None = None,
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> ProcessGroup:
        """Make a group of the ranks that are left after a failure, and give this one up.  It waits.

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

        Example::

            try:
                pg.allreduce(np.ones(3), timeout=30).wait()
            finally:  # or where an error tells that `pg.is_broken`
                pg = pg.shrink_group(timeout=60)
            pg.shutdown()
        """
        survivors = shrink.shrink_group(
            self._caller, ranks_to_exclude, timeout, group_name, group_desc
        )
        return ProcessGroup(survivors)

    # ---- the end ----

    def shutdown(self, timeout: float | timedelta | None = None) -> None:
        """Finish what is under way, and close the group.  Every rank must call it; it waits.

        Afterwards the group raises `GroupClosedError`.  A second call does nothing.  On a
        broken group it only closes this rank's side.  The error of a Work that was dropped
        unasked is raised here at the latest; then, as where the peers call something else, no
        rank has shut the group down.

        A receive for which no message has come when all ranks are here is cancelled, and a message
        that no rank receives is dropped.  That error is raised here, too, if nobody has asked the
        Work for it before; the group is shut down then.

        Args:
            timeout: seconds or a `timedelta`, from the call to its end; None: the group's.

        Example::

            pg.shutdown(timeout=60)  # as the end of ``with mc.new_group() as pg:`` does
        """
        self._caller.shutdown(timeout)

    def abort(self, reason: str = "") -> None:
        """Give up everything under way, at once and on this rank alone: no other need call it.

        What is under way fails: here with a `GroupBrokenError`, on the peers with a
        `RemoteRankError`.

        Args:
            reason: why; the peers' error holds it.

        Example::

            pg.abort("the input is damaged")
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
