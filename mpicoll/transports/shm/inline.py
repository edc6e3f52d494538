"""Small calls ride along with the records of their arrival.

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


def fits(call: Call, extent: int, size: int, most: int) -> bool:
    """Return whether a call rides, if this is the largest extent of all its ranks.

    `most` is the number of bytes of one rank that may ride.
    """
    kind = call.kind
    if not kind.inline or (kind.pairwise and call.count == UNEVEN):
        return False
    if call.reduction is not None:
        nbytes = extent * call.reduction.wire.itemsize
        return nbytes <= most and nbytes * size <= READ
    blocks = call.send or call.recv
    return blocks is None or extent * blocks.dtype.itemsize <= most


def give(call: Call, seq: int, memory: NodeMemory) -> None:
    """Write what this rank gives, before it arrives."""
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


def take(call: Call, seq: int, memory: NodeMemory) -> None:
    """Read what this rank gets, after all have arrived."""
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
