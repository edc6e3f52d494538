"""Small data travel inline, beside the records of their call's arrival.

Each rank writes what it gives before it arrives.  Once all have arrived, everything is there to be
read, without a flag.  It stays until the call after the next: by then all ranks have arrived at the
next one, so they are done with this one.
"""

from __future__ import annotations

import numpy as np

from ...engine.call import UNEVEN, Call
from ...runtime.memory import NodeMemory
from ..kernels import fold

READ = 2**20  # bytes that one rank reads at most to reduce alone; beyond, sharing the work pays


class Inline:
    """The room beside the records of a group on one node.

    Args:
        memory: what the ranks of the node share.
        most: bytes of one rank that may travel beside its record.
    """

    def __init__(self, memory: NodeMemory, most: int) -> None:
        self._memory = memory
        self._most = most

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
            return nbytes <= self._most and nbytes * self._memory.size <= READ
        blocks = call.send or call.recv
        return blocks is None or extent * blocks.dtype.itemsize <= self._most


def _give(call: Call, seq: int, memory: NodeMemory) -> None:
    send, plan = call.send, call.reduction
    if send is None or (call.kind.from_root and memory.rank != call.root):
        return
    mine = memory.payloads(seq, send.dtype.storage if plan is None else plan.wire)[memory.rank]
    if plan is not None and not plan.direct:
        mine[: send.total] = plan.encode(send.flat())
    elif len(send.buffers) == 1:
        mine[: send.total] = send.buffers[0].array
    else:
        for i, start in enumerate(send.displs):
            mine[start : start + send.counts[i]] = send.block(i)


def _take(call: Call, seq: int, memory: NodeMemory) -> None:
    kind, recv, plan, own = call.kind, call.recv, call.reduction, memory.rank
    if recv is None:
        return
    there = memory.payloads(seq, recv.dtype.storage if plan is None else plan.wire)
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
