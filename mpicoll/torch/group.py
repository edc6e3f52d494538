"""`TorchGroup`: the process group that `torch.distributed` holds and calls.

PyTorch's Python and C++ code call it with c10d's options objects; its methods also take what those
of PyTorch's own class take besides: one tensor, root, op and timeout.  A method looks for nothing
wrong: mpicoll does, which refuses it in the call that the peers are in, so that they hear of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    AllreduceCoalescedOptions,
    AllreduceOptions,
    AllToAllOptions,
    BarrierOptions,
    BroadcastOptions,
    GatherOptions,
    ReduceOptions,
    ReduceScatterOptions,
    ScatterOptions,
)

import mpicoll as mc

from . import dispatch, layout, sparse
from .errors import translated
from .layout import NOTHING, Written
from .work import FINISHED, TorchWork

_UNSET = timedelta(0)  # what is not above it is no timeout: an unset one is -1 ms
_AT_ONCE = 1e-6  # seconds that stand for a timeout of 0
Timeout = timedelta | None
_OPS = {
    int(getattr(dist.ReduceOp.RedOpType, name)): getattr(mc.ReduceOp, name)
    for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")
}


class Options:
    """What `torch.distributed` asks of a backend's options."""

    def __init__(self, timeout: timedelta, name: str, ranks: Sequence[int]) -> None:
        self.backend = "mpicoll"
        self._timeout = timeout
        self.group_name = name
        self.global_ranks_in_group = list(ranks)


class TorchGroup(dist.ProcessGroup):
    """A group of ranks, as PyTorch sees it.

    Attributes:
        mpicoll: mpicoll's group of the same ranks, whose own calls take tensors, too.
    """

    supports_splitting = True
    supports_coalescing = False
    supports_time_estimate = False

    def __init__(self, group: mc.ProcessGroup, store: Any, name: str, desc: str) -> None:
        super().__init__(group.rank(), group.size())
        self.mpicoll = group
        self._store = store
        self._name = name
        self._desc = desc
        self._number = 0  # of the last collective
        self._coalescing: list[TorchWork] | None = None
        dispatch.mend(TorchGroup)

    def __repr__(self) -> str:
        return f"<mpicoll.torch.TorchGroup over {self.mpicoll!r}>"

    # ---- what it is ----

    def getBackendName(self) -> str:
        """Return the backend's name."""
        return "mpicoll"

    def name(self) -> str:
        """Return the backend's name."""
        return "mpicoll"

    def getGroupName(self) -> str:
        """Return the name by which PyTorch knows the group."""
        return self._name

    def setGroupName(self, name: str) -> None:
        """Give it that name."""
        self._name = name

    def getGroupDesc(self) -> str:
        """Return what the group is for."""
        return self._desc

    def setGroupDesc(self, desc: str) -> None:
        """Say what the group is for."""
        self._desc = desc

    group_name = property(getGroupName)
    group_desc = property(getGroupDesc)
    _set_group_name = setGroupName
    _set_group_desc = setGroupDesc

    def get_group_store(self) -> Any:
        """Return the store of the group's ranks."""
        return self._store

    @property
    def _device_types(self) -> list[torch.device]:
        kinds = ["cpu"] if self.mpicoll.device == "cpu" else ["cpu", "cuda"]
        return [torch.device(kind) for kind in kinds]

    def _get_backend(self, device: object = None) -> TorchGroup:
        return self

    def _get_backend_name(self) -> str:
        return "mpicoll"

    @property
    def options(self) -> Options:
        """What it was made with."""
        group = self.mpicoll
        return Options(group.timeout, self._name, group.ranks)

    def _set_sequence_number_for_group(self) -> None:
        """Do nothing: a group counts its collectives from its making."""

    def _get_sequence_number_for_group(self) -> int:
        return self._number

    def set_timeout(self, timeout: timedelta) -> None:
        """Set how long a call may take where it doesn't say otherwise.  Local."""
        self.mpicoll.set_timeout(timeout)

    _set_default_timeout = set_timeout

    def dump(self) -> str:
        """Return the flight recorder as JSON: the group's last calls on this rank.  Local."""
        return self.mpicoll.dump()

    def eager_connect_single_device(self, device: object = None) -> None:
        """Do nothing: a group is connected when it is made."""

    def perform_nocolor_split(self, device: object = None) -> None:
        """Do nothing: only the members of a new group make it."""

    # ---- how a call ends ----

    def _begun(
        self,
        work: mc.Work,
        at_once: bool,
        outputs: Sequence[Tensor],
        written: Written = NOTHING,
    ) -> Any:
        """Return PyTorch's Work of a collective; wait for it if it is to be over `at_once`."""
        self._number += 1
        if at_once and self._coalescing is None:
            work.wait()
            if written.back is not None:
                written.back()
            return FINISHED
        return self._message(work, outputs, written)

    def _message(
        self, work: mc.Work, outputs: Sequence[Tensor], written: Written = NOTHING
    ) -> TorchWork:
        made = TorchWork([work], outputs, written.back)
        if written.back is not None:
            layout.await_copies(written, made.is_completed)
        if self._coalescing is not None:
            self._coalescing.append(made)
        return made

    def _start_coalescing(self, device: object = None) -> None:
        self._coalescing = []

    def _end_coalescing(self, device: object = None) -> Any:
        begun, self._coalescing = self._coalescing or [], None
        return TorchWork.all_of(begun)

    # ---- collectives ----

    @translated
    def allreduce(
        self, tensors: Any, opts: Any = None, timeout: Timeout = None, *, op: Any = None
    ) -> Any:
        """Reduce a tensor over all ranks, in place on each."""
        if type(opts) is not AllreduceOptions:
            opts = _asked(AllreduceOptions, opts, timeout, op=op)
        tensor = _one(tensors)
        if layout.is_plain(tensor):
            work = self.mpicoll.allreduce(tensor, _op(opts), _limit(opts))
            return self._begun(work, not opts.asyncOp, (tensor,))
        if layout.is_sparse(tensor) and _op(opts) is mc.ReduceOp.SUM:
            sparse.allreduce(self.mpicoll, tensor, _limit(opts))
            return TorchWork([], (tensor,))
        written = Written()
        into = written.plain(tensor, read=True)
        work = self.mpicoll.allreduce(into, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, (tensor,), written)

    @translated
    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> Any:
        """Reduce each tensor of a list, as one call."""
        opts = opts or _asked(AllreduceCoalescedOptions)
        written = Written()
        into = written.all_plain(tensors, read=True)
        work = self.mpicoll.allreduce_coalesced(into, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, tensors, written)

    @translated
    def broadcast(
        self, tensors: Any, opts: Any = None, timeout: Timeout = None, *, root: int | None = None
    ) -> Any:
        """Copy the root's tensor to all other ranks, in place."""
        if type(opts) is not BroadcastOptions:
            opts = _asked(BroadcastOptions, None, timeout, root=opts if root is None else root)
        tensor, written = _one(tensors), Written()
        gives = opts.rootRank == self.mpicoll.rank()
        into = layout.plain(tensor) if gives else written.plain(tensor, read=False)
        work = self.mpicoll.broadcast(into, opts.rootRank, _limit(opts))
        return self._begun(work, not opts.asyncOp, (tensor,), written)

    @translated
    def reduce(
        self,
        tensors: Any,
        opts: Any = None,
        op: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Reduce a tensor over all ranks, in place on the root."""
        if type(opts) is not ReduceOptions:
            opts = _asked(ReduceOptions, op, timeout, root=opts if root is None else root)
        tensor, written = _one(tensors), Written()
        gets = opts.rootRank == self.mpicoll.rank()
        into = written.plain(tensor, read=True) if gets else layout.plain(tensor)
        work = self.mpicoll.reduce(into, opts.rootRank, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, (tensor,), written)

    @translated
    def allgather(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Timeout = None
    ) -> Any:
        """Gather a tensor from every rank into a list, on every rank."""
        if type(opts) is not AllgatherOptions:
            opts = _asked(AllgatherOptions, None, opts if timeout is None else timeout)
        outputs, written = _list(output_tensors), Written()
        into = written.all_plain(outputs, read=False)
        taken = layout.plain(_one(input_tensors))
        work = self.mpicoll.allgather(into, taken, _limit(opts))
        return self._begun(work, not opts.asyncOp, outputs, written)

    @translated
    def all_gather_single(
        self, output: Tensor, input: Tensor, opts: Any = None, timeout: Timeout = None
    ) -> Any:
        """Gather equal tensors from every rank into one, on every rank."""
        if type(opts) is not AllgatherOptions:
            opts = _asked(AllgatherOptions, None, opts if timeout is None else timeout)
        written = Written()
        into = written.plain(output, read=False)
        work = self.mpicoll.all_gather_single(into, layout.plain(input), _limit(opts))
        return self._begun(work, not opts.asyncOp, (output,), written)

    @translated
    def allgather_coalesced(self, output_lists: Any, input_list: Any, opts: Any = None) -> Any:
        """Gather each tensor of a list, as one call."""
        opts = opts or _asked(AllgatherOptions)
        written = Written()
        into = [written.all_plain(outputs, read=False) for outputs in output_lists]
        taken = layout.all_plain(input_list)
        work = self.mpicoll.allgather_coalesced(into, taken, _limit(opts))
        outputs = [tensor for outputs in output_lists for tensor in outputs]
        return self._begun(work, not opts.asyncOp, outputs, written)

    @translated
    def all_gather_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """Gather each pair of two lists into one tensor, as one call."""
        opts = opts or _asked(AllgatherOptions)
        written = Written()
        into = written.all_plain(outputs, read=False)
        taken = layout.all_plain(inputs)
        work = self.mpicoll.all_gather_single_coalesced(into, taken, _limit(opts))
        return self._begun(work, not opts.asyncOp, outputs, written)

    @translated
    def gather(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Gather a tensor from every rank into a list, on the root."""
        if type(opts) is not GatherOptions:
            opts = _asked(GatherOptions, None, timeout, root=opts if root is None else root)
        rank, written = self.mpicoll.rank(), Written()
        outputs = _list(output_tensors) if opts.rootRank == rank else []
        into = written.all_plain(outputs, read=False)
        taken = layout.plain(_one(input_tensors))
        work = self.mpicoll.gather(into, taken, opts.rootRank, _limit(opts))
        return self._begun(work, not opts.asyncOp, outputs, written)

    @translated
    def scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        root: int | None = None,
    ) -> Any:
        """Give each rank one tensor of the root's list."""
        if type(opts) is not ScatterOptions:
            opts = _asked(ScatterOptions, None, timeout, root=opts if root is None else root)
        tensor, written = _one(output_tensors), Written()
        inputs = _list(input_tensors) if opts.rootRank == self.mpicoll.rank() else []
        taken, into = layout.all_plain(inputs), written.plain(tensor, read=False)
        work = self.mpicoll.scatter(into, taken, opts.rootRank, _limit(opts))
        return self._begun(work, not opts.asyncOp, (tensor,), written)

    @translated
    def reduce_scatter(
        self,
        output_tensors: Any,
        input_tensors: Any,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        op: Any = None,
    ) -> Any:
        """Reduce a list of tensors over all ranks, and give the i-th result to rank i."""
        if type(opts) is not ReduceScatterOptions:
            opts = _asked(ReduceScatterOptions, opts, timeout, op=op)
        tensor, written = _one(output_tensors), Written()
        taken = layout.all_plain(_list(input_tensors))
        into = written.plain(tensor, read=False)
        work = self.mpicoll.reduce_scatter(into, taken, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, (tensor,), written)

    @translated
    def reduce_scatter_single(
        self,
        output: Tensor,
        input: Tensor,
        opts: Any = None,
        timeout: Timeout = None,
        *,
        op: Any = None,
    ) -> Any:
        """Reduce a tensor over all ranks, and give the i-th equal part of it to rank i."""
        if type(opts) is not ReduceScatterOptions:
            opts = _asked(ReduceScatterOptions, opts, timeout, op=op)
        written = Written()
        into = written.plain(output, read=False)
        taken = layout.plain(input)
        work = self.mpicoll.reduce_scatter_single(into, taken, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, (output,), written)

    @translated
    def reduce_scatter_single_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> Any:
        """Reduce each pair of two lists and give equal parts of it, as one call."""
        opts = opts or _asked(ReduceScatterOptions)
        written = Written()
        into = written.all_plain(outputs, read=False)
        taken = layout.all_plain(inputs)
        work = self.mpicoll.reduce_scatter_single_coalesced(into, taken, _op(opts), _limit(opts))
        return self._begun(work, not opts.asyncOp, outputs, written)

    @translated
    def alltoall(
        self, output_tensors: Any, input_tensors: Any, opts: Any = None, timeout: Timeout = None
    ) -> Any:
        """Send the j-th tensor to rank j, and get one from each rank."""
        if type(opts) is not AllToAllOptions:
            opts = _asked(AllToAllOptions, None, opts if timeout is None else timeout)
        written = Written()
        into = written.all_plain(output_tensors, read=False)
        work = self.mpicoll.alltoall(into, layout.all_plain(input_tensors), _limit(opts))
        return self._begun(work, not opts.asyncOp, output_tensors, written)

    @translated
    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: Sequence[int],
        input_split_sizes: Sequence[int],
        opts: Any = None,
        timeout: Timeout = None,
    ) -> Any:
        """Send consecutive rows of one tensor to the ranks in turn, and get rows from each."""
        if type(opts) is not AllToAllOptions:
            opts = _asked(AllToAllOptions, None, opts if timeout is None else timeout)
        written = Written()
        into = written.plain(output, read=False)
        work = self.mpicoll.all_to_all_single(
            into, layout.plain(input), output_split_sizes, input_split_sizes, _limit(opts)
        )
        return self._begun(work, not opts.asyncOp, (output,), written)

    @translated
    def barrier(self, opts: Any = None, timeout: Timeout = None) -> Any:
        """Wait for all ranks."""
        if type(opts) is not BarrierOptions:
            opts = _asked(BarrierOptions, None, opts if timeout is None else timeout)
        return self._begun(self.mpicoll.barrier(_limit(opts)), not opts.asyncOp, ())

    @translated
    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """Wait for all ranks; if some don't come, raise on every rank that did, naming them."""
        self._number += 1
        limit = self.mpicoll.timeout if timeout is None else timeout
        seconds = limit.total_seconds() if isinstance(limit, timedelta) else float(limit)
        try:
            self.mpicoll.monitored_barrier(max(seconds, _AT_ONCE), wait_all_ranks)
        except mc.CollectiveTimeoutError as error:
            error.args = (f"{self._in_gloos_words(error, seconds, wait_all_ranks)}: {error}",)
            raise

    def _in_gloos_words(
        self, error: mc.CollectiveTimeoutError, seconds: float, all_of_them: bool
    ) -> str:
        """Say who is missing as gloo does, since programs look for its sentences."""
        me, late = self.mpicoll.rank(), [*map(str, error.missing)]
        if me == 0 and seconds <= 0:
            return "[Rank 0]: Rank 0 timed out in monitoredBarrier after 0 ms"
        who = f"Ranks {', '.join(late)}" if all_of_them else f"Rank {', '.join(late[:1])}"
        failed = f"{who} failed to pass monitoredBarrier in {seconds * 1000:.0f} ms"
        if me == 0:
            return f"[Rank 0]: {failed}"
        return (
            f"[Rank {me}]: Rank {me} successfully reached monitoredBarrier, but received errors "
            f"while waiting for send/recv from rank 0: {failed}"
        )

    # The names that these had before PyTorch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    # ---- point to point ----

    @translated
    def send(self, tensors: Any, dst: int, tag: int = 0) -> TorchWork:
        """Send a tensor to one rank, which must `recv` it."""
        tensor = _one(tensors)
        return self._message(self.mpicoll.send(layout.plain(tensor), dst, tag), (tensor,))

    @translated
    def recv(self, tensors: Any, src: int, tag: int = 0) -> TorchWork:
        """Receive a tensor from one rank."""
        tensor, written = _one(tensors), Written()
        work = self.mpicoll.recv(written.plain(tensor, read=False), src, tag)
        return self._message(work, (tensor,), written)

    @translated
    def recv_anysource(self, tensors: Any, tag: int = 0) -> TorchWork:
        """Receive a tensor from whichever rank sends first; `Work.source_rank()` tells which."""
        tensor, written = _one(tensors), Written()
        work = self.mpicoll.recv_anysource(written.plain(tensor, read=False), tag)
        return self._message(work, (tensor,), written)

    # ---- groups out of groups ----

    @translated
    def split_group(
        self,
        ranks: Sequence[int],
        timeout: Timeout = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: object = None,
    ) -> TorchGroup | None:
        """Make a group of some of the ranks; every rank of this group must call."""
        part = self.mpicoll.split_group(ranks, timeout, opts, group_name, group_desc)
        if part is None:
            return None
        store = dist.PrefixStore(f"{part.group_name}/", self._store)
        return TorchGroup(part, store, part.group_name, part.group_desc)

    splitGroup = split_group

    @translated
    def merge_remote_group(
        self,
        store: Any,
        size: int,
        timeout: timedelta = timedelta(seconds=1800),
        group_name: str | None = None,
        group_desc: str | None = None,
    ) -> TorchGroup:
        """Merge this group with others that meet it in a store."""
        merged = self.mpicoll.merge_remote_group(store, size, timeout, group_name, group_desc)
        return TorchGroup(merged, store, merged.group_name, merged.group_desc)

    # ---- the end ----

    def shutdown(self) -> None:
        """Finish what is under way, wait for all ranks, and give the communicator back.

        What goes wrong is a warning: `destroy_process_group` has other groups to end, and its own
        books to clear.
        """
        try:
            self.mpicoll.shutdown()
        except mc.MpicollError as error:
            warnings.warn(f"group {self._name!r} did not end well: {error}", stacklevel=2)
            self.mpicoll.abort("its shutdown failed")

    def abort(self) -> None:
        """Give up everything under way, at once and on this rank alone."""
        self.mpicoll.abort("torch.distributed aborted it")


def _one(tensors: Any) -> Any:
    """Return what a list of one holds; anything else is mpicoll's to refuse."""
    return tensors[0] if type(tensors) is list and len(tensors) == 1 else tensors


def _list(tensors: Any) -> Any:
    """Return the list in a list of one list, as c10d gives it."""
    if type(tensors) is list and len(tensors) == 1 and type(tensors[0]) is list:
        return tensors[0]
    return tensors


def _op(opts: Any) -> Any:
    """Return the operator as mpicoll has it, which its compiled core knows at sight."""
    op = opts.reduceOp
    return _OPS.get(int(op.op), op)


def _limit(opts: Any) -> Timeout:
    limit: timedelta = opts.timeout
    return limit if limit > _UNSET else None


def _asked(
    kind: Any, op_or_opts: Any = None, timeout: Timeout = None, *, op: Any = None, root: Any = None
) -> Any:
    """Return c10d's options where a method was given single arguments instead, as `_dist2` does."""
    opts = kind()
    op = op_or_opts if op is None else op
    if op is not None:
        opts.reduceOp = op
    if root is not None:
        opts.rootRank = root
    if timeout is not None:
        opts.timeout = timeout
    return opts
