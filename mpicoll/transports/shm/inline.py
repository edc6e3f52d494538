"""Small data travel inline, beside the records of their call's arrival.

Each rank writes what it gives before it arrives.  Once all have arrived, everything is there to be
read, without a flag.  It stays until the call after the next: by then all ranks have arrived at the
next one, so they are done with this one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...engine.call import UNEVEN, Call
from ...runtime.memory import IN_LINE, READ, NodeMemory
from ..base import pickles
from ..kernels import fold

Array = np.ndarray[Any, Any]

_BYTE = np.dtype(np.uint8)

SHARED_WORK = 3  # ranks from which each reduces its part, where all would be more than READ


class Inline:
    """The room beside the records of a group on one node.

    Args:
        memory: what the ranks of the node share.
        most: bytes of one rank that may travel beside its record.
    """

    def __init__(self, memory: NodeMemory, most: int) -> None:
        self._memory = memory
        self._most = min(most, memory.payload)
        self._most_reduced = min(4 * most, memory.payload)

    def give(self, call: Call, seq: int) -> bool:
        """Write what this rank gives, before it arrives; return whether it may travel so."""
        if not self._fits(call, call.extent):
            return False
        _give(call, seq, self._memory)
        return True

    def take(self, call: Call, seq: int) -> bool:
        """Read what this rank gets, after all have arrived; return whether all travelled so."""
        if not self._fits(call, call.largest):
            return False
        _take(call, seq, self._memory)
        return True

    def _fits(self, call: Call, extent: int) -> bool:
        """Return whether a call is inline, if this is the largest extent of all its ranks."""
        kind = call.kind
        if not kind.inline or call.device is not None or (kind.pairwise and call.count == UNEVEN):
            return False
        if call.reduction is not None:
            nbytes = extent * call.reduction.wire.itemsize
            size = self._memory.size
            return nbytes <= self._most_reduced and (size < SHARED_WORK or nbytes * size <= READ)
        if kind.pickles:
            return extent <= self._most
        blocks = call.send or call.recv
        return blocks is None or extent * blocks.dtype.itemsize <= self._most


def _give(call: Call, seq: int, memory: NodeMemory) -> None:
    send, plan = call.send, call.reduction
    if call.kind.pickles:
        _give_objects(pickles(call), _rooms(call, seq, memory)[memory.rank])
        return
    if send is None or (call.kind.from_root and memory.rank != call.root):
        return
    mine = _rooms(call, seq, memory)[memory.rank]
    if plan is not None and not plan.direct:
        mine[: send.total] = plan.encode(send.flat())
    elif len(send.buffers) == 1:
        mine[: send.total] = send.buffers[0].array
    else:
        for i, start in enumerate(send.displs):
            mine[start : start + send.counts[i]] = send.block(i)


def _take(call: Call, seq: int, memory: NodeMemory) -> None:
    kind, recv, plan, own = call.kind, call.recv, call.reduction, memory.rank
    if kind.pickles:
        call.result = _take_objects(call, own, _rooms(call, seq, memory))
        return
    if recv is None:
        return
    there = _rooms(call, seq, memory)
    if plan is not None:
        start, end = 0, recv.total
        if kind.prefix is not None:
            there = there[: own + kind.prefix]
        elif kind.parted:
            assert call.send is not None
            start = call.send.displs[own]
            end += start
        if there:
            fold(plan, [p[start:end] for p in there], recv.flat())
    elif kind.from_root:
        start = own * recv.total if kind.parted else 0
        np.copyto(recv.flat(), there[call.root][start : start + recv.total])
    else:
        start = own * recv.counts[own] if kind.parted else 0
        for r, count in enumerate(recv.counts):
            recv.block(r)[...] = there[r][start : start + count]


def _rooms(call: Call, seq: int, memory: NodeMemory) -> list[Array]:
    """Return where what the ranks give lies: what is reduced, if it fits, in their lines."""
    plan, blocks = call.reduction, call.send or call.recv
    if plan is None:
        return memory.payloads(seq, _BYTE if blocks is None else blocks.dtype.storage)
    assert blocks is not None
    in_line = blocks.total * plan.wire.itemsize <= IN_LINE
    return (memory.in_lines if in_line else memory.payloads)(seq, plan.wire)


def _give_objects(given: list[bytes], room: Array) -> None:
    """Write pickles: their lengths, then one after the other."""
    data = np.array([len(piece) for piece in given], np.int64).tobytes() + b"".join(given)
    room[: len(data)] = np.frombuffer(data, np.uint8)


def _take_objects(call: Call, own: int, rooms: list[Array]) -> list[bytes]:
    """Read the pickles that this rank gets."""
    kind, size = call.kind, len(rooms)
    if kind.to_root and own != call.root:
        return []
    if kind.from_root:
        rooms = [rooms[call.root]]
    return [_piece(room, own, size) if kind.parted else _piece(room, 0, 1) for room in rooms]


def _piece(room: Array, i: int, count: int) -> bytes:
    """Return the i-th of so many pickles that lie in a room."""
    lengths = room[: 8 * count].view(np.int64)
    start = 8 * count + int(lengths[:i].sum())
    return room[start : start + int(lengths[i])].tobytes()
