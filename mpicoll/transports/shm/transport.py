"""Collectives through the node's shared memory: copy a chunk in, raise a flag, read the others'.

What reduces is reduced from the slots, in rank order, so that all ranks and all runs get the same
bits.  What only moves goes through smaller places in the slots, where all ranks are compiled.  The
slots are made in the first such call; where there is no room for them, MPI carries out all of them.

A flag counts the rounds of one primitive; `epoch` numbers the primitives, alike on all ranks.
Slots alternate: round c writes where round c - 2 was, which all have read once they have announced
round c - 1.  Arrival separates the calls; inside a call a primitive waits for the one before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays.buffers import Blocks
from ...arrays.dtypes import Reduction
from ...engine.arrival import Arrival, BoardArrival
from ...engine.call import UNEVEN, Call
from ...engine.recorder import Recorder
from ...engine.tasks import GroupState
from ...runtime.library import IDLE, MPI, PROGRESSED, Steps
from ...runtime.memory import SLOT, NodeMemory
from ..kernels import combine, decode, encode, encode_and_fold, fold, late, reducing, spans
from ..messages import SendsMessages
from ..mpi import MpiTransport
from ..tuning import Tuning
from . import core
from .inline import SHARED_WORK
from .rings import RingMemory, RingMessages
from .symmetric import SharedArrays

if TYPE_CHECKING:
    pass

Array = np.ndarray[Any, Any]
Finds = Generator[int, None, "list[Array] | None"]

Method = Callable[["ShmTransport", Call], Steps]

_ROUNDS = 24  # bits of a flag that count rounds
_END = (1 << _ROUNDS) - 1


def through_slots(method: Method) -> Method:
    """Carry out a call so if there are slots, and else by MPI."""

    @functools.wraps(method)
    def steps(self: ShmTransport, call: Call) -> Steps:
        if self._slots is None:
            self._slots = self.size > 1 and (yield from self._memory.add_slots(self._comm))
            if self._slots:
                self._chunks = core.chunks(self._memory)
                self._moves = None
                if self._all_compiled:
                    self._moves = core.moves(self._memory, self._processes)
            if self._core is not None:
                self._core.moves = self._moves
        yield from method(self, call) if self._slots else getattr(self._mpi, method.__name__)(call)

    return steps


class ShmTransport(SendsMessages):
    """The collectives of a group whose ranks share one node's memory."""

    name = "shm"

    def __init__(
        self,
        comm: MPI.Intracomm,
        memory: NodeMemory,
        tuning: Tuning,
        rings: RingMemory | None = None,
    ) -> None:
        messages = None
        if rings is not None and rings.mapping is not None:
            messages = RingMessages(comm, tuning, rings)
        self._mpi = MpiTransport(comm, tuning, messages)
        self.messages = self._mpi.messages
        self._tuning = tuning
        self._memory = memory
        self.rank, self.size = memory.rank, memory.size
        self.epoch = 0
        self._apart = True  # an arrival lies between the last primitive and the next
        self._comm = comm
        self._arrays = SharedArrays()
        self._slots: bool | None = None  # whether there are; None: they were not needed yet
        self._all_compiled = rings is not None
        # Whose memory this rank may read, and they its own.
        self._processes = rings.processes if rings is not None and rings.reads else None
        self._chunks: core.Chunks | None = None
        self._moves: core.Moves | None = None
        self._core: core.Core | None = None

    def release(self, *, together: bool) -> None:
        if self._core is not None:
            self._core.close()
            self._core = None  # which knows this transport
        if self._moves is not None:
            self._moves.close()
        if self._chunks is not None:
            self._chunks.close()
        self.messages.close()
        self._memory.close(together=together)
        self._arrays.close()

    def core(
        self, arrival: Arrival, group_state: GroupState, recorder: Recorder
    ) -> core.Core | None:
        assert isinstance(arrival, BoardArrival)
        self._core = core.make(self, self._memory, self._tuning, arrival, group_state, recorder)
        return self._core

    def steps(self, call: Call) -> Steps:
        self._apart = True
        yield from super().steps(call)

    def _begin(self) -> Steps:
        if not self._apart:
            yield from self._memory.all_seen(self._flag(_END))
        self._apart = False
        self.epoch += 1

    def _flag(self, rounds: int) -> int:
        return (self.epoch << _ROUNDS) + rounds

    def _announce(self, rounds: int) -> None:
        self._memory.announce(self._flag(rounds))

    def _seen(self, rank: int, rounds: int) -> Steps:
        return self._memory.seen(rank, self._flag(rounds))

    def _all_seen(self, rounds: int) -> Steps:
        return self._memory.all_seen(self._flag(rounds))

    # ---- what reduces ----

    @through_slots
    def allreduce(self, call: Call) -> Steps:
        plan, array = reducing(call)
        arrays = yield from self._in_place(plan, array)
        if arrays:
            low, high = _part(array.size, self.rank, self.size)
            for start, end, result in _folded(plan, arrays, low, high):
                for each in arrays:
                    each[start:end] = result
            yield from self._end_in_place()
            return
        yield from self._begin()
        if self.size >= SHARED_WORK or late(plan):
            yield from self._allreduce_shared(call, plan, array)
        else:
            yield from self._in_chunks(call, plan, array, self.size)

    def _compiled(
        self, method: str, call: Call, array: Array, *more: object
    ) -> Callable[[int], int] | None:
        """Return what takes a call on from a chunk in compiled code, and says how far; or None."""
        assert call.dtype is not None
        op = -1 if call.op is None else call.op.code  # none: a part of a call across nodes
        what = array, call.dtype.code, op
        if self._chunks is None or not self._chunks.knows(*what):
            return None
        return functools.partial(getattr(self._chunks, method), self._flag(0), *what, *more)

    def _in_chunks(self, call: Call, plan: Reduction, array: Array, upto: int) -> Steps:
        """Reduce the first `upto` ranks' arrays, chunk by chunk, in place; of none: leave it."""
        chunks = spans(array.size, SLOT // plan.wire.itemsize)
        for c in _left_over(len(chunks), self._compiled("fold", call, array, upto)):
            start, end = chunks[c]
            slots = self._memory.slots(c, plan.wire)
            encode(plan, array[start:end], slots[self.rank][: end - start])
            self._announce(c + 1)
            yield from self._all_seen(c + 1)
            if upto:
                fold(plan, [s[: end - start] for s in slots[:upto]], array[start:end])
        self._announce(_END)

    def _allreduce_shared(self, call: Call, plan: Reduction, array: Array) -> Steps:
        """Each rank reduces its part of a chunk; all gather the parts: a chunk has two halves."""
        is_late = late(plan)
        kind = array.dtype if is_late else plan.wire
        chunks = spans(array.size, SLOT // kind.itemsize)
        for half in _left_over(2 * len(chunks), self._compiled("share", call, array)):
            start, end = chunks[half // 2]
            n, slots = end - start, self._memory.slots(half // 2, kind)
            if half % 2 == 0:
                mine = slots[self.rank]
                if is_late:
                    mine[:n] = array[start:end]
                else:
                    encode(plan, array[start:end], mine[:n])
                self._announce(half + 1)
                yield from self._all_seen(half + 1)
                low, high = _part(n, self.rank, self.size)
                part = np.empty(high - low, kind)
                reduce = encode_and_fold if is_late else combine
                reduce(plan, [s[low:high] for s in slots], part)
                mine[low:high] = part
                self._announce(half + 2)
                continue
            yield from self._all_seen(half + 1)
            for r in range(self.size):
                low, high = _part(n, r, self.size)
                into = array[start + low : start + high]
                if is_late:
                    into[...] = slots[r][low:high]
                else:
                    decode(plan, slots[r][low:high], into)
        self._announce(_END)

    @through_slots
    def reduce(self, call: Call) -> Steps:
        plan, array = reducing(call)
        arrays = yield from self._in_place(plan, array)
        if arrays:
            if self.rank == call.root:
                for start, end, result in _folded(plan, arrays, 0, array.size):
                    array[start:end] = result
            yield from self._end_in_place()
            return
        yield from self._begin()
        chunks = spans(array.size, SLOT // plan.wire.itemsize)
        for c in _left_over(len(chunks), self._compiled("reduce", call, array, call.root)):
            start, end = chunks[c]
            slots = [s[: end - start] for s in self._memory.slots(c, plan.wire)]
            if self.rank == call.root:
                if (
                    plan.direct and self.rank < 2
                ):  # an operand of the first step: it is read in time
                    slots[self.rank] = array[start:end]
                else:
                    encode(plan, array[start:end], slots[self.rank])
                yield from self._all_seen(c + 1)
                fold(plan, slots, array[start:end])
            else:
                if c >= 2:
                    yield from self._seen(call.root, c - 1)
                encode(plan, array[start:end], slots[self.rank])
            self._announce(c + 1)
        self._announce(_END)

    @through_slots
    def reduce_scatter(self, call: Call) -> Steps:
        plan = call.reduction
        assert plan is not None and call.send is not None and call.recv is not None
        send, out = call.send, call.recv.flat()
        arrays = yield from self._in_place(plan, send.flat() if len(send.buffers) == 1 else None)
        if arrays:
            low = send.displs[self.rank]
            for start, end, result in _folded(plan, arrays, low, low + out.size):
                out[start - low : end - low] = result
            yield from self._end_in_place()
            return
        is_late = late(plan)
        kind = out.dtype if is_late else plan.wire
        room = SLOT // kind.itemsize // self.size
        yield from self._begin()
        compiled = None
        if len(send.buffers) == 1 and call.count != UNEVEN:
            compiled = self._compiled("scatter", call, send.flat(), out)
        for c in _left_over(_rounds(max(send.counts), room), compiled):
            slots = self._memory.slots(c, kind)
            for j in range(self.size):
                piece = send.block(j)[c * room : (c + 1) * room]
                into = slots[self.rank][j * room :][: piece.size]
                if is_late:
                    into[...] = piece
                elif piece.size:
                    encode(plan, piece, into)
            self._announce(c + 1)
            yield from self._all_seen(c + 1)
            mine = out[c * room : (c + 1) * room]
            if mine.size:
                reduce = encode_and_fold if is_late else fold
                reduce(plan, [s[self.rank * room :][: mine.size] for s in slots], mine)
        self._announce(_END)

    # ---- what reduces where it lies: in arrays that all ranks made by `empty` together ----

    def empty(self, call: Call) -> Steps:
        call.result = yield from self._arrays.make(self._comm, call.count)
        if call.result is None:
            yield from super().empty(call)

    def _in_place(self, plan: Reduction, array: Array | None) -> Finds:
        """Return all ranks' arrays, if each gave its part of one shared array; else None."""
        if not (self._arrays.made and plan.direct):
            return None
        yield from self._begin()
        slots = self._memory.slots(0, np.dtype(np.int64))
        slots[self.rank][:2] = (0, 0) if array is None else self._arrays.find(array, self.rank)
        self._announce(1)
        yield from self._all_seen(1)
        numbers = {int(slot[0]) for slot in slots}
        offsets = [int(slot[1]) for slot in slots]
        if numbers == {0} or len(numbers) > 1:
            self._announce(_END)
            return None
        assert array is not None
        return self._arrays.views(numbers.pop(), offsets, array)

    def _end_in_place(self) -> Steps:
        self._announce(_END)
        yield from self._all_seen(_END)  # until then the peers use our array

    @through_slots
    def scan(self, call: Call) -> Steps:
        plan, array = reducing(call)
        yield from self._begin()
        yield from self._in_chunks(call, plan, array, self.rank + 1)

    @through_slots
    def exscan(self, call: Call) -> Steps:
        plan, array = reducing(call)
        yield from self._begin()
        yield from self._in_chunks(call, plan, array, self.rank)

    # ---- what only moves ----

    @through_slots
    def broadcast(self, call: Call) -> Steps:
        blocks = call.send if call.send is not None else call.recv
        assert blocks is not None
        if self._moves is not None:
            yield from self._move(call)
            return
        array = blocks.flat().view(np.uint8)
        yield from self._begin()
        for c, (start, end) in enumerate(spans(array.size, SLOT)):
            slot = self._memory.slots(c, array.dtype)[call.root][: end - start]
            if self.rank == call.root:
                if c >= 2:
                    yield from self._all_seen(c - 1)
                slot[...] = array[start:end]
            else:
                yield from self._seen(call.root, c + 1)
                array[start:end] = slot
            self._announce(c + 1)
        self._announce(_END)

    @through_slots
    def allgather(self, call: Call) -> Steps:
        assert call.send is not None and call.recv is not None
        if self._moves is not None:
            yield from self._move(call)
            return
        mine, blocks = _octets(call.send)[0], _octets(call.recv)
        yield from self._begin()
        for c in range(_rounds(max(b.size for b in blocks), SLOT)):
            slots = self._memory.slots(c, mine.dtype)
            piece = mine[c * SLOT : (c + 1) * SLOT]
            slots[self.rank][: piece.size] = piece
            self._announce(c + 1)
            if not call.in_place:
                blocks[self.rank][c * SLOT : (c + 1) * SLOT] = piece
            for r in self._memory.peers:
                into = blocks[r][c * SLOT : (c + 1) * SLOT]
                yield from self._seen(r, c + 1)
                into[...] = slots[r][: into.size]
        self._announce(_END)

    @through_slots
    def gather(self, call: Call) -> Steps:
        if self._moves is not None:
            yield from self._move(call)
            return
        assert call.send is not None
        mine = _octets(call.send)[0]
        yield from self._begin()
        if call.recv is None:
            for c, (start, end) in enumerate(spans(mine.size, SLOT)):
                if c >= 2:
                    yield from self._seen(call.root, c - 1)
                self._memory.slots(c, mine.dtype)[self.rank][: end - start] = mine[start:end]
                self._announce(c + 1)
        else:
            blocks = _octets(call.recv)
            if not call.in_place:
                blocks[self.rank][...] = mine
            for c in range(_rounds(max(b.size for b in blocks), SLOT)):
                slots = self._memory.slots(c, mine.dtype)
                for r in self._memory.peers:
                    into = blocks[r][c * SLOT : (c + 1) * SLOT]
                    if into.size:
                        yield from self._seen(r, c + 1)
                        into[...] = slots[r][: into.size]
                self._announce(c + 1)
        self._announce(_END)

    @through_slots
    def scatter(self, call: Call) -> Steps:
        if self._moves is not None:
            yield from self._move(call)
            return
        assert call.recv is not None
        into = _octets(call.recv)[0]
        room = SLOT // self.size
        yield from self._begin()
        if call.send is None:
            for c, (start, end) in enumerate(spans(into.size, room)):
                yield from self._seen(call.root, c + 1)
                slot = self._memory.slots(c, into.dtype)[call.root]
                into[start:end] = slot[self.rank * room :][: end - start]
                self._announce(c + 1)
        else:
            blocks = _octets(call.send)
            if not call.in_place:
                into[...] = blocks[self.rank]
            for c in range(_rounds(max(b.size for b in blocks), room)):
                slot = self._memory.slots(c, into.dtype)[self.rank]
                for r in self._memory.peers:
                    piece = blocks[r][c * room : (c + 1) * room]
                    if piece.size:
                        if c >= 2:
                            yield from self._seen(r, c - 1)
                        slot[r * room :][: piece.size] = piece
                self._announce(c + 1)
        self._announce(_END)

    @through_slots
    def alltoall(self, call: Call) -> Steps:
        if self._moves is not None:
            yield from self._move(call)
            return
        assert call.send is not None and call.recv is not None
        sends, recvs = _octets(call.send), _octets(call.recv)
        room = SLOT // self.size
        longest = max(b.size for r in self._memory.peers for b in (sends[r], recvs[r]))
        if not call.in_place:
            recvs[self.rank][...] = sends[self.rank]
        yield from self._begin()
        for c in range(_rounds(longest, room)):
            slots = self._memory.slots(c, recvs[0].dtype)
            for r in self._memory.peers:
                piece = sends[r][c * room : (c + 1) * room]
                if piece.size:
                    if c >= 2:
                        yield from self._seen(r, c)  # it has read round c - 2
                    slots[self.rank][r * room :][: piece.size] = piece
            self._announce(c + 1)
            for r in self._memory.peers:
                into = recvs[r][c * room : (c + 1) * room]
                if into.size:
                    yield from self._seen(r, c + 1)
                    into[...] = slots[r][self.rank * room :][: into.size]
        self._announce(_END)

    def _move(self, call: Call) -> Steps:
        """Move blocks through the slots in compiled code, which all ranks have."""
        moves, kind, own, root = self._moves, call.kind, self.rank, call.root
        assert moves is not None
        from_other = kind.from_root and own != root
        gives = [] if call.send is None or from_other else _octets(call.send)
        into = [] if call.recv is None else _octets(call.recv)
        takes: list[Array | None] = [None] * self.size  # by the rank that gives it
        if from_other:
            takes[root] = into[0]
        elif into:
            takes = [*into] if not kind.from_root else takes
            if call.in_place:
                takes[own] = None
            elif kind.parted and kind.from_root:
                takes[own] = into[0]
        if not moves.goes_on():  # with what the core has begun
            yield from self._begin()
            only, nbytes = root if kind.to_root else -1, call.largest * _itemsize(call)
            even = kind.parted or not (kind.from_root or kind.to_root)
            moves.begin(self._flag(0), gives, takes, kind.parted, only, even, nbytes)
        while (found := moves.advance()) >= 0:
            yield PROGRESSED if found else IDLE
        self._announce(_END)


def _left_over(count: int, compiled: Callable[[int], int] | None) -> Iterator[int]:
    """Yield the chunks that are left to the steps: where a peer is late, or a result is NaN."""
    c = 0
    while c < count:
        if compiled is not None:
            c = compiled(c)
        if c < count:
            yield c
        c += 1


def _rounds(count: int, room: int) -> int:
    return -(-count // room)


def _itemsize(call: Call) -> int:
    blocks = call.send if call.send is not None else call.recv
    assert blocks is not None
    return blocks.dtype.itemsize


def _octets(blocks: Blocks) -> list[Array]:
    return [blocks.block(i).view(np.uint8) for i in range(len(blocks.counts))]


def _part(count: int, rank: int, size: int) -> tuple[int, int]:
    return count * rank // size, count * (rank + 1) // size


def _folded(
    plan: Reduction, arrays: list[Array], low: int, high: int
) -> Iterator[tuple[int, int, Array]]:
    """Reduce a range of all ranks' arrays, piece by piece in the cache; yield bounds and result."""
    scratch = np.empty(SLOT // plan.wire.itemsize, plan.wire)
    for first, last in spans(high - low, scratch.size):
        start, end = low + first, low + last
        combine(plan, [a[start:end] for a in arrays], scratch[: end - start])
        yield start, end, scratch[: end - start]
