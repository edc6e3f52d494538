"""Moves of GPU memory by a CUDA-aware MPI library; what reduces goes through the host.

Everything is made of nonblocking messages, from each rank to each other; what a rank gives to
itself is copied on its GPU.  Of what takes addresses of GPU memory, Open MPI has only messages and
*blocking* collectives, and these keep no deadline.  MPI knows nothing of streams: the host waits
for what was queued on those that own the arrays, and what MPI has completed may be used on any.  To
reduce, MPI would copy to the host; so does staging, where the copies overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol

from ...arrays.device import DeviceArray
from ...engine.call import Call
from ...runtime.library import MPI, POLL, Steps, exchange_tag, until_all
from ..base import Transport
from ..tuning import Tuning
from .staged import Copies, Done, StagedTransport, copied, device_blocks

Messages = Mapping[int, DeviceArray]  # by the rank at the other end


class Device(Copies, Protocol):
    """A GPU whose memory MPI is given the addresses of."""

    def within(self, source: DeviceArray, into: DeviceArray) -> Done:
        """Start a copy inside the GPU's memory; return a function that says whether it is done."""

    def is_done(self, mark: object) -> bool:
        """Return whether the GPU has passed a mark."""


class AwareTransport(StagedTransport):
    """The collectives of a group whose MPI library takes addresses of GPU memory.

    Args:
        host: moves host memory.
        gpu: this rank's.
        comm: the group's communicator.
        tuning: the same on all ranks of the group.
    """

    name = "cuda-aware"

    def __init__(self, host: Transport, gpu: Device, comm: MPI.Intracomm, tuning: Tuning) -> None:
        super().__init__(host, gpu, tuning)
        self._gpu, self._comm = gpu, comm
        self._whole, self._most = tuning.aware_whole, tuning.aware_message

    def steps(self, call: Call) -> Steps:
        if call.device is None or call.kind.reduces:
            return super().steps(call)
        return self._on_gpu(self._move(call))

    def _on_gpu(self, steps: Steps) -> Steps:
        """Take steps while this rank's GPU is the current one: MPI copies by way of that."""
        thrown: BaseException | None = None
        while True:
            with self._gpu.active():
                try:
                    mood = next(steps) if thrown is None else steps.throw(thrown)
                except StopIteration:
                    return
            thrown = None
            try:
                yield mood
            except BaseException as error:  # thrown in by the engine: no call waits any more
                thrown = error

    def _move(self, call: Call) -> Steps:
        for mark in call.ready:
            while not self._gpu.is_done(mark):
                yield POLL
        for part in call.parts or (call,):
            if part.kind.from_root and not part.kind.parted:
                yield from self._broadcast(part)
            else:
                yield from self._blocks_at_once(part)

    def _broadcast(self, call: Call) -> Steps:
        """Deal out the root's array in even parts, and let each rank pass its own on.

        So no rank sends more than twice the array.  van de Geijn's algorithm (Chan et al.,
        "Collective communication: theory, practice, and experience", 2007).  What is small, or has
        one taker, the root sends as it is.
        """
        (array,) = device_blocks(call.send)
        if self.size == 2 or array.nbytes <= self._whole:
            if self.rank == call.root:
                takers = [rank for rank in range(self.size) if rank != self.rank]
                yield from self._exchange(dict.fromkeys(takers, array), {})
            else:
                yield from self._exchange({}, {call.root: array})
            return
        ends = [i * array.size // self.size for i in range(self.size + 1)]
        parts = [array[start:stop] for start, stop in itertools.pairwise(ends)]
        mine = parts[self.rank]
        others = {rank: part for rank, part in enumerate(parts) if rank != self.rank}
        if self.rank == call.root:
            yield from self._exchange(others, {})
            yield from self._exchange(dict.fromkeys(others, mine), {})
        else:
            yield from self._exchange({}, {call.root: mine})
            listeners = [rank for rank in others if rank != call.root]
            yield from self._exchange(dict.fromkeys(listeners, mine), others)

    def _blocks_at_once(self, call: Call) -> Steps:
        """Send a block to each rank that is to have one, and receive one from each that sends."""
        outgoing, incoming = device_blocks(call.send), device_blocks(call.recv)
        if call.kind.to_root:
            yield from self._exchange({call.root: outgoing[0]}, dict(enumerate(incoming)))
        elif call.kind.from_root:
            yield from self._exchange(dict(enumerate(outgoing)), {call.root: incoming[0]})
        elif len(outgoing) == 1:  # the same to everyone
            sends = dict.fromkeys(range(self.size), outgoing[0])
            yield from self._exchange(sends, dict(enumerate(incoming)))
        else:
            yield from self._exchange(dict(enumerate(outgoing)), dict(enumerate(incoming)))

    def _exchange(self, outgoing: Messages, incoming: Messages) -> Steps:
        """Send and receive; copy this rank's own block, if it has one."""
        tag, requests, copies = exchange_tag(), [], []
        own, place = outgoing.get(self.rank), incoming.get(self.rank)
        if own is None or place is None or own.address == place.address:
            pass  # it has none, or it is in place
        elif own.nbytes:
            copies.append(self._gpu.within(own, place))
        for rank in self._from_here(incoming):
            for piece in _pieces(incoming[rank], self._most):
                requests.append(self._comm.Irecv(piece, rank, tag))
        for rank in self._from_here(outgoing):
            for piece in _pieces(outgoing[rank], self._most):
                requests.append(self._comm.Isend(piece, rank, tag))
        yield from until_all(requests)
        yield from copied(copies)

    def _from_here(self, messages: Messages) -> list[int]:
        """Return the other ranks in an order that begins with the next: not all with the same."""
        others = (rank for rank in messages if rank != self.rank)
        return sorted(others, key=lambda rank: (rank - self.rank) % self.size)


def _pieces(array: DeviceArray, most: int) -> list[list[object]]:
    """Describe an array for MPI, which takes addresses of any memory; nothing if it is empty."""
    stop = array.address + array.nbytes
    return [
        [MPI.buffer.fromaddress(start, min(most, stop - start)), MPI.BYTE]
        for start in range(array.address, stop, most)
    ]
