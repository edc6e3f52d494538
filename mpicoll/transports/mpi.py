"""Collectives by the MPI library itself, always in their nonblocking form.

What only moves is moved as elements of the right width, whatever they mean.  What reduces
goes through a `Reduction`: in place where MPI computes exactly what is promised, else by way
of a wire array that is encoded before and decoded after.

MPI's counts and displacements are C ints.  A call in which any rank touches more than
`Tuning.mpi_elements` elements is cut in pieces, or moved point to point, block by block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..arrays.buffers import Blocks
from ..arrays.dtypes import Reduction
from ..engine.call import UNEVEN, Call
from ..runtime.library import MPI, Steps, exchange_tag, until, until_all
from .messages import Messages, SendsMessages
from .tuning import Tuning

Array = np.ndarray[Any, Any]


class MpiTransport(SendsMessages):
    """The collectives of one communicator, which is private to its group."""

    name = "mpi"

    def __init__(
        self, comm: MPI.Intracomm, tuning: Tuning, messages: Messages | None = None
    ) -> None:
        self.comm = comm
        self._most = tuning.mpi_elements
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.messages = messages or Messages(comm, tuning)

    # ---- what reduces ----

    def allreduce(self, call: Call) -> Steps:
        plan, array, wire = _wire(call)
        for piece in _pieces(wire, self._most):
            yield from until(self.comm.Iallreduce(MPI.IN_PLACE, [piece, _number(plan)], _op(plan)))
        if not plan.direct:
            plan.decode(wire, array)

    def reduce(self, call: Call) -> Steps:
        plan, array, wire = _wire(call)
        for piece in _pieces(wire, self._most):
            spec = [piece, _number(plan)]
            if self.rank == call.root:
                request = self.comm.Ireduce(MPI.IN_PLACE, spec, _op(plan), call.root)
            else:
                request = self.comm.Ireduce(spec, None, _op(plan), call.root)
            yield from until(request)
        if self.rank == call.root and not plan.direct:
            plan.decode(wire, array)

    def reduce_scatter(self, call: Call) -> Steps:
        plan = _plan(call)
        send, recv = _two(call)
        wire = send.flat() if plan.direct else plan.encode(send.flat())
        array = recv.flat()
        apart = plan.direct and not call.in_place
        out = array if apart else np.empty(array.size, dtype=plan.wire)
        if call.largest > self._most:
            yield from self._reduce_to_each(wire, out, send, plan)
        elif call.count == UNEVEN:
            yield from until(
                self.comm.Ireduce_scatter(
                    [wire, _number(plan)], [out, _number(plan)], list(send.counts), _op(plan)
                )
            )
        else:
            yield from until(
                self.comm.Ireduce_scatter_block(
                    [wire, _number(plan)],
                    [out, _number(plan)],
                    _op(plan),
                )
            )
        if not apart:
            plan.decode(out, array)

    def _reduce_to_each(self, wire: Array, out: Array, send: Blocks, plan: Reduction) -> Steps:
        """A reduce_scatter too large for one call: a reduce to each rank, in pieces."""
        for root, (start, count) in enumerate(zip(send.displs, send.counts, strict=True)):
            block = wire[start : start + count]
            pieces = _pieces(block, self._most)
            results = _pieces(out if self.rank == root else block, self._most)
            for piece, into in zip(pieces, results, strict=True):
                target = [into, _number(plan)] if self.rank == root else None
                yield from until(self.comm.Ireduce([piece, _number(plan)], target, _op(plan), root))

    def scan(self, call: Call) -> Steps:
        plan, array, wire = _wire(call)
        for piece in _pieces(wire, self._most):
            yield from until(self.comm.Iscan(MPI.IN_PLACE, [piece, _number(plan)], _op(plan)))
        if not plan.direct:
            plan.decode(wire, array)

    def exscan(self, call: Call) -> Steps:
        """Reduce what the lower ranks gave.  Rank 0's array stays as it is."""
        plan, array, wire = _wire(call)
        out = np.empty_like(wire)  # MPI leaves rank 0's output undefined: not the user's memory
        for piece, into in zip(_pieces(wire, self._most), _pieces(out, self._most), strict=True):
            yield from until(
                self.comm.Iexscan([piece, _number(plan)], [into, _number(plan)], _op(plan))
            )
        if self.rank > 0 and not plan.direct:
            plan.decode(out, array)
        elif self.rank > 0:
            array[...] = out

    # ---- what only moves ----

    def broadcast(self, call: Call) -> Steps:
        blocks = call.send if call.send is not None else call.recv
        assert blocks is not None
        for piece in _pieces(blocks.flat(), self._most):
            yield from until(self.comm.Ibcast([piece, _element(piece)], call.root))

    def allgather(self, call: Call) -> Steps:
        send, recv = _two(call)
        if call.largest > self._most:
            mine = send.flat()
            yield from self._exchange([mine] * self.size, _each(recv), call.in_place)
            return
        into = recv.landing()
        wire = _apart(send.flat(), into)
        yield from until(self.comm.Iallgatherv([wire, _element(wire)], _spread(into, recv)))
        recv.unpack(into)

    def gather(self, call: Call) -> Steps:
        assert call.send is not None
        wire = call.send.flat()
        none: list[Array | None] = [None] * self.size
        if call.largest > self._most:
            outgoing = none.copy()
            outgoing[call.root] = wire
            incoming = _each(call.recv) if call.recv else none
            yield from self._exchange(outgoing, incoming, call.in_place)
        elif call.recv is None:
            yield from until(self.comm.Igatherv([wire, _element(wire)], None, call.root))
        else:
            into = call.recv.landing()
            wire = _apart(wire, into)
            yield from until(
                self.comm.Igatherv([wire, _element(wire)], _spread(into, call.recv), call.root)
            )
            call.recv.unpack(into)

    def scatter(self, call: Call) -> Steps:
        assert call.recv is not None
        into = call.recv.flat()
        none: list[Array | None] = [None] * self.size
        if call.largest > self._most:
            incoming = none.copy()
            incoming[call.root] = into
            outgoing = _each(call.send) if call.send else none
            yield from self._exchange(outgoing, incoming, call.in_place)
            return
        wire = None if call.send is None else _spread(call.send.flat(), call.send)
        target = MPI.IN_PLACE if call.in_place else [into, _element(into)]
        yield from until(self.comm.Iscatterv(wire, target, call.root))

    def alltoall(self, call: Call) -> Steps:
        send, recv = _two(call)
        if call.largest > self._most:
            yield from self._exchange(_each(send), _each(recv), call.in_place)
            return
        into = recv.landing()
        wire = _apart(send.flat(), into) if call.in_place else send.flat()
        yield from until(self.comm.Ialltoallv(_spread(wire, send), _spread(into, recv)))
        recv.unpack(into)

    def _exchange(
        self,
        outgoing: list[Array | None] | list[Array],
        incoming: list[Array | None] | list[Array],
        in_place: bool,
    ) -> Steps:
        """Move one block to and from each rank, point to point; None: no such block."""
        mine, yours = outgoing[self.rank], incoming[self.rank]
        if mine is not None and yours is not None and not in_place:
            yours[...] = mine
        requests = []
        tag = exchange_tag()
        for rank in range(self.size):
            if rank == self.rank:
                continue
            into, wire = incoming[rank], outgoing[rank]
            for piece in () if into is None else _pieces(into, self._most):
                requests.append(self.comm.Irecv([piece, _element(piece)], rank, tag))
            for piece in () if wire is None else _pieces(wire, self._most):
                requests.append(self.comm.Isend([piece, _element(piece)], rank, tag))
        yield from until_all(requests)


def _wire(call: Call) -> tuple[Reduction, Array, Array]:
    """Return an in-place reduction's plan, the user's array, and the array that MPI gets."""
    plan = _plan(call)
    assert call.send is not None
    array = call.send.flat()
    return plan, array, array if plan.direct else plan.encode(array)


def _plan(call: Call) -> Reduction:
    plan = call.reduction
    assert plan is not None
    if plan.mpi_op == "SUM" and plan.wire.itemsize < 4 and plan.wire.kind in "iu":
        return _WIDER
    return plan


# Open MPI 5.0 adds 8- and 16-bit integers with saturation, where NumPy (and C) wrap around.
_WIDER = Reduction(
    np.dtype(np.int32),
    "SUM",
    False,
    lambda array: array.astype(np.int32),
    lambda wire, array: np.copyto(array, wire, casting="unsafe"),
)


def _apart(send: Array, into: Array) -> Array:
    """Return what to send: a copy where it is a part of what is received into: MPI refuses that.

    Users' arrays are where the call is in place; so are the stripes of one across nodes.  MPI's
    `IN_PLACE` must be given by all ranks or by none; but here each rank decides for itself.
    """
    return send.copy() if np.may_share_memory(send, into) else send


def _two(call: Call) -> tuple[Blocks, Blocks]:
    assert call.send is not None and call.recv is not None
    return call.send, call.recv


def _pieces(array: Array, most: int) -> Iterator[Array]:
    """Cut an array in pieces that one MPI call can take; an empty one is one empty piece."""
    for start in range(0, max(array.size, 1), most):
        yield array[start : start + most]


def _each(blocks: Blocks) -> list[Array]:
    return [blocks.block(i) for i in range(len(blocks.counts))]


def _spread(array: Array, blocks: Blocks) -> list[Any]:
    return [array, (blocks.counts, blocks.displs), _element(array)]


def _element(array: Array) -> MPI.Datatype:
    """Return an MPI type of the right width: what only moves needs no more."""
    found = _ELEMENTS.get(array.itemsize)
    return _bytes(array.itemsize) if found is None else found()


@functools.cache
def _bytes(count: int) -> MPI.Datatype:
    """Return a type of so many bytes; it stays until the end, as there are few such widths."""
    return MPI.BYTE.Create_contiguous(count).Commit()


_ELEMENTS = {
    1: lambda: MPI.BYTE,
    2: lambda: MPI.INT16_T,
    4: lambda: MPI.INT32_T,
    8: lambda: MPI.INT64_T,
    16: lambda: MPI.C_DOUBLE_COMPLEX,
    32: lambda: MPI.C_LONG_DOUBLE_COMPLEX,
}


def _number(plan: Reduction) -> MPI.Datatype:
    """Return the MPI type in which a plan's wire is reduced."""
    return MPI.Datatype.fromcode(plan.wire.char)


def _op(plan: Reduction) -> MPI.Op:
    op: MPI.Op = getattr(MPI, plan.mpi_op)
    return op
