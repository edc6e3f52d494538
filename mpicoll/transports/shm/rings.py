"""Messages of a group whose ranks share one node's memory: through rings there, without MPI.

For each ordered pair of ranks there is a ring, in a file of the group's own.  A send writes a
header and a small payload into it, and is done.  A larger payload stays where it is until the
receiver has read it, straight from the sender's memory into its own array.  Where a rank may not do
that, MPI brings the larger payloads of all.  Ranks have rings only where all of them have the
compiled core, in which the rings are.  On both they agree when the group is made.

A receive takes what has come from its rank with its tag, in the order in which it was sent.  What
no receive was posted for is kept aside, so that it is in nobody's way.  Where a ring is full, sends
wait for room, in their order.  Rings are emptied whenever this rank looks at its messages, and each
time the engine hears what peers say.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from dataclasses import dataclass
from mmap import mmap
from typing import TYPE_CHECKING, Any

import numpy as np

from ...arrays.dtypes import BY_CODE
from ...engine.call import Call, Message
from ...engine.recorder import Recorder
from ...engine.tasks import Completed, Expired, GroupState
from ...errors import CollectiveMismatchError, TransportError
from ...runtime import agreement, memory
from ...runtime.library import (
    IDLE,
    MPI,
    PROGRESSED,
    Abandoned,
    Steps,
    Taken,
    highest_tag,
    pending,
    until_all,
)
from ...runtime.settings import has_cores_for
from ..messages import Dropped, Messages, dtype_name, mismatch, packed_header
from ..tuning import Tuning
from . import cma, core

if TYPE_CHECKING:
    from ._native import Posted, Rings

Array = np.ndarray[Any, Any]
Wrong = TransportError | CollectiveMismatchError | None

MOST = 64  # ranks that have rings: of more they would take too much, as one lies between any two
LARGEST, LEAST = 2**19, 2**10  # bytes of a ring
ALL = 2**22  # bytes of all of a group's, unless they would be smaller than the least
LINE = 64  # bytes of the unit in which rings are written
PER_SLOT = 1024  # bytes of a ring for each larger message that may be under way in it, from 8 to 64


@dataclass(frozen=True, slots=True)
class RingMemory:
    """What the ranks of a group that are all compiled have for their messages, and who they are.

    Attributes:
        mapping: the mapped file of the rings; None: there are none, so messages go by MPI.
        ring: bytes of one ring.
        slots: larger messages that may be under way at a time between two ranks.
        processes: the system's numbers of all ranks.
        reads: they may read one another's memory.
    """

    mapping: mmap | None
    ring: int
    slots: int
    processes: tuple[int, ...]
    reads: bool


def sizes(ranks: int) -> tuple[int, int]:
    """Return the bytes of each ring, a power of two, and the slots beside it."""
    ring = LARGEST
    while ring > LEAST and ring * ranks**2 > ALL:
        ring //= 2
    return ring, min(max(ring // PER_SLOT, 8), 64)


def nbytes(ranks: int) -> int:
    """Return the bytes of all of a group's rings; of none, where it has too many ranks."""
    if ranks > MOST:
        return 0
    ring, slots = sizes(ranks)
    return ranks**2 * (LINE + -(-8 * slots // LINE) * LINE + ring)


def share(comm: MPI.Intracomm) -> Generator[int, None, RingMemory | None]:
    """Make the rings of a communicator whose ranks share memory; None: not all are compiled."""
    word = np.frombuffer(os.urandom(8), dtype=np.int64)
    known = core.available(), os.getpid(), word.ctypes.data, word[0]
    table = (yield from agreement.rows(comm, *map(int, known))).tolist()
    if not all(compiled for compiled, *_ in table):
        return None
    reads = all(cma.can_read(*where) for _, *where in table)
    (reads,) = yield from agreement.unanimous(comm, reads)  # until then the others read `word`
    ring, slots = sizes(len(table))
    mapping = None
    if len(table) <= MOST:
        mapping = yield from memory.map_file(comm, nbytes(len(table)))
    return RingMemory(mapping, ring, slots, tuple(process for _, process, *_ in table), reads)


class RingMessages(Messages):
    """The messages of a group that has rings."""

    def __init__(self, comm: MPI.Intracomm, tuning: Tuning, shared: RingMemory) -> None:
        super().__init__(comm, tuning)
        assert shared.mapping is not None
        self._mapping = shared.mapping
        self._aside = 0 if shared.reads else shared.ring // 4  # what is larger goes by MPI
        self._rings = core.rings(
            shared.mapping,
            (self.rank, self.size),
            not has_cores_for(self.size),
            ring=shared.ring,
            slots=shared.slots,
            packed=shared.ring // 4,
            processes=shared.processes,
            highest_tag=highest_tag(),
            reads=shared.reads,
        )

    def direct(self, state: GroupState, recorder: Recorder) -> Rings:
        rings = self._rings
        rings.group_state, rings.append, rings.steps = state, recorder.ring.append, self.steps
        return rings

    def close(self) -> None:
        self._rings.close()
        self._mapping.close()

    def send(self, call: Call) -> Steps:
        assert call.send is not None
        if not self._aside or call.send.nbytes <= self._aside:
            return self.steps(call, self._message(call))
        tag = self._tags[self._apart[call.peer] % len(self._tags)]
        self._apart[call.peer] += 1
        return self._send_apart(call, self._message(call, tag), tag)

    def _send_apart(self, call: Call, posted: Posted, tag: int) -> Steps:
        """Send a message's header through the ring, and its payload by MPI."""
        assert call.send is not None
        requests: list[MPI.Request] = []
        kept = pending()
        try:
            payload = call.send.flat().view(np.uint8)
            self._begin(requests, self.comm.Isend, payload, call.peer, tag)
            yield from _send(posted)
        except BaseException:
            kept.extend(requests)
            raise
        yield from until_all(requests)

    def recv(self, call: Call) -> Steps:
        return self.steps(call, self._message(call))

    def _message(self, call: Call, apart: int = 0) -> Posted:
        blocks = call.recv if call.kind.receives else call.send
        assert blocks is not None
        dtype = blocks.dtype
        text = b"" if dtype.code in BY_CODE else dtype.name.encode()
        array = blocks.flat().view(np.uint8)
        return self._rings.message(
            call.kind.code, array, dtype.code, blocks.total, text, call.peer, call.tag, apart
        )

    def steps(self, call: Call, posted: Posted) -> Steps:
        """Carry out a message, which may have begun already."""
        return self._receive(call, posted) if call.kind.receives else _send(posted)

    def _receive(self, call: Call, posted: Posted) -> Steps:
        """Receive one message; when the deadline passes, cancel (`Expired` is thrown in)."""
        try:
            while not posted.advance():
                yield PROGRESSED if posted.begun else IDLE
        except (Abandoned, GeneratorExit):
            posted.abandon()
            raise
        except BaseException as error:  # `Expired`, or a signal handler's
            if posted.cancel():
                raise Expired from error
            posted.complete()  # for which the sender has nothing to do
            wrong = self._at_last(call, posted, error)
            if not isinstance(error, Expired):
                raise Completed(wrong) from error
            if wrong is not None:
                raise wrong from None
            return
        if posted.apart is not None:
            yield from self._payload(call, posted)
            return
        wrong = _ended(call, posted)
        if wrong is not None:
            raise wrong

    def _at_last(self, call: Call, posted: Posted, error: BaseException) -> Wrong:
        """End a receive whose message has come; return what is wrong with that."""
        if posted.apart is None:
            return _ended(call, posted)
        payload = self._payload(call, posted)
        try:
            next(payload)
            payload.throw(error)
        except StopIteration:
            pass
        except CollectiveMismatchError as wrong:
            return wrong
        return None

    def _payload(self, call: Call, posted: Posted) -> Steps:
        """Receive the payload that MPI brings, as if its header had come that way."""
        assert call.recv is not None and posted.apart is not None
        tag, nbytes = posted.apart
        code, count, text = posted.wrong or (call.recv.dtype.code, call.recv.total, b"")
        header = np.frombuffer(packed_header(code, count, nbytes, tag, text), np.uint8)
        call.peer = posted.source
        return self._recv_from(call, Taken(posted.source, call.tag, header, MPI.REQUEST_NULL))

    def probe(self, peer: int, tag: int) -> Message | None:
        found = self._rings.probe(peer, tag)
        if found is None:
            return None
        source, code, count, text = found
        return Message(source, tag, dtype_name(code, text), count)

    def counts(self) -> tuple[list[int], list[int]]:
        _, by_mpi = super().counts()
        here = self._rings.received
        return self._rings.sent, [here[r] + by_mpi[r] for r in range(self.size)]

    def drop(self, state: GroupState) -> Generator[int, None, Dropped | None]:
        found = self._rings.drop()
        if found is None:
            return None
        source, tag, code, count, apart, nbytes = found
        if nbytes:
            requests: list[MPI.Request] = []
            into = np.empty(nbytes, np.uint8)
            self._begin(requests, self.comm.Irecv, into, source, apart)
            yield from until_all(requests)
        return source, tag, code, count


def _send(posted: Posted) -> Steps:
    try:
        while not posted.advance():
            yield IDLE
    except BaseException:
        posted.abandon()  # the engine keeps the array, which the receiver may be reading
        raise


def _ended(call: Call, posted: Posted) -> Wrong:
    """Note from whom a message has come, and return what is wrong with it, if something is."""
    call.result = call.peer = posted.source
    if posted.failed:
        why = f"{errno.errorcode.get(posted.failed, posted.failed)}, {os.strerror(posted.failed)}"
        return TransportError(
            f"{call.describe()}: the memory of rank {posted.source} can't be read ({why})",
            code=posted.failed,
        )
    return None if posted.wrong is None else mismatch(call, *posted.wrong, posted.source)
