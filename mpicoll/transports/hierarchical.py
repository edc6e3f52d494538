"""Collectives across nodes: what is done inside a node is done there, and stripes cross over.

The data is cut in stripes, as many as the smallest node has ranks.  Stripe i is reduced on each
node to the rank at place i, exchanged between the nodes by the ranks at place i, and gathered on
each node; so every byte crosses between nodes once, and all of those ranks share in sending.
Large arrays go in pieces: while one is between the nodes, the next is inside them.

Each path is chosen from the call's own arguments, which are the same on all ranks.  What does not
gain, and what is small, goes by MPI over the whole group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ..arrays.dtypes import Reduction
from ..engine import kinds
from ..engine.call import UNEVEN, Call
from ..engine.kinds import Kind
from ..runtime.library import IDLE, MPI, Abandoned, Steps
from ..runtime.memory import NodeMemory
from ..runtime.topology import Nodes, shares, spans
from .base import inner_call
from .kernels import decode, encode, reducing
from .messages import SendsMessages
from .mpi import MpiTransport
from .shm.transport import ShmTransport
from .tuning import Tuning

Array = np.ndarray[Any, Any]

_NOTHING = np.empty(0, np.uint8)


class HierarchicalTransport(SendsMessages):
    """The collectives of a group on several nodes, some with more than one rank.

    Args:
        comm: the group's communicator.
        near: that of the ranks of this node.
        memory: what they share.
        across: that of the ranks of this place on all nodes; None where the place has no stripe.
        tuning: the same on all ranks of the group.
    """

    name = "hierarchical"

    def __init__(
        self,
        comm: MPI.Intracomm,
        nodes: Nodes,
        near: MPI.Intracomm,
        memory: NodeMemory,
        across: MPI.Intracomm | None,
        tuning: Tuning,
    ) -> None:
        self._mpi = MpiTransport(comm, tuning)
        self.messages = self._mpi.messages
        self._near = ShmTransport(near, memory, tuning)
        self._across = None if across is None else MpiTransport(across, tuning)
        self._from = tuning.nodes_from
        self.rank, self.size = self._mpi.rank, self._mpi.size
        self._nodes = nodes
        self._node, self._place = nodes.locate(self.rank)
        self._stripes = nodes.stripes
        self._piece = tuning.nodes_piece * nodes.stripes  # bytes of all stripes together
        self._served = nodes.by_stripe()

    def release(self, *, together: bool) -> None:
        self._near.release(together=together)

    # ---- what reduces ----

    def allreduce(self, call: Call) -> Steps:
        plan, array = reducing(call)
        if array.size * plan.wire.itemsize < self._from:
            return self._mpi.allreduce(call)
        pieces = _Pieces(self, plan, array)

        def across(k: int) -> Steps:
            assert self._across is not None
            part = pieces.part(k)
            return self._across.allreduce(_reduction(kinds.ALLREDUCE, plan, part, part))

        def spread(k: int) -> Steps:
            yield from self._gather_stripes(pieces.part(k), pieces.wire(k))
            pieces.decode(k)

        return self._pipeline(pieces.count, pieces.reduce_stripes, across, spread)

    def reduce(self, call: Call) -> Steps:
        plan, array = reducing(call)
        if array.size * plan.wire.itemsize < self._from:
            return self._mpi.reduce(call)
        pieces = _Pieces(self, plan, array)
        home, place = self._nodes.locate(call.root)

        def across(k: int) -> Steps:
            assert self._across is not None
            part = pieces.part(k)
            return self._across.reduce(_reduction(kinds.REDUCE, plan, part, part, root=home))

        def collect(k: int) -> Steps:
            if self._node == home:
                wire = pieces.wire(k)
                inner = inner_call(
                    kinds.GATHER,
                    place,
                    pieces.part(k),
                    wire if self.rank == call.root else None,
                    recv_counts=self._stripe_counts(wire.size),
                )
                inner.largest = wire.size
                yield from self._near.gather(inner)
                if self.rank == call.root:
                    pieces.decode(k)

        return self._pipeline(pieces.count, pieces.reduce_stripes, across, collect)

    def reduce_scatter(self, call: Call) -> Steps:
        plan = call.reduction
        assert plan is not None and call.send is not None and call.recv is not None
        send, out = call.send, call.recv.flat()
        if send.total * plan.wire.itemsize < self._from:
            return self._mpi.reduce_scatter(call)
        blocks = _Rounds(self, send.counts, plan.wire.itemsize)
        pool = _Pool(plan.wire)
        mine: dict[int, Array] = {}  # what a round has brought to this rank

        def inside(k: int) -> Steps:
            """Reduce each stripe's blocks to the rank at its place."""
            counts = [sum(blocks.counts(k, stripe)) for stripe in range(self._stripes)]
            wire = pool.room(0, k, sum(counts))
            order = [rank for stripe in self._served for ranks in stripe for rank in ranks]
            sizes = [blocks.count(k, rank) for rank in order]
            for rank, (start, end) in zip(order, spans(sizes), strict=True):
                encode(plan, blocks.slice(k, send.block(rank)), wire[start:end])
            counts += [0] * (self._near.size - self._stripes)
            part = pool.room(1, k, counts[self._place])
            yield from self._near.reduce_scatter(
                _reduction(kinds.REDUCE_SCATTER, plan, wire, part, send_counts=counts)
            )

        def across(k: int) -> Steps:
            assert self._across is not None
            counts = blocks.counts(k, self._place)
            part = pool.room(1, k, sum(counts))
            mine[k] = pool.room(2, k, counts[self._node])
            return self._across.reduce_scatter(
                _reduction(kinds.REDUCE_SCATTER, plan, part, mine[k], send_counts=counts)
            )

        def pass_on(k: int) -> Steps:
            """Hand out the blocks of ranks beyond the smallest node's places."""
            got = mine.pop(k, _NOTHING.view(plan.wire))
            into = blocks.slice(k, out)
            if self._near.size > self._stripes:
                wire = pool.room(3, k, into.size)
                yield from self._hand_out(k, blocks, got, wire)
                got = wire
            decode(plan, got[: into.size], into)

        return self._pipeline(blocks.rounds, inside, across, pass_on)

    # ---- what only moves ----

    def broadcast(self, call: Call) -> Steps:
        blocks = call.send if call.send is not None else call.recv
        assert blocks is not None
        if blocks.nbytes < self._from:
            return self._mpi.broadcast(call)
        array = blocks.flat().view(np.uint8)
        bounds = spans(shares(array.size, -(-array.size // self._piece)))
        home, place = self._nodes.locate(call.root)
        pool = _Pool(array.dtype)

        def piece(k: int) -> Array:
            return array[slice(*bounds[k])]

        def part(k: int) -> Array:
            whole = piece(k)
            counts = self._stripe_counts(whole.size)
            if self._node != home:
                return pool.room(0, k, counts[self._place])
            return whole[slice(*spans(counts)[self._place])]

        def inside(k: int) -> Steps:
            if self._node == home:
                yield from self._near.broadcast(
                    inner_call(kinds.BROADCAST, place, piece(k), piece(k))
                )

        def across(k: int) -> Steps:
            assert self._across is not None
            return self._across.broadcast(inner_call(kinds.BROADCAST, home, part(k), part(k)))

        def spread(k: int) -> Steps:
            if self._node != home:
                yield from self._gather_stripes(part(k), piece(k))

        return self._pipeline(len(bounds), inside, across, spread)

    # ---- what MPI does as well over the whole group ----

    def allgather(self, call: Call) -> Steps:
        return self._mpi.allgather(call)  # a ring of ranks takes each block across once, too

    def gather(self, call: Call) -> Steps:
        return self._mpi.gather(call)

    def scatter(self, call: Call) -> Steps:
        return self._mpi.scatter(call)

    def alltoall(self, call: Call) -> Steps:
        return self._mpi.alltoall(call)

    def scan(self, call: Call) -> Steps:
        return self._mpi.scan(call)

    def exscan(self, call: Call) -> Steps:
        return self._mpi.exscan(call)

    # ---- what these are made of ----

    def _pipeline(
        self,
        pieces: int,
        inside: Callable[[int], Steps],
        across: Callable[[int], Steps],
        after: Callable[[int], Steps],
    ) -> Steps:
        """Take each piece through its three stages; while one is across, the next is inside.

        At most two pieces are under way, and one in each stage.
        """
        crossing: Steps = _none()
        try:
            for k in range(pieces):
                for mood in inside(k):
                    yield max(mood, next(crossing, IDLE))
                yield from crossing
                if k:
                    yield from after(k - 1)
                if self._across is not None:
                    crossing = across(k)
                    next(crossing, None)  # it starts, and goes on while the next piece is inside
            yield from crossing
            yield from after(pieces - 1)
        except Abandoned as thrown:
            crossing.throw(thrown)
            raise

    def _stripe_counts(self, count: int) -> list[int]:
        """Divide a piece among the places of this node."""
        return shares(count, self._stripes) + [0] * (self._near.size - self._stripes)

    def _gather_stripes(self, part: Array, whole: Array) -> Steps:
        """Gather the stripes of a piece on every rank of the node."""
        counts = self._stripe_counts(whole.size)
        return self._near.allgather(
            _sized(inner_call(kinds.ALLGATHER, -1, part, whole, recv_counts=counts), whole.size)
        )

    def _hand_out(self, k: int, blocks: _Rounds, held: Array, own: Array) -> Steps:
        """Give each rank of the node its block, `own`, from what the ranks with stripes hold."""
        near = self._nodes.members[self._node]
        outward, inward = [0] * len(near), [0] * len(near)
        if self._across is not None:
            for rank in self._served[self._place][self._node]:
                outward[near.index(rank)] = blocks.count(k, rank)
        inward[self._place % self._stripes] = own.size
        return self._near.alltoall(inner_call(kinds.ALLTOALL, -1, held, own, outward, inward))


class _Pool:
    """Scratch arrays of one call: one per use and parity of the piece."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._arrays: dict[tuple[int, int], Array] = {}

    def room(self, use: int, k: int, count: int) -> Array:
        found = self._arrays.get((use, k & 1))
        if found is None or found.size < count:
            found = self._arrays[use, k & 1] = np.empty(count, self._dtype)
        return found[:count]


class _Pieces:
    """An array that is reduced in place, piece by piece, on the wire type."""

    def __init__(self, transport: HierarchicalTransport, plan: Reduction, array: Array) -> None:
        self._transport, self._plan, self._array = transport, plan, array
        pieces = -(-array.size * plan.wire.itemsize // transport._piece)
        self._spans = spans(shares(array.size, pieces))
        self.count = len(self._spans)
        self._pool = _Pool(plan.wire)

    def _user(self, k: int) -> Array:
        return self._array[slice(*self._spans[k])]

    def wire(self, k: int) -> Array:
        """Return the piece as the nodes reduce it: the user's own memory where it can be."""
        user = self._user(k)
        return user if self._plan.direct else self._pool.room(0, k, user.size)

    def part(self, k: int) -> Array:
        """Return this rank's stripe of the piece; of no elements where its place has none."""
        t = self._transport
        return self._pool.room(1, k, t._stripe_counts(self._user(k).size)[t._place])

    def reduce_stripes(self, k: int) -> Steps:
        """Reduce each stripe of the piece, on this node, to the rank at its place."""
        wire = self.wire(k)
        if not self._plan.direct:
            wire[...] = self._plan.encode(self._user(k))
        counts = self._transport._stripe_counts(wire.size)
        return self._transport._near.reduce_scatter(
            _reduction(kinds.REDUCE_SCATTER, self._plan, wire, self.part(k), send_counts=counts)
        )

    def decode(self, k: int) -> None:
        """Bring the piece, reduced, into the user's memory, unless it is there."""
        if not self._plan.direct:
            self._plan.decode(self.wire(k), self._user(k))


class _Rounds:
    """Blocks, one per rank, that move in rounds: a piece of each at a time."""

    def __init__(
        self, transport: HierarchicalTransport, counts: list[int] | tuple[int, ...], itemsize: int
    ) -> None:
        self._counts = counts
        self._served = transport._served
        most = transport._piece // itemsize
        self.rounds = -(-sum(counts) // most)
        self._room = -(-max(counts) // self.rounds)

    def slice(self, k: int, block: Array) -> Array:
        """Return what round k takes of a block."""
        return block[k * self._room : (k + 1) * self._room]

    def count(self, k: int, rank: int) -> int:
        """Return how many elements round k takes of a rank's block."""
        return max(0, min(self._room, self._counts[rank] - k * self._room))

    def counts(self, k: int, stripe: int) -> list[int]:
        """Return how many elements round k takes of what a stripe serves, by node."""
        return [sum(self.count(k, rank) for rank in ranks) for ranks in self._served[stripe]]


def _reduction(
    kind: Kind,
    plan: Reduction,
    send: Array,
    recv: Array,
    root: int = -1,
    send_counts: list[int] | None = None,
) -> Call:
    """Make a call that reduces arrays of a plan's wire type."""
    call = inner_call(kind, root, send, recv, send_counts)
    call.reduction = dataclasses.replace(plan, direct=True)
    call.count = UNEVEN
    return _sized(call, send.size)


def _sized(call: Call, largest: int) -> Call:
    call.largest = largest
    return call


def _none() -> Steps:
    yield from ()
