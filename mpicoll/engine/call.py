"""The record of one call of one rank: what it moves, with whom, and how it is described."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ..arrays.buffers import Blocks, Buffer
from ..arrays.dtypes import DType, Reduction
from ..arrays.ops import ReduceOp
from ..runtime.digests import blake2b
from .kinds import Kind


class Peer:
    """What `send` and `recv` take in place of a rank; it is no number, and equal to none.

    MPI's constants are negative numbers, which a program may come to by mistake: as ``rank - 1``.
    """

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        """Return it as it is written in a program."""
        return f"mpicoll.{self._name}"

    def __reduce__(self) -> str:
        return self._name  # there is one of each, however it is copied


ANY_SOURCE = Peer("ANY_SOURCE")
"""For `recv`: take a message from whichever peer sends first."""

PROC_NULL = Peer("PROC_NULL")
"""For `send` and `recv`: no rank.  The call is done at once; a received array stays as it is."""


class Message(NamedTuple):
    """What `probe` tells of a message.

    Attributes:
        source: the rank that sent it.
        tag: its tag.
        dtype: the name of its dtype, as NumPy knows it (but for bfloat16 and the like).
        count: its elements.
    """

    source: int
    tag: int
    dtype: str
    count: int  # type: ignore[assignment]  # in place of the tuple's method


class Shape(NamedTuple):
    """What array `empty` is to make."""

    sides: tuple[int, ...]
    dtype: np.dtype[Any]


class Color(NamedTuple):
    """Which group a rank is to be in after a `split`, if any, and by what it is ordered there."""

    color: int | None
    key: int


class Members(NamedTuple):
    """The ranks that `split_group` makes a group of; none, on a rank that is to be in no group."""

    ranks: tuple[int, ...]


class Program(NamedTuple):
    """What `spawn` starts."""

    argv: list[str]


class Pieces(NamedTuple):
    """The pickles that a rank gives to an object collective: one, or one for each rank."""

    pickled: list[bytes]

    @property
    def extent(self) -> int:
        """The bytes of all, and of their lengths."""
        return 8 * len(self.pickled) + sum(map(len, self.pickled))


Payload: TypeAlias = "Pieces | Shape | Color | Members | Program | dict[str, Any] | str"
"""What a call has beside arrays: pickled objects, or what its kind needs.

A dictionary is what the groups that merge, or that spawn and join, have said of themselves; a str
describes the group that `new_group` is to make.
"""


ANY, NULL = -1, -2  # what they are in a `Call`
_PEERS = {ANY: "ANY_SOURCE", NULL: "PROC_NULL"}
UNEVEN = -1  # the `count` of a rank whose own blocks differ in size


Spans: TypeAlias = "tuple[tuple[int, int], ...]"
"""Ranges of addresses; tuples, which the garbage collector soon leaves alone."""


class Call:
    """One call of one rank, checked and normalised.

    Attributes:
        kind: its row in the table of kinds.
        send, recv: what is read and what is written; the same object where in place.
        dtype: that of its arrays; None: it has none.
        device: the GPU whose memory its arrays lie in; None: the host's, or it has none.
        extent: elements that this rank sends or receives, whichever is more; bytes of objects.
        count: elements of one block; arrival compares it between ranks.
        digest: whatever else must be equal on all ranks, in 63 bits.
        refused: why this rank's arguments were refused; such a call only arrives.
        leaving: this rank ends; such a call only arrives, and peers in another call raise.
        parts: the members of a coalesced call.
        payload: what the call has beside arrays; see `Payload`.
        result: what the call returns, where it isn't in the user's buffers.
        largest: the largest `extent` of all ranks, filled in by arrival.
        in_place: this rank's own block lies where it is to come, so it stays where it is.
        met: every rank of the group is known to have arrived in it.
        captured: it is captured in a CUDA graph: it is enqueued, and the GPU passes it later.
        since, chain: what was not compared since the last call that was, in words and condensed;
            "" and 0 if nothing.
        ready: what was noted at the call of the streams that its arrays are ordered by, which it
            comes after.
        turn: its place among the calls that go to a GPU's queue, until it is there or has ended.
        enqueued: set when the rest is up to the GPU; the call's steps go on until that is done.
        outputs: the user's arrays that the result is in, as they were given.
    """

    __slots__ = (
        "_spans",
        "captured",
        "chain",
        "count",
        "device",
        "digest",
        "dtype",
        "enqueued",
        "extent",
        "in_place",
        "kind",
        "largest",
        "leaving",
        "met",
        "op",
        "outputs",
        "parts",
        "payload",
        "peer",
        "ready",
        "recv",
        "reduction",
        "refused",
        "result",
        "root",
        "send",
        "since",
        "tag",
        "turn",
    )

    def __init__(
        self,
        kind: Kind,
        send: Blocks | None = None,
        recv: Blocks | None = None,
        *,
        op: ReduceOp | None = None,
        root: int = -1,
        peer: int = -1,
        tag: int = 0,
        count: int = 0,
        digest: int = 0,
        refused: str = "",
        leaving: bool = False,
        parts: tuple[Call, ...] = (),
        payload: Payload | None = None,
        outputs: tuple[object, ...] = (),
    ) -> None:
        self.kind = kind
        self.send = send
        self.recv = recv
        self.op = op
        self.reduction: Reduction | None = None
        self.root = root
        self.peer = peer
        self.tag = tag
        self.count = count
        self.digest = digest
        self.refused = refused
        self.leaving = leaving
        self.parts = parts
        self.payload = payload
        self.outputs = outputs
        self.result: Any = None
        self.largest = 0
        self.in_place = False
        self.met = False
        self.captured = False
        self.since = ""
        self.chain = 0
        self.ready: tuple[object, ...] = ()
        self.turn: Any = None
        self.enqueued: Any = None
        self._spans: tuple[Spans, Spans] | None = None
        self.dtype: DType | None
        self.device: int | None
        blocks = send if send is not None else recv
        if blocks is not None:
            self.dtype = blocks.dtype
            self.device = blocks.buffers[0].device
            self.extent = blocks.total
            if recv is not None and recv.total > blocks.total:
                self.extent = recv.total
        elif parts:
            self.dtype = parts[0].dtype
            self.device = parts[0].device
            self.extent = max([part.extent for part in parts])
        else:
            self.dtype = self.device = None
            self.extent = 0

    def buffers(self) -> list[Buffer]:
        """Return all arrays of the call."""
        send, recv = self.send, self.recv
        if self.parts:
            return [buffer for part in self.parts for buffer in part.buffers()]
        if send is None:
            return [] if recv is None else [*recv.buffers]
        if recv is None or recv is send:
            return [*send.buffers]
        return [*send.buffers, *recv.buffers]

    def describe(self) -> str:
        """Say the call as a person would write it: ``allreduce(float32[4], op=SUM)``."""
        if self.leaving:
            return "nothing more: it left the program"
        if self.refused:
            return f"{self.kind}, refused there: {self.refused}"
        said = []
        if self.dtype is not None:
            blocks = self.send if self.send is not None else self.recv
            size = "uneven" if self.count == UNEVEN else str(self.count)
            if blocks is not None and len(blocks.counts) > 1:
                size += f" x {len(blocks.counts)}"
                if len(set(blocks.counts)) > 1:
                    size = ", ".join(map(str, blocks.counts))
            if self.parts:
                size = ", ".join(str(part.count) for part in self.parts)
            where = "" if self.device is None else " in GPU memory"
            said.append(f"{self.dtype.name}[{size}]{where}")
        if self.op is not None:
            said.append(f"op={self.op.name}")
        if self.root >= 0:
            said.append(f"root={self.root}")
        if self.kind.counted:
            said.append(f"{self.kind.counted}={self.count}")
        if self.kind.shown and self.payload is not None:
            said.append(str(self.payload))
        if not self.kind.queued and self.dtype is not None:
            said.append(said_of_message(self.kind, self.peer, self.tag))
        return f"{self.kind}({', '.join(said)})"

    def spans(self) -> tuple[Spans, Spans]:
        """Return the address ranges that the call reads and those that it writes."""
        if self._spans is None:
            reads, writes = _spans(self.send), _spans(self.recv)
            if self.parts:
                reads = tuple(span for part in self.parts for span in _spans(part.send))
                writes = tuple(span for part in self.parts for span in _spans(part.recv))
            self._spans = reads, writes
        return self._spans


def said_of_message(kind: Kind, peer: int, tag: int) -> str:
    """Say which message a `send` or `recv` is about."""
    return f"{'src' if kind.receives else 'dst'}={_PEERS.get(peer, peer)}, tag={tag}"


def _spans(blocks: Blocks | None) -> Spans:
    if blocks is None:
        return ()
    return tuple([(at := b.address, at + b.nbytes) for b in blocks.buffers if b.nbytes])


def digest(*numbers: int) -> int:
    """Condense integers to 63 bits, equal in every process (unlike `hash`)."""
    packed = struct.pack(f"<{len(numbers)}q", *numbers)
    return int.from_bytes(blake2b(packed, 8), "little") >> 1
