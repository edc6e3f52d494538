"""The protocol of a transport, and what can be composed from its primitives.

A transport is a set of generators, one per collective, that take a checked `Call` whose
arrival is over on every rank.  Coalesced and object collectives are the same over every
transport: they are composed here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays.buffers import Blocks, as_buffer, refuse_device
from ..engine import kinds
from ..engine.arrival import Arrival
from ..engine.call import UNEVEN, Call, Message, Pieces
from ..engine.kinds import Kind
from ..engine.recorder import Recorder
from ..engine.tasks import GroupState
from ..runtime.library import Steps

if TYPE_CHECKING:
    from .shm._native import Core, Rings


class Transport(ABC):
    """What moves the data of one group's calls.  Each method yields while it waits."""

    name: str
    rank: int
    size: int
    watched = False  # a thread must keep the deadlines, as the user may wait elsewhere

    def close(self) -> Steps:
        """Give back what the ranks hold together; all of them do so now."""
        yield from ()

    @abstractmethod
    def clear(self, state: GroupState) -> Steps:
        """End all messages of the group: all its ranks are here, and none sends any more."""

    def abort(self) -> None:  # noqa: B027
        """Let go of the peers: the group is broken, and no call of it is taken any further."""

    def release(self, *, together: bool) -> None:  # noqa: B027
        """Let go of this rank's memory: the group is closed; `together`: by all ranks."""

    def admit(self, call: Call) -> None:
        """See a call on arrays in GPU memory before this rank arrives: refuse it, or note it."""
        raise refuse_device(call.buffers())

    def core(self, arrival: Arrival, group_state: GroupState, recorder: Recorder) -> Core | None:
        """Return the compiled way of small calls, where the transport and this machine have one."""
        return None

    def rings(self, state: GroupState, recorder: Recorder) -> Rings | None:
        """Return the compiled way of messages, where the transport and this machine have one."""
        return None

    def empty(self, call: Call) -> Steps:
        """Make an array of `call.count` bytes that the ranks of this node share, if they can."""
        call.result = np.empty(call.count, np.uint8)
        yield from ()

    @abstractmethod
    def probe(self, peer: int, tag: int) -> Message | None:
        """Return what is known of the message that a receive would take, if it is here."""

    def steps(self, call: Call) -> Steps:
        """Carry out a call."""
        for part in call.parts or (call,):
            part.largest = call.largest
            move: Callable[[Call], Steps] = getattr(self, part.kind.name)
            yield from move(part)

    @abstractmethod
    def allreduce(self, call: Call) -> Steps: ...
    @abstractmethod
    def broadcast(self, call: Call) -> Steps: ...
    @abstractmethod
    def reduce(self, call: Call) -> Steps: ...
    @abstractmethod
    def allgather(self, call: Call) -> Steps: ...
    @abstractmethod
    def gather(self, call: Call) -> Steps: ...
    @abstractmethod
    def scatter(self, call: Call) -> Steps: ...
    @abstractmethod
    def reduce_scatter(self, call: Call) -> Steps: ...
    @abstractmethod
    def alltoall(self, call: Call) -> Steps: ...
    @abstractmethod
    def scan(self, call: Call) -> Steps: ...
    @abstractmethod
    def exscan(self, call: Call) -> Steps: ...
    @abstractmethod
    def send(self, call: Call) -> Steps: ...
    @abstractmethod
    def recv(self, call: Call) -> Steps: ...

    def all_gather_single(self, call: Call) -> Steps:
        return self.allgather(call)

    def reduce_scatter_single(self, call: Call) -> Steps:
        return self.reduce_scatter(call)

    def all_to_all_single(self, call: Call) -> Steps:
        return self.alltoall(call)

    def barrier(self, call: Call) -> Steps:
        """Nothing is left to do: arrival was the barrier."""
        yield from ()

    monitored_barrier = barrier

    # ---- objects: lengths first, then the pickled bytes ----

    def broadcast_object(self, call: Call) -> Steps:
        at_root = self.rank == call.root
        mine = pickles(call)[0] if at_root else b""
        length = np.array([len(mine)], dtype=np.int64)
        yield from self.broadcast(inner_call(kinds.BROADCAST, call.root, length, length))
        data = _bytes(mine) if at_root else np.empty(int(length[0]), dtype=np.uint8)
        yield from self.broadcast(inner_call(kinds.BROADCAST, call.root, data, data))
        call.result = [data]

    def allgather_object(self, call: Call) -> Steps:
        lengths = yield from self._all_lengths(call)
        mine = _bytes(*pickles(call))
        everyone = np.empty(sum(lengths), dtype=np.uint8)
        inner = inner_call(kinds.ALLGATHER, -1, mine, everyone, recv_counts=lengths)
        inner.largest = sum(lengths)
        yield from self.allgather(inner)
        call.result = _cut(everyone, lengths)

    def gather_object(self, call: Call) -> Steps:
        lengths = yield from self._all_lengths(call)
        mine = _bytes(*pickles(call))
        everyone = np.empty(sum(lengths), dtype=np.uint8) if self.rank == call.root else None
        inner = inner_call(kinds.GATHER, call.root, mine, everyone, recv_counts=lengths)
        inner.largest = sum(lengths)
        yield from self.gather(inner)
        call.result = [] if everyone is None else _cut(everyone, lengths)

    def scatter_object(self, call: Call) -> Steps:
        pieces = pickles(call)
        lengths = [len(piece) for piece in pieces]
        # Each rank gets its own length, and the total, on which the way of moving depends.
        table = np.array([[n, sum(lengths)] for n in lengths], dtype=np.int64).reshape(-1)
        row = np.empty(2, dtype=np.int64)
        at_root = self.rank == call.root
        yield from self.scatter(
            inner_call(kinds.SCATTER, call.root, table if at_root else None, row, [2] * self.size)
        )
        mine = np.empty(int(row[0]), dtype=np.uint8)
        data = _bytes(b"".join(pieces)) if at_root else None
        inner = inner_call(kinds.SCATTER, call.root, data, mine, lengths)
        inner.largest = int(row[1])
        inner.count = UNEVEN
        yield from self.scatter(inner)
        call.result = [mine]

    def _all_lengths(self, call: Call) -> LengthSteps:
        lengths = np.empty(self.size, dtype=np.int64)
        mine = np.array([len(pickles(call)[0])], dtype=np.int64)
        yield from self.allgather(
            inner_call(kinds.ALLGATHER, -1, mine, lengths, recv_counts=[1] * self.size)
        )
        found: list[int] = lengths.tolist()
        return found


LengthSteps = Any  # a generator that returns a list: Steps with a value


def inner_call(
    kind: Kind,
    root: int,
    send: np.ndarray[Any, Any] | None,
    recv: np.ndarray[Any, Any] | None,
    send_counts: list[int] | None = None,
    recv_counts: list[int] | None = None,
) -> Call:
    """Make a call that is part of another one."""
    return Call(
        kind,
        None if send is None else _blocks(send, send_counts),
        None if recv is None else _blocks(recv, recv_counts),
        root=root,
    )


def _blocks(array: np.ndarray[Any, Any], counts: list[int] | None) -> Blocks:
    buffer = as_buffer(array, "array", write=False)
    return Blocks.single(buffer) if counts is None else Blocks.split(buffer, tuple(counts))


def pickles(call: Call) -> list[bytes]:
    """Return the pickles that this rank gives to an object collective."""
    return call.payload.pickled if isinstance(call.payload, Pieces) else []


def _bytes(pickled: bytes) -> np.ndarray[Any, Any]:
    """Return the bytes of a pickle as an array."""
    return np.frombuffer(pickled, dtype=np.uint8)


def _cut(data: np.ndarray[Any, Any], lengths: list[int]) -> list[np.ndarray[Any, Any]]:
    ends = np.cumsum(lengths)
    return [data[end - n : end] for n, end in zip(lengths, ends.tolist(), strict=True)]
