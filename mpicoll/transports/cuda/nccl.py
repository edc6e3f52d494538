"""Collectives on GPU memory by NCCL; what it can't do as promised goes through the host.

A call is enqueued on the group's stream once all ranks have arrived: after the work that its
arrays' streams were given before the call, and before what is queued after `wait()`.  The steps go
on until the GPU has passed it, so that the deadline holds and the arrays live; the next call of the
group need not wait for that.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, cast

from ...arrays.buffers import Buffer
from ...arrays.device import DeviceArray, stream_of
from ...arrays.dtypes import DType
from ...arrays.ops import ReduceOp
from ...engine import kinds
from ...engine.call import Call
from ...engine.kinds import Kind
from ...engine.progress import engine
from ...errors import UnsupportedError
from ...runtime.library import IDLE, PROGRESSED, Steps
from ..base import Transport
from ..tuning import Tuning
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
    if op.factor is not None:  # factors come in any number, so such rules are not kept
        return _rule(dtype, op)
    key = dtype.code, op.code
    if key not in _kept:
        _kept[key] = _rule(dtype, op)
    return _kept[key]


_kept: dict[tuple[int, int], Rule | None] = {}


def _rule(dtype: DType, op: ReduceOp) -> Rule | None:
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


Operation = Callable[[], None]  # a call of NCCL


class Queue(Copies, Protocol):
    """A GPU with a stream that NCCL works on.

    Attributes:
        queue: CUDA's handle of that stream.
    """

    queue: int

    def queue_after(self, mark: object) -> None:
        """Let what is queued from now on come after what a mark has noted; inside `active`."""

    def is_done(self, mark: object) -> bool:
        """Return whether the GPU has passed a mark."""

    def hold(self, mark: object, streams: Iterable[int]) -> None:
        """Let these streams wait for a mark; the host goes on."""


class Nccl(Protocol):
    """A communicator of NCCL; counts, types and operators are NCCL's."""

    def settled(self) -> bool:
        """Return whether what was asked of it is done; until then it may be asked nothing else."""

    def is_quiet(self) -> bool:
        """Return whether none of this process is being given up, for which NCCL waits for the GPU.

        For all of it: no kernel may be there that a peer has yet to meet, or the host is stuck in
        its next call of CUDA, behind that wait.
        """

    def perform(self, operations: Sequence[Operation], like: Hashable) -> bool:
        """Put operations on the stream, as one; return whether that is done, or goes on aside.

        Of such as are alike (`like`), the first ones may have to wait for the peers.
        """

    def all_reduce(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None: ...
    def reduce(
        self, src: int, dst: int, n: int, kind: int, op: int, root: int, stream: int
    ) -> None: ...
    def broadcast(self, src: int, dst: int, n: int, kind: int, root: int, stream: int) -> None: ...
    def reduce_scatter(
        self, src: int, dst: int, n: int, kind: int, op: int, stream: int
    ) -> None: ...
    def all_gather(self, src: int, dst: int, n: int, kind: int, stream: int) -> None: ...
    def send(self, src: int, n: int, kind: int, peer: int, stream: int) -> None: ...
    def recv(self, dst: int, n: int, kind: int, peer: int, stream: int) -> None: ...

    def knows(self, like: Hashable) -> bool:
        """Return whether such operations were performed before."""

    def premul_sum(self, kind: int, factor: float) -> int:
        """Make an operator: the sum of each rank's elements times its factor."""

    def drop(self, op: int) -> None:
        """Give an operator back."""

    def split(self, color: int, key: int) -> Nccl:
        """Begin to make a part of it; it is made when it is `settled`."""

    def close(self) -> Steps:
        """Give it back; all its ranks do so now."""

    def abort(self) -> None:
        """Give it up: its kernels, which would wait for the peers for ever, end."""


class Turn:
    """A call's place in the order in which calls reach NCCL."""

    __slots__ = ("__weakref__", "over")

    def __init__(self) -> None:
        self.over = False  # the call was enqueued, or has ended otherwise


class Turns:
    """The order in which a process's calls reach NCCL: that of the program, whatever the groups.

    NCCL wants the calls of several communicators in one order on all ranks, or their kernels wait
    for one another for ever.  Arrival alone would enqueue first what arrives first.
    """

    def __init__(self) -> None:
        self._waiting: deque[weakref.ref[Turn]] = deque()  # a turn lives as long as its call

    def take(self) -> Turn:
        """Take the last place."""
        turn = Turn()
        self._waiting.append(weakref.ref(turn))
        return turn

    def has_come(self, turn: Turn) -> bool:
        """Return whether all calls before it were enqueued, or have ended."""
        while (first := self._waiting[0]()) is None or first.over:
            self._waiting.popleft()
        return first is turn


class Enqueued:
    """A call that is on the group's stream."""

    __slots__ = ("_buffers", "_gpu", "_mark", "waited")

    def __init__(self, gpu: Queue, mark: object, buffers: list[Buffer]) -> None:
        self._gpu, self._mark, self._buffers = gpu, mark, buffers
        self.waited = False

    def hold(self) -> None:
        """Let the streams that order the user's arrays by now wait for the call."""
        self.waited = True
        if len(self._buffers) == 1:
            self._gpu.hold(self._mark, (stream_of(self._buffers[0].owner),))
            return
        streams, libraries = set(), set()
        for buffer in self._buffers:
            owner = buffer.owner
            library = type(owner).__module__.partition(".")[0]
            if library in _ONE_STREAM and library in libraries:
                continue
            libraries.add(library)
            streams.add(stream_of(owner))
        self._gpu.hold(self._mark, sorted(streams))


_ONE_STREAM = ("cupy", "torch")  # the arrays of these are ordered by the one that is current


class NcclTransport(StagedTransport):
    """The collectives of a group whose ranks have a GPU each.

    Args:
        host: moves host memory.
        gpu: this rank's.
        nccl: the communicator of the group's ranks.
        turns: of all groups of this process.
        tuning: the same on all ranks of the group.
    """

    name = "nccl"
    watched = True

    def __init__(
        self, host: Transport, gpu: Queue, nccl: Nccl, turns: Turns, tuning: Tuning
    ) -> None:
        super().__init__(host, gpu, tuning)
        self._gpu, self._nccl, self._turns = gpu, nccl, turns
        self._engine = engine()
        self._ahead, self._most = 0, tuning.nccl_ahead  # calls that are on the stream, and may be
        self._made: dict[Kind, Callable[[Call, list[DeviceArray]], list[Operation]]] = {
            kinds.ALLREDUCE: self._allreduce,
            kinds.REDUCE: self._reduce,
            kinds.BROADCAST: self._broadcast,
            kinds.ALLGATHER: self._allgather,
            kinds.ALL_GATHER_SINGLE: self._all_gather_single,
            kinds.GATHER: self._gather,
            kinds.SCATTER: self._scatter,
            kinds.REDUCE_SCATTER: self._reduce_scatter,
            kinds.REDUCE_SCATTER_SINGLE: self._reduce_scatter_single,
            kinds.ALLTOALL: self._alltoall,
            kinds.ALL_TO_ALL_SINGLE: self._alltoall,
        }

    def admit(self, call: Call) -> None:
        super().admit(call)
        if self._does(call):
            call.turn = self._turns.take()

    def _does(self, call: Call) -> bool:
        """Return whether NCCL does a call as promised; alike on all ranks.

        It has no scans, nor messages with tags: those are staged.
        """
        if call.parts:
            return all(map(self._does, call.parts))
        if call.kind not in self._made or call.dtype is None:
            return False
        return call.op is None or rule(call.dtype, call.op) is not None

    def _can_be_captured(self, call: Call) -> bool:
        return self._does(call) or super()._can_be_captured(call)

    def steps(self, call: Call) -> Steps:
        return super().steps(call) if call.turn is None else self._enqueue(call)

    def close(self) -> Steps:
        return self._nccl.close()

    def abort(self) -> None:
        self._nccl.abort()

    def is_ready(self, call: Call) -> bool:
        """Return whether a call that the ranks have met in, or need not, goes to NCCL at once.

        After those before it; not too far ahead of the GPU; and not ahead of the peers while one of
        NCCL's communicators is given up.
        """
        return (
            self._ahead < self._most
            and self._turns.has_come(call.turn)
            and (call.met or self._nccl.is_quiet())
        )

    def _enqueue(self, call: Call) -> Steps:
        gpu, nccl, own = self._gpu, self._nccl, self._engine
        while not self.is_ready(call):
            yield IDLE
        operations, like = self._operations(call)
        if call.captured and not nccl.knows(like):
            raise UnsupportedError(
                f"{call.describe()} can't be captured before it was made once, as NCCL connects "
                "the ranks then: make it outside of the graph first, and synchronize()"
            )
        try:
            own.inside = self.abort
            with gpu.active():
                for mark in call.ready:
                    gpu.queue_after(mark)
                done = nccl.perform(operations, like)
                mark = gpu.mark(gpu.queue) if done else None
            own.inside = None
            if mark is None:
                while not nccl.settled():
                    yield IDLE
                own.inside = self.abort
                with gpu.active():
                    mark = gpu.mark(gpu.queue)
                own.inside = None
            call.turn.over = True
            call.enqueued = Enqueued(gpu, mark, call.buffers())
            self._ahead += 1
            yield PROGRESSED  # the engine sees that it is enqueued
            over = False
            while not over:
                own.inside = self.abort  # the question, too, may block: behind a wait for the GPU
                # What is captured it passes when the graph is launched, of which we learn nothing.
                over = call.enqueued.waited if call.captured else gpu.is_done(mark)
                nccl.settled()  # or raise: what was aborted is passed, too
                own.inside = None
                if not over:
                    yield IDLE
            self._ahead -= 1
        except BaseException:  # given up, or an error
            own.inside = None
            self.abort()
            raise

    # ---- which calls of NCCL make up a collective: one method per kind ----

    def _operations(self, call: Call) -> tuple[list[Operation], Hashable]:
        """Return NCCL's calls, and what makes others alike: NCCL chooses its ways by the size.

        The kind decides which calls these are: all ranks must make the same ones.
        """
        if call.parts:
            made, like = zip(*map(self._operations, call.parts), strict=True)
            return [operation for some in made for operation in some], like
        op = None if call.op is None else call.op.name
        size: Hashable = call.extent.bit_length()
        if call.kind.pairwise:  # NCCL connects each pair by itself
            blocks = device_blocks(call.send) + device_blocks(call.recv)
            size = tuple(block.size.bit_length() for block in blocks)
        operations = self._made[call.kind](call, device_blocks(call.send))
        return operations, (call.kind, call.dtype, op, call.root, size)

    def _allreduce(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        into = device_blocks(call.recv)[0]
        return self._reduced(
            self._nccl.all_reduce, _of(call), sources[0].address, into.address, into.size
        )

    def _reduce(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        into = device_blocks(call.recv)[0].address if self.rank == call.root else 0
        return self._reduce_to(call.root, sources[0], into, _of(call))

    def _reduce_scatter_single(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        into = device_blocks(call.recv)[0]
        return self._reduced(
            self._nccl.reduce_scatter, _of(call), sources[0].address, into.address, into.size
        )

    def _reduce_scatter(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        r, into = _of(call), device_blocks(call.recv)[0].address
        operations = []
        for root, source in enumerate(sources):
            operations += self._reduce_to(root, source, into if root == self.rank else 0, r)
        return operations

    def _reduce_to(self, root: int, source: DeviceArray, into: int, r: Rule) -> list[Operation]:
        return self._reduced(self._nccl.reduce, r, source.address, into, source.size, root)

    def _reduced(
        self, call: Callable[..., None], r: Rule, src: int, dst: int, size: int, *root: int
    ) -> list[Operation]:
        """Reduce `size` of the array's elements by a call of NCCL, if there are any."""
        if not size:
            return []

        if r.factor is None:
            return [partial(call, src, dst, size * r.each, r.kind, r.op, *root, self._gpu.queue)]

        def premultiplied(factor: float) -> None:
            op = self._nccl.premul_sum(r.kind, factor)
            call(src, dst, size, r.kind, op, *root, self._gpu.queue)
            self._nccl.drop(op)

        return [partial(premultiplied, r.factor)]

    def _broadcast(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        return self._give(sources[0], sources[0], call.root)

    def _all_gather_single(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        mine, into = sources[0], device_blocks(call.recv)[0]
        if not mine.nbytes:
            return []
        where = mine.address, into.address, mine.nbytes
        return [partial(self._nccl.all_gather, *where, BYTES, self._gpu.queue)]

    def _allgather(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        operations = []
        for root, block in enumerate(device_blocks(call.recv)):
            operations += self._give(sources[0] if root == self.rank else block, block, root)
        return operations

    def _give(self, source: DeviceArray, into: DeviceArray, root: int) -> list[Operation]:
        if not into.nbytes:
            return []
        where = source.address, into.address, into.nbytes
        return [partial(self._nccl.broadcast, *where, BYTES, root, self._gpu.queue)]

    def _gather(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        return self._exchange({call.root: sources[0]}, dict(enumerate(device_blocks(call.recv))))

    def _scatter(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        return self._exchange(dict(enumerate(sources)), {call.root: device_blocks(call.recv)[0]})

    def _alltoall(self, call: Call, sources: list[DeviceArray]) -> list[Operation]:
        return self._exchange(dict(enumerate(sources)), dict(enumerate(device_blocks(call.recv))))

    def _exchange(
        self, outgoing: dict[int, DeviceArray], incoming: dict[int, DeviceArray]
    ) -> list[Operation]:
        """Send a block to each rank, and receive one, this rank's own unless it is in place."""
        own, place = outgoing.get(self.rank), incoming.get(self.rank)
        if own is not None and place is not None and own.address == place.address:
            outgoing = {peer: block for peer, block in outgoing.items() if peer != self.rank}
            incoming = {peer: block for peer, block in incoming.items() if peer != self.rank}
        return [
            partial(move, block.address, block.nbytes, BYTES, peer, self._gpu.queue)
            for move, blocks in ((self._nccl.send, outgoing), (self._nccl.recv, incoming))
            for peer, block in blocks.items()
            if block.nbytes
        ]


def _of(call: Call) -> Rule:
    assert call.dtype is not None and call.op is not None
    found = rule(call.dtype, call.op)
    assert found is not None
    return found
