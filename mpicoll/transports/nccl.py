"""Collectives on GPU memory by NCCL; what it can't do as promised goes through the host.

A call is enqueued on the group's stream once all ranks have arrived: after the work that its
arrays' streams were given before the call, and before what is queued after `wait()`.  The steps go
on until the GPU has passed it, so that the deadline holds and the arrays live; the next call of the
group need not wait for that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, cast

from ..buffers import DeviceBuffer
from ..calls import Call
from ..cuda_arrays import DeviceArray
from ..dtypes import DType
from ..library import IDLE, MOVED, Steps
from ..ops import ReduceOp
from .base import Transport
from .staged import Copies, StagedTransport, device_blocks

BYTES = 1  # the NCCL type in which everything is moved: uint8

TYPES = {
    "int8": 0, "uint8": 1, "int32": 2, "uint32": 3, "int64": 4, "uint64": 5,
    "float16": 6, "float32": 7, "float64": 8, "bfloat16": 9,
}  # fmt: skip
SUM, PROD, MAX, MIN, AVG = range(5)

_COMPLEX = {"complex64": "float32", "complex128": "float64"}
_INTEGER_OPS = {"SUM": SUM, "PRODUCT": PROD, "MIN": MIN, "MAX": MAX}
# Not MIN and MAX: NCCL leaves to chance what becomes of NaN.
_FLOAT_OPS = {"SUM": SUM, "PRODUCT": PROD, "AVG": AVG, "PREMUL_SUM": SUM}


@dataclass(frozen=True, slots=True)
class Rule:
    """How NCCL reduces one dtype under one operator.

    Attributes:
        kind: NCCL's number of the type.
        op: NCCL's number of the operator.
        each: elements of that type in one of the array's.
        factor: what this rank's elements are multiplied by first, if anything.
    """

    kind: int
    op: int
    each: int = 1
    factor: float | None = None


def rule(dtype: DType, op: ReduceOp) -> Rule | None:
    """Return how NCCL reduces, or None: it can't, or not as promised.  Alike on all ranks."""
    if dtype.name in _COMPLEX:
        return Rule(TYPES[_COMPLEX[dtype.name]], SUM, 2) if op.name == "SUM" else None
    if dtype.name not in TYPES:
        return None
    known = _FLOAT_OPS if "float" in dtype.name else _INTEGER_OPS
    if op.name not in known:
        return None
    if op.factor is None:
        return Rule(TYPES[dtype.name], known[op.name])
    if dtype.name not in ("float32", "float64"):  # in half precision the product would be rounded
        return None
    return Rule(TYPES[dtype.name], SUM, factor=cast(float, op.factor))


class Queue(Copies, Protocol):
    """A GPU with a stream that NCCL works on.

    Attributes:
        queue: CUDA's handle of that stream.
    """

    queue: int

    def nccl_group(self) -> AbstractContextManager[object]:
        """Make all calls of NCCL in a with-block one."""

    def queue_after(self, mark: object) -> None:
        """Let what is queued from now on come after what a mark has noted."""

    def is_done(self, mark: object) -> bool:
        """Return whether the GPU has passed a mark."""

    def hold(self, mark: object, streams: Iterable[int]) -> None:
        """Let these streams, and the current ones, wait for a mark; the host goes on."""

    def scaled(self, array: DeviceArray, factor: float) -> tuple[DeviceArray, object]:
        """Queue a product; return where it will be, and what keeps that memory."""


class Nccl(Protocol):
    """A communicator of `cupy.cuda.nccl`."""

    def allReduce(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None: ...
    def reduce(
        self, src: int, dst: int, n: int, kind: int, op: int, root: int, stream: int
    ) -> None: ...
    def broadcast(self, src: int, dst: int, n: int, kind: int, root: int, stream: int) -> None: ...
    def reduceScatter(
        self, src: int, dst: int, n: int, kind: int, op: int, stream: int
    ) -> None: ...
    def allGather(self, src: int, dst: int, n: int, kind: int, stream: int) -> None: ...
    def send(self, src: int, n: int, kind: int, peer: int, stream: int) -> None: ...
    def recv(self, dst: int, n: int, kind: int, peer: int, stream: int) -> None: ...
    def commSplit(self, color: int, key: int) -> Nccl | None: ...
    def check_async_error(self) -> None: ...
    def abort(self) -> None: ...
    def destroy(self) -> None: ...


class Enqueued:
    """A call that is on the group's stream."""

    def __init__(self, gpu: Queue, mark: object, streams: set[int]) -> None:
        self._gpu, self._mark, self._streams = gpu, mark, streams
        self.waited = False

    def hold(self) -> None:
        """Let the user's streams wait for the call."""
        self._gpu.hold(self._mark, self._streams)
        self.waited = True


class NcclTransport(StagedTransport):
    """The collectives of a group whose ranks have a GPU each.

    Args:
        host: moves host memory.
        gpu: this rank's.
        nccl: the communicator of the group's ranks.
    """

    name = "nccl"
    watched = True

    def __init__(self, host: Transport, gpu: Queue, nccl: Nccl) -> None:
        super().__init__(host, gpu)
        self._gpu, self._nccl = gpu, nccl

    def steps(self, call: Call) -> Steps:
        parts = call.parts or (call,)
        if call.device is None or not all(map(_does, parts)):
            return super().steps(call)
        return self._enqueue(call, parts)

    def close(self) -> None:
        self._nccl.destroy()

    def abort(self) -> None:
        self._nccl.abort()  # its kernels would wait for the peers for ever, and so would its end

    def _enqueue(self, call: Call, parts: tuple[Call, ...]) -> Steps:
        gpu, streams = self._gpu, set()
        for buffer in call.buffers():
            assert isinstance(buffer, DeviceBuffer)
            if buffer.ready is not None:
                streams.add(buffer.stream)
                gpu.queue_after(buffer.ready)
        try:
            scaled = [self._scale(part) for part in parts]  # kept until the GPU has passed the call
            with gpu.nccl_group():
                for part, (sources, _) in zip(parts, scaled, strict=True):
                    enqueue: Callable[[Call, list[DeviceArray]], None]
                    enqueue = getattr(self, f"_{_SAME_AS.get(part.kind, part.kind)}")
                    enqueue(part, sources)
            mark = gpu.mark(gpu.queue)
            call.enqueued = Enqueued(gpu, mark, streams)
            yield MOVED  # the engine sees that it is enqueued
            while not gpu.is_done(mark):
                self._nccl.check_async_error()
                yield IDLE
        except BaseException:  # given up, or an error
            self.abort()
            raise

    def _scale(self, call: Call) -> tuple[list[DeviceArray], list[object]]:
        """Return what NCCL is to read of each block: the user's memory, or products of it."""
        sources = device_blocks(call.send)
        factor = None if call.op is None else _rule(call).factor
        if factor is None:
            return sources, []
        scaled = [self._gpu.scaled(x, factor) if x.size else (x, None) for x in sources]
        return [x for x, _ in scaled], [keeper for _, keeper in scaled]

    # ---- one method per kind: calls that become one, on the group's stream ----

    def _allreduce(self, call: Call, sources: list[DeviceArray]) -> None:
        r, into = _rule(call), device_blocks(call.recv)[0]
        if into.size:
            self._nccl.allReduce(
                sources[0].address, into.address, into.size * r.each, r.kind, r.op, self._gpu.queue
            )

    def _reduce(self, call: Call, sources: list[DeviceArray]) -> None:
        into = device_blocks(call.recv)[0].address if self.rank == call.root else 0
        self._reduce_to(call.root, sources[0], into, _rule(call))

    def _reduce_scatter(self, call: Call, sources: list[DeviceArray]) -> None:
        assert call.send is not None
        r, into, first = _rule(call), device_blocks(call.recv)[0], sources[0]
        if _in_a_row(sources) and len(set(call.send.counts)) == 1:
            if into.size:
                n = into.size * r.each
                self._nccl.reduceScatter(
                    first.address, into.address, n, r.kind, r.op, self._gpu.queue
                )
            return
        for root, source in enumerate(sources):
            self._reduce_to(root, source, into.address if root == self.rank else 0, r)

    def _reduce_to(self, root: int, source: DeviceArray, into: int, r: Rule) -> None:
        if source.size:
            n = source.size * r.each
            self._nccl.reduce(source.address, into, n, r.kind, r.op, root, self._gpu.queue)

    def _broadcast(self, call: Call, sources: list[DeviceArray]) -> None:
        self._give(sources[0], sources[0], call.root)

    def _allgather(self, call: Call, sources: list[DeviceArray]) -> None:
        mine, blocks = sources[0], device_blocks(call.recv)
        if _in_a_row(blocks) and len({block.size for block in blocks}) == 1:
            if mine.nbytes:
                into = blocks[0].address
                self._nccl.allGather(mine.address, into, mine.nbytes, BYTES, self._gpu.queue)
            return
        for root, block in enumerate(blocks):
            self._give(mine if root == self.rank else block, block, root)

    def _give(self, source: DeviceArray, into: DeviceArray, root: int) -> None:
        if into.nbytes:
            self._nccl.broadcast(
                source.address, into.address, into.nbytes, BYTES, root, self._gpu.queue
            )

    def _gather(self, call: Call, sources: list[DeviceArray]) -> None:
        self._exchange({call.root: sources[0]}, dict(enumerate(device_blocks(call.recv))))

    def _scatter(self, call: Call, sources: list[DeviceArray]) -> None:
        self._exchange(dict(enumerate(sources)), {call.root: device_blocks(call.recv)[0]})

    def _alltoall(self, call: Call, sources: list[DeviceArray]) -> None:
        self._exchange(dict(enumerate(sources)), dict(enumerate(device_blocks(call.recv))))

    def _exchange(self, outgoing: dict[int, DeviceArray], incoming: dict[int, DeviceArray]) -> None:
        """Send a block to each rank, and receive one, this rank's own among them."""
        for peer, block in outgoing.items():
            if block.nbytes:
                self._nccl.send(block.address, block.nbytes, BYTES, peer, self._gpu.queue)
        for peer, block in incoming.items():
            if block.nbytes:
                self._nccl.recv(block.address, block.nbytes, BYTES, peer, self._gpu.queue)


_SAME_AS = {
    "all_gather_single": "allgather",
    "reduce_scatter_single": "reduce_scatter",
    "all_to_all_single": "alltoall",
}
_STAGED = frozenset({"scan", "exscan"})  # NCCL has none


def _does(call: Call) -> bool:
    """Return whether NCCL does a call as promised; alike on all ranks."""
    if call.kind in _STAGED or call.dtype is None:
        return False
    return call.op is None or rule(call.dtype, call.op) is not None


def _rule(call: Call) -> Rule:
    assert call.dtype is not None and call.op is not None
    found = rule(call.dtype, call.op)
    assert found is not None
    return found


def _in_a_row(blocks: list[DeviceArray]) -> bool:
    return all(a.address + a.nbytes == b.address for a, b in itertools.pairwise(blocks))
