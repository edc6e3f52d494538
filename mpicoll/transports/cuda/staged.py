"""Collectives on GPU memory by way of the host: pinned rooms, and the host transport below.

An array goes in pieces.  While the host transport moves one, the next is copied to the host and
the one before back to the GPU, so the slowest of the three sets the pace.  A call is done when its
last piece is in GPU memory.  Calls on host arrays go to the host transport as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from ...arrays.buffers import Blocks, Buffer, DeviceBuffer
from ...arrays.device import UNKNOWN, DeviceArray
from ...arrays.dtypes import DType
from ...engine.arrival import Arrival
from ...engine.call import UNEVEN, Call, Message, digest
from ...engine.recorder import Recorder
from ...engine.tasks import Expired, GroupState
from ...errors import InvalidCallError, TransportError, UnsupportedError
from ...runtime.library import POLL, Steps
from ..base import Transport
from ..tuning import Tuning

if TYPE_CHECKING:
    from ..shm._native import Core, Rings

Array = np.ndarray[Any, Any]
Done = Callable[[], bool]

ROOMS = 3  # pieces under way: one comes from the GPU, one is moved, one goes back

ON_GPU = digest(*b"GPU")  # in the digests of calls on GPU memory

_IN, _OUT = 0, 1  # uses of a room


class Copies(Protocol):
    """Copies between one GPU's memory and the host's, in the background.

    Attributes:
        device: the GPU's number.
    """

    device: int

    def active(self) -> AbstractContextManager[object]:
        """Make it the current GPU in a with-block."""

    def pinned(self, nbytes: int) -> Array:
        """Return new host memory that can be copied in the background."""

    def device_of(self, address: int) -> int:
        """Return the number of the GPU that holds an address."""

    def is_capturing(self, stream: int) -> bool:
        """Return whether a stream captures a CUDA graph; inside `active`."""

    def mark(self, stream: int) -> object:
        """Note what has been queued on a stream by now; inside `active`."""

    def after(self, mark: object) -> None:
        """Let the copies that are started from now on come after what a mark has noted."""

    def to_host(self, source: DeviceArray, into: Array) -> Done:
        """Start a copy; return a function that says whether it is done."""

    def to_device(self, source: Array, into: DeviceArray) -> Done:
        """Start a copy; return a function that says whether it is done."""


class StagedTransport(Transport):
    """The collectives of a group whose arrays lie in GPU memory, or in the host's.

    Args:
        host: moves host memory.
        copies: moves between that and the GPU's.
        tuning: the same on all ranks of the group.
    """

    name = "staged"

    def __init__(self, host: Transport, copies: Copies, tuning: Tuning) -> None:
        self._host = host
        self._copies = copies
        self._piece = tuning.staged_piece
        self.rank, self.size = host.rank, host.size
        self._rooms: dict[tuple[int, int], Array] = {}
        self._spare: list[Array] = []  # rooms for whole messages
        self._sends = 0  # messages that were to be sent
        self._posted = 0  # of these, how many the host transport has been given

    def release(self, *, together: bool) -> None:
        self._rooms.clear()
        self._spare.clear()
        self._host.release(together=together)

    # ---- what is seen at the call, and what goes to the host transport as it is ----

    def admit(self, call: Call) -> None:
        """Note what is queued on the streams that own the arrays: the copies come after it.

        Raises:
            InvalidCallError: an array lies on another GPU than this rank's.
            UnsupportedError: its stream captures a CUDA graph, and the host takes part in the call.
        """
        with self._copies.active():
            call.ready = self._marks(call)
        for part in call.parts:
            part.ready = call.ready
        call.digest ^= ON_GPU  # peers must not give host arrays to this call

    def _marks(self, call: Call) -> tuple[object, ...]:
        copies, marks = self._copies, {}
        for buffer in call.buffers():
            assert isinstance(buffer, DeviceBuffer)
            if not buffer.nbytes:
                continue
            at = buffer.device
            if at == UNKNOWN:
                at = copies.device_of(buffer.address)
            if at != copies.device:
                raise InvalidCallError(
                    f"{buffer.name} lies on GPU {at}, but this rank's part of the group is on GPU "
                    f"{copies.device}: copy it there, or make the group with "
                    f'new_group(device="cuda:{at}") on this rank'
                )
            stream = buffer.stream
            if stream not in marks:
                if copies.is_capturing(stream):
                    call.captured = self._can_be_captured(call)
                marks[stream] = copies.mark(stream)
        return tuple(marks.values())

    def _can_be_captured(self, call: Call) -> bool:
        raise UnsupportedError(
            f"{call.describe()} can't be captured in a CUDA graph, as the host takes part in it: "
            "call it outside of the graph"
        )

    def core(self, arrival: Arrival, group_state: GroupState, recorder: Recorder) -> Core | None:
        return self._host.core(arrival, group_state, recorder)

    def rings(self, state: GroupState, recorder: Recorder) -> Rings | None:
        return self._host.rings(state, recorder)

    def empty(self, call: Call) -> Steps:
        return self._host.empty(call)

    def steps(self, call: Call) -> Steps:
        return self._host.steps(call) if call.device is None else super().steps(call)

    # ---- what works on one array, element by element ----

    def allreduce(self, call: Call) -> Steps:
        return self._element_wise(call, self._host.allreduce)

    def broadcast(self, call: Call) -> Steps:
        return self._element_wise(call, self._host.broadcast)

    def reduce(self, call: Call) -> Steps:
        return self._element_wise(call, self._host.reduce)

    def scan(self, call: Call) -> Steps:
        return self._element_wise(call, self._host.scan)

    def exscan(self, call: Call) -> Steps:
        return self._element_wise(call, self._host.exscan)

    def _element_wise(self, call: Call, move: Callable[[Call], Steps]) -> Steps:
        """Let the host transport do the same call, piece by piece."""
        if call.device is None:
            yield from move(call)
            return
        assert call.send is not None
        reads = None if call.kind.from_root and self.rank != call.root else call.send
        room = self._piece // call.send.dtype.itemsize
        pieces = _Pieces(call.send, room)

        def inner(k: int) -> Call:
            blocks = self._blocks(_IN, k, pieces)
            return Call(call.kind, blocks, blocks, count=blocks.total)

        yield from self._pipeline(call, move, -(-pieces.longest // room), reads, inner, room)

    # ---- what has a block for each rank ----

    def allgather(self, call: Call) -> Steps:
        return self._block_wise(call, self._host.allgather)

    def gather(self, call: Call) -> Steps:
        return self._block_wise(call, self._host.gather)

    def scatter(self, call: Call) -> Steps:
        return self._block_wise(call, self._host.scatter)

    def reduce_scatter(self, call: Call) -> Steps:
        return self._block_wise(call, self._host.reduce_scatter)

    def alltoall(self, call: Call) -> Steps:
        return self._block_wise(call, self._host.alltoall)

    def _block_wise(self, call: Call, move: Callable[[Call], Steps]) -> Steps:
        """Let the host transport do the same call in rounds, each with a piece of every block."""
        if call.device is None:
            yield from move(call)
            return
        assert call.dtype is not None
        room = max(1, self._piece // call.dtype.itemsize // self.size)
        send = None if call.send is None else _Pieces(call.send, room)
        recv = None if call.recv is None else _Pieces(call.recv, room)
        counts = _common_counts(call)

        def inner(k: int) -> Call:
            made = Call(
                call.kind,
                None if send is None else self._blocks(_IN, k, send),
                None if recv is None else self._blocks(_OUT, k, recv),
                count=UNEVEN,
            )
            made.largest = room * self.size
            if counts is not None and len(set(counts)) == 1:
                made.count = max(0, min(room, counts[0] - k * room))
            return made

        longest = call.largest if counts is None else max(counts)
        yield from self._pipeline(call, move, -(-longest // room), call.send, inner, room)

    # ---- what these are made of ----

    def _pipeline(
        self,
        call: Call,
        move: Callable[[Call], Steps],
        rounds: int,
        reads: Blocks | None,
        inner: Callable[[int], Call],
        room: int,
    ) -> Steps:
        """Copy each round's pieces to the host, have them moved, and copy what came back.

        The number of rounds is the same on all ranks.
        """
        self._order(call)
        leaving: list[list[Done]] = [[] for _ in range(ROOMS)]
        coming = self._load(reads, 0, room) if rounds else []
        for k in range(rounds):
            yield from copied(coming)
            # The next piece comes into the rooms of the piece that left ROOMS rounds before.
            yield from copied(leaving[(k + 1) % ROOMS])
            coming = self._load(reads, k + 1, room) if k + 1 < rounds else []
            made = inner(k)
            made.op, made.reduction, made.root = call.op, call.reduction, call.root
            made.largest = made.largest or made.extent
            yield from move(made)
            leaving[k % ROOMS] = self._store(made, call.recv, k, room)
        for copies in leaving:
            yield from copied(copies)

    def _order(self, call: Call) -> None:
        """Let the copies come after the work that was queued at the call on the arrays' streams."""
        for mark in call.ready:
            self._copies.after(mark)

    def _load(self, blocks: Blocks | None, k: int, room: int) -> list[Done]:
        if blocks is None:
            return []
        into, at, started = self._room(_IN, k), 0, []
        for piece in _in_runs(_Pieces(blocks, room).of(k)):
            started.append(self._copies.to_host(piece, into[at : at + piece.nbytes]))
            at += piece.nbytes
        return started

    def _store(self, made: Call, blocks: Blocks | None, k: int, room: int) -> list[Done]:
        if blocks is None:
            return []
        assert made.recv is not None
        source, at, started = made.recv.flat().view(np.uint8), 0, []
        for piece in _in_runs(_Pieces(blocks, room).of(k)):
            started.append(self._copies.to_device(source[at : at + piece.nbytes], piece))
            at += piece.nbytes
        return started

    def _room(self, use: int, k: int) -> Array:
        key = use, k % ROOMS
        if key not in self._rooms:
            # Each block may have one element where there are more ranks than fit in a piece.
            self._rooms[key] = self._copies.pinned(max(self._piece, 32 * self.size))
        return self._rooms[key]

    def _blocks(self, use: int, k: int, pieces: _Pieces) -> Blocks:
        """Describe a round's pieces where they lie in a room, one after the other."""
        counts = pieces.counts(k)
        return Blocks.split(_host_buffer(self._room(use, k), pieces.dtype, sum(counts)), counts)

    # ---- point to point: whole messages, since their sizes are compared where they meet ----

    def send(self, call: Call) -> Steps:
        turn, inner = self._sends, call
        self._sends += 1
        room = None
        if call.device is not None:
            assert call.send is not None
            self._order(call)
            room = self._take(call.send.nbytes)
            buffer = _host_buffer(room, call.send.dtype, call.send.total)
            inner = _message(call, Blocks.single(buffer), None)
            if buffer.nbytes:
                source = _block(call.send, 0)
                yield from copied([self._copies.to_host(source, room[: buffer.nbytes])])
        while self._posted != turn:  # messages go in the order of the calls
            yield POLL
        self._posted += 1
        yield from self._host.send(inner)
        if room is not None:
            self._spare.append(room)

    def probe(self, peer: int, tag: int) -> Message | None:
        return self._host.probe(peer, tag)

    def clear(self, state: GroupState) -> Steps:
        while self._posted != self._sends:
            yield POLL
        yield from self._host.clear(state)

    def recv(self, call: Call) -> Steps:
        if call.device is None:
            yield from self._host.recv(call)
            return
        assert call.recv is not None
        room = self._take(call.recv.nbytes)
        buffer = _host_buffer(room, call.recv.dtype, call.recv.total)
        inner = _message(call, None, Blocks.single(buffer))
        yield from self._host.recv(inner)
        call.result = inner.result
        if buffer.nbytes:
            self._order(call)
            landed = self._copies.to_device(room[: buffer.nbytes], _block(call.recv, 0))
            try:
                yield from copied([landed])
            except Expired:
                raise TransportError(
                    "the message was taken in time, but its copy to the GPU was not: it comes "
                    "after what was queued before on the array's stream"
                ) from None
        self._spare.append(room)

    def _take(self, nbytes: int) -> Array:
        """Return a room for a whole message: one that is spare, or a new one."""
        for i, room in enumerate(self._spare):
            if room.nbytes >= nbytes:
                return self._spare.pop(i)
        return self._copies.pinned(max(4096, 1 << (nbytes - 1).bit_length()))


class _Pieces:
    """Blocks cut for rounds: each takes up to `room` elements of every block."""

    def __init__(self, blocks: Blocks, room: int) -> None:
        self._blocks, self._room = blocks, room
        self.dtype = blocks.dtype
        self.longest = max(blocks.counts)

    def counts(self, k: int) -> tuple[int, ...]:
        room = self._room
        return tuple(max(0, min(room, count - k * room)) for count in self._blocks.counts)

    def of(self, k: int) -> Iterator[DeviceArray]:
        for i in range(len(self._blocks.counts)):
            piece = _block(self._blocks, i)[k * self._room : (k + 1) * self._room]
            if piece.size:
                yield piece


def _in_runs(pieces: Iterator[DeviceArray]) -> Iterator[DeviceArray]:
    """Join pieces that lie one after the other, as one copy is cheaper than several."""
    run: DeviceArray | None = None
    for piece in pieces:
        if run is not None and run.address + run.nbytes == piece.address:
            run = DeviceArray(run.address, run.size + piece.size, run.dtype)
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run


def device_blocks(blocks: Blocks | None) -> list[DeviceArray]:
    """Return the blocks of a call's part, which lie in GPU memory."""
    if blocks is None:
        return []
    if len(blocks.counts) == 1:
        return [blocks.flat()]  # type: ignore[list-item]
    return [_block(blocks, i) for i in range(len(blocks.counts))]


def _block(blocks: Blocks, i: int) -> DeviceArray:
    return cast(DeviceArray, blocks.block(i))


def _host_buffer(room: Array, dtype: DType, count: int) -> Buffer:
    array = room[: count * dtype.itemsize].view(dtype.storage)
    return Buffer(room, array, dtype, (count,), True)


def _message(call: Call, send: Blocks | None, recv: Blocks | None) -> Call:
    """Make the same send or receive on host memory."""
    return Call(call.kind, send, recv, peer=call.peer, tag=call.tag, count=call.count)


def _common_counts(call: Call) -> tuple[int, ...] | None:
    """Return the counts of the call's blocks where all ranks know them alike."""
    if call.kind.pairwise:
        return None if call.count == UNEVEN else (call.count,)
    blocks = call.send if call.kind.reduces else call.recv
    assert blocks is not None
    return blocks.counts


def copied(copies: list[Done]) -> Steps:
    """Wait for copies."""
    for done in copies:
        while not done():
            yield POLL
