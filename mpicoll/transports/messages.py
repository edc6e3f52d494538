"""Messages between two ranks by MPI: `send`, `recv`, `probe`, and the end of those left over.

A message of `send` begins with a header.  A small payload is packed behind it.  A large one follows
apart, under a tag that the header names and no other message near it has, so it comes straight into
the user's array, whatever is sent and received at the same time; its receive is posted when the
header has come, and only if the array is of the right dtype and size.
"""

from __future__ import annotations

import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..arrays.dtypes import BY_CODE
from ..engine.call import ANY, Call, Message
from ..engine.progress import engine
from ..engine.recorder import Recorder
from ..engine.tasks import Completed, Expired, GroupState, Task, Uncancelled
from ..errors import CollectiveMismatchError, interrupts
from ..runtime import agreement
from ..runtime.library import (
    IDLE,
    MPI,
    POLL,
    Abandoned,
    Steps,
    Taken,
    exchange_tag,
    payload_tags,
    pending,
    post,
    take,
    until,
    until_all,
)
from ..runtime.process import monotonic
from .base import Transport
from .tuning import Tuning

if TYPE_CHECKING:
    from .shm._native import Rings

Array = np.ndarray[Any, Any]

CANCELLING = 0.02  # seconds that it may take to cancel a receive that no message has matched
_MAGIC = b"mpc3"
_PACKED = -1  # in place of the tag of a payload that is packed behind its header

# Magic, dtype code, elements, bytes of the payload, its tag, the dtype as text.
_HEADER = struct.Struct("<4sqqqq132s")
_Header = tuple[bytes, int, int, int, int, bytes]

Dropped = tuple[int, int, int, int]
"""A message that nobody receives: its source, its tag, the code of its dtype, its elements."""


class Messages:
    """The messages of one communicator, which is private to its group."""

    def __init__(self, comm: MPI.Intracomm, tuning: Tuning) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._most = tuning.mpi_elements
        self._packed = tuning.packed
        self._room = _HEADER.size + tuning.packed
        self._tags = payload_tags()
        self._apart: Counter[int] = Counter()  # payloads sent apart, by receiver
        self._sent: Counter[int] = Counter()  # messages, by receiver
        self._received: Counter[int] = Counter()  # and by sender
        # By tag, receives from any source: the first looks for a message, or is being given one.
        self._from_any: defaultdict[int, deque[object]] = defaultdict(deque)
        self._taken: list[Taken] = []  # by `probe`, before any receive

    def direct(self, state: GroupState, recorder: Recorder) -> Rings | None:
        """Return the compiled way of messages, if these have one."""
        return None

    def close(self) -> None:
        """Let go of this rank's memory: the group is closed."""

    def send(self, call: Call) -> Steps:
        blocks, peer = call.send, call.peer
        assert blocks is not None
        dtype, nbytes = blocks.dtype, blocks.nbytes
        text = b"" if dtype.code in BY_CODE else dtype.name.encode()
        if nbytes <= self._packed:
            message = _HEADER.pack(_MAGIC, dtype.code, blocks.total, nbytes, _PACKED, text)
            message += blocks.flat().tobytes()
            request = self.comm.Isend([message, MPI.BYTE], peer, call.tag)
            self._sent[peer] += 1
            if not request.Test():  # mostly MPI has taken it
                yield from until(request)
            return
        tag = self._tags[self._apart[peer] % len(self._tags)]
        self._apart[peer] += 1
        header = _HEADER.pack(_MAGIC, dtype.code, blocks.total, nbytes, tag, text)
        requests = [self.comm.Isend([header, MPI.BYTE], peer, call.tag)]
        self._begin(requests, self.comm.Isend, blocks.flat().view(np.uint8), peer, tag)
        self._sent[peer] += 1
        yield from until_all(requests)

    def recv(self, call: Call) -> Steps:
        """Receive one message, from whichever rank sends first if the call names none.

        Then MPI is asked which message is there, and only after that for this one.  MPICH 5.0
        loses messages that come before a receive from any source, where some ranks of the
        communicator share memory and others don't: on several nodes, and where MPI worlds have
        merged.  Over libfabric it goes on to report a message for which a receive is posted
        already, so those of a tag are taken one at a time.
        """
        return self._recv_from(call) if call.peer != ANY else self._recv_from_any(call)

    def _recv_from_any(self, call: Call) -> Steps:
        status, queue, turn = MPI.Status(), self._from_any[call.tag], object()
        queue.append(turn)
        try:
            try:
                while queue[0] is not turn or not self._has_come(call, status):
                    yield IDLE
            except (Abandoned, GeneratorExit):
                raise
            except BaseException as error:
                if interrupts(error):
                    raise Expired from error  # nothing has begun
                raise
            found = self._claim(call) if self._taken else None
            if found is None:
                call.peer = status.Get_source()
                yield from self._recv_from(call)
            else:
                yield from self._recv_taken(call, found)
        finally:
            queue.remove(turn)

    def _has_come(self, call: Call, status: MPI.Status) -> bool:
        """Return whether there is a message for a receive from any."""
        if self._find(call.peer, call.tag) is not None:
            return True
        return bool(self.comm.Iprobe(MPI.ANY_SOURCE, call.tag, status))

    def probe(self, peer: int, tag: int) -> Message | None:
        """Take the next message from MPI: what it is stands in it.  The receive finds it here."""
        found = self._find(peer, tag)
        if found is None:
            if self._from_any[tag]:  # receives that are to have it
                return None
            found = take(self.comm, MPI.ANY_SOURCE if peer == ANY else peer, tag)
            if found is None:
                return None
            self._taken.append(found)
        if not found.request.Test():
            return None
        magic, code, count, nbytes, apart, text = _opened(found.data)
        if magic != _MAGIC:
            return Message(found.source, tag, "unknown", found.data.size)
        if apart != _PACKED:
            data = np.empty(_HEADER.size + nbytes, np.uint8)
            _HEADER.pack_into(data.data, 0, magic, code, count, nbytes, _PACKED, text)
            requests: list[MPI.Request] = []
            into = data[_HEADER.size :]
            self._begin(requests, self.comm.Irecv, into, found.source, apart)
            taken = Taken(found.source, tag, data, requests[0])
            self._taken[self._taken.index(found)] = taken
            if not taken.request.Test():
                return None
        return Message(found.source, tag, dtype_name(code, text), count)

    def _find(self, peer: int, tag: int) -> Taken | None:
        """Return the first message that `probe` has taken from a peer, or from any."""
        for found in self._taken:
            if found.tag == tag and peer in (ANY, found.source):
                return found
        return None

    def _claim(self, call: Call) -> Taken | None:
        """Return a message that `probe` has taken, for a receive that is to have it."""
        found = self._find(call.peer, call.tag)
        if found is not None:
            self._taken.remove(found)
        return found

    def _recv_taken(self, call: Call, found: Taken) -> Steps:
        """Receive what `probe` has taken."""
        assert call.recv is not None
        try:
            while not found.request.Test():
                yield POLL
        except BaseException as error:
            self._taken.insert(0, found)  # for the next receive
            if interrupts(error) and not isinstance(error, (Abandoned, GeneratorExit)):
                raise Expired from error
            raise
        call.peer = found.source
        yield from self._recv_from(call, found)

    def _recv_from(self, call: Call, taken: Taken | None = None) -> Steps:
        """Receive one message; when the deadline passes, cancel (`Expired` is thrown in).

        Of a message that has begun to come, MPI can't cancel the receive, and to wait for it would
        be to wait for its sender.

        Args:
            taken: the message, if it was taken from MPI already; its request is done.
        """
        if taken is None and self._taken:
            taken = self._claim(call)
            if taken is not None:
                yield from self._recv_taken(call, taken)
                return
        buffer: bytearray | Array  # for the header, and a small payload
        requests: list[MPI.Request]  # of the header, and of a payload that is apart
        if taken is None:
            buffer, requests = bytearray(self._room), []
        else:
            buffer, requests = taken.data, [taken.request]
        status, wrong, kept = MPI.Status(), None, pending()
        try:
            if not requests:
                post(requests, self.comm.Irecv, [buffer, MPI.BYTE], call.peer, call.tag)
            while not requests[0].Test(status):
                yield IDLE
            wrong = self._open(call, buffer, requests)
            if len(requests) > 1:
                while not requests[1].Test():
                    yield POLL
        except MPI.Exception as error:
            if error.Get_error_class() != MPI.ERR_TRUNCATE:
                raise
            self._received[call.peer] += 1
            # As much came as there was room for.
            wrong = _wrong(call, _opened(buffer), call.peer) if buffer[0] else None
            raise wrong or CollectiveMismatchError(
                f"{call.describe()}: the message that came is longer than the array. "
                "Receive into an array of the sender's size; the message is lost. "
                "pg.probe(src, tag) tells what the next one is before it is received"
            ) from error
        except (Abandoned, GeneratorExit):
            for request in requests:
                if request != MPI.REQUEST_NULL:
                    request.Cancel()
                    kept.append(request)
            raise
        except BaseException as error:  # `Expired`, or a signal handler's
            begun = len(requests) > 1
            if not requests or (not begun and _cancelled(requests[0], status, error)):
                raise Expired from error
            wrong = _wrong(call, _opened(buffer), call.peer)
            if not begun:
                self._open(call, buffer, requests)
            if len(requests) > 1:
                _finish(requests[1], error)
            if not isinstance(error, Expired):
                call.result = call.peer
                self._received[call.peer] += 1
                raise Completed(wrong) from error
        call.result = call.peer
        self._received[call.peer] += 1
        if wrong is not None:
            raise wrong

    def _open(
        self, call: Call, buffer: bytearray | Array, requests: list[MPI.Request]
    ) -> CollectiveMismatchError | None:
        """Take the payload of a message whose header has come, or begin to receive it.

        Return what is wrong with the message, if something is.  Its payload is received then, too,
        but into other memory.
        """
        header = _opened(buffer)
        wrong = _wrong(call, header, call.peer)
        _, _, _, nbytes, tag, _ = header
        if wrong is None:
            assert call.recv is not None
            into = call.recv.flat().view(np.uint8)
            if tag == _PACKED:
                into[...] = np.frombuffer(buffer, np.uint8, nbytes, _HEADER.size)
        elif nbytes and tag != _PACKED:
            into = np.empty(nbytes, np.uint8)
        if nbytes and tag != _PACKED:
            self._begin(requests, self.comm.Irecv, into, call.peer, tag)
        return wrong

    def _begin(
        self,
        requests: list[MPI.Request],
        start: Callable[..., MPI.Request],
        payload: Array,
        peer: int,
        tag: int,
    ) -> None:
        """Begin to send or receive a payload that is apart: one message, whatever its size."""
        if payload.size <= self._most:
            post(requests, start, [payload, MPI.BYTE], peer, tag)
            return
        starts = range(0, payload.size, self._most)
        counts = [min(self._most, payload.size - at) for at in starts]
        pieces = MPI.BYTE.Create_hindexed(counts, starts).Commit()
        post(requests, start, [payload, 1, pieces], peer, tag)
        pieces.Free()

    def clear(self, state: GroupState) -> Steps:
        """End all messages of the group: all its ranks are here, and none sends any more.

        Where something is under way, or was never received, each rank learns how many messages were
        sent to it.  It drops those that no receive takes, so that the sends end, too, and sends a
        list of them to their senders.  When it has all, the receives that are left can match
        nothing, and are cancelled.
        (Under Open MPI 5.0 a message that is still on its way when its communicator is freed comes
        to the next one, whose calls it blocks.)
        """
        sent, received = self.counts()
        open_ends = sum(sent) - sum(received), len(state.beside)
        if not (yield from agreement.reduced(self.comm, open_ends, MPI.SUM)).any():
            return
        sends = sorted(
            (task for task in state.beside if not task.call.kind.receives),
            key=lambda task: task.called,
        )
        everyone = range(self.size)
        due = yield from agreement.exchanged(self.comm, sent)
        dropped: dict[int, list[tuple[int, int, int]]] = {}
        while (due > self.counts()[1]).any():
            found = yield from self.drop(state)
            if found is None:
                yield POLL
            else:
                dropped.setdefault(found[0], []).append(found[1:])
        for task in [task for task in state.beside if task.call.kind.receives]:
            unmatched = CollectiveMismatchError(
                f"{task.call.describe()} at {task.place()} was cancelled at the end of group "
                f"{state.name!r}: no message came for it"
            )
            engine().cancel(task, unmatched, unmatched)
        # (After this exchange no rank looks for messages: those that follow it are not dropped.)
        counts = [len(dropped.get(rank, ())) for rank in everyone]
        lost = yield from agreement.exchanged(self.comm, counts)
        tables = {int(rank): np.empty((lost[rank], 3), np.int64) for rank in np.flatnonzero(lost)}
        tag = exchange_tag()
        requests = [self.comm.Irecv([t, MPI.INT64_T], rank, tag) for rank, t in tables.items()]
        for rank, messages in dropped.items():
            requests.append(self.comm.Isend([np.array(messages), MPI.INT64_T], rank, tag))
        yield from until_all(requests)
        while not all(task.done for task in sends):
            yield POLL
        for rank, table in tables.items():
            _note_lost(state, rank, table.tolist(), sends)

    def counts(self) -> tuple[list[int], list[int]]:
        """Return how many messages were sent, by receiver, and received, by sender."""
        everyone = range(self.size)
        return [self._sent[r] for r in everyone], [self._received[r] for r in everyone]

    def drop(self, state: GroupState) -> Generator[int, None, Dropped | None]:
        """Take a message that no receive is to have, if there is one, and return what it was."""
        found = self._unwanted() or state.peers.unwanted(partial(self._is_awaited, state))
        if found is None:
            return None
        yield from until(found.request, POLL)
        magic, code, count, nbytes, tag, _ = _opened(found.data)
        if magic != _MAGIC:
            return None
        if tag != _PACKED:
            payload: list[MPI.Request] = []
            into = np.empty(nbytes, np.uint8)
            self._begin(payload, self.comm.Irecv, into, found.source, tag)
            yield from until_all(payload)
        self._received[found.source] += 1
        return found.source, found.tag, code, count

    def _unwanted(self) -> Taken | None:
        """Return a message that `probe` has taken, and that no receive waits for."""
        for found in self._taken:
            if not self._from_any[found.tag]:
                self._taken.remove(found)
                return found
        return None

    def _is_awaited(self, state: GroupState, source: int, tag: int) -> bool:
        """Return whether a message is one that will be received: the payload of another is."""
        return tag in self._tags or any(
            task.call.kind.receives and task.call.tag == tag and task.call.peer in (ANY, source)
            for task in state.beside
        )


class SendsMessages(Transport):
    """What transports share that carry messages: they have them from one object."""

    messages: Messages

    def send(self, call: Call) -> Steps:
        return self.messages.send(call)

    def recv(self, call: Call) -> Steps:
        return self.messages.recv(call)

    def rings(self, state: GroupState, recorder: Recorder) -> Rings | None:
        return self.messages.direct(state, recorder)

    def probe(self, peer: int, tag: int) -> Message | None:
        return self.messages.probe(peer, tag)

    def clear(self, state: GroupState) -> Steps:
        return self.messages.clear(state)


def packed_header(code: int, count: int, nbytes: int, tag: int, text: bytes) -> bytes:
    """Return the header of a message whose payload comes apart."""
    return _HEADER.pack(_MAGIC, code, count, nbytes, tag, text)


def _opened(data: bytearray | Array) -> _Header:
    """Return a message's header; of one that is not ours, none that is known."""
    if len(data) < _HEADER.size:
        return b"", 0, 0, 0, _PACKED, b""
    header = _HEADER.unpack_from(cast(bytearray, data))
    return cast(_Header, header) if header[0] == _MAGIC else (b"", 0, 0, 0, _PACKED, b"")


def _note_lost(state: GroupState, rank: int, lost: list[list[int]], sends: list[Task]) -> None:
    """Give the sends of messages that a rank has dropped their error.

    Of messages that are alike the receiver has taken the first ones.
    """
    for message in lost:
        for task in reversed(sends):
            call = task.call
            assert call.send is not None
            alike = [call.tag, call.send.dtype.code, call.send.total] == message
            if call.peer == rank and alike and task.error is None:
                task.error = CollectiveMismatchError(
                    f"{call.describe()} at {task.place()} was not received by the end of group "
                    f"{state.name!r}: its message was dropped"
                )
                task.ended()
                break


def _wrong(call: Call, header: _Header, source: int) -> CollectiveMismatchError | None:
    """Return what is wrong with a message, if it isn't of the array's dtype and size.

    The group stays usable.
    """
    assert call.recv is not None
    magic, code, count, _, _, text = header
    if magic != _MAGIC:
        return CollectiveMismatchError(
            f"{call.describe()}: rank {source} sent a message that is not mpicoll's. "
            "Use another tag for your own messages on pg.comm"
        )
    if code == call.recv.dtype.code and count == call.recv.total:
        return None
    return mismatch(call, code, count, text, source)


def mismatch(
    call: Call, code: int, count: int, text: bytes, source: int
) -> CollectiveMismatchError:
    """Return the error of a receive whose message is of another dtype or size than its array."""
    assert call.recv is not None
    sent = f"{dtype_name(code, text)}[{count}]"
    return CollectiveMismatchError(
        f"{call.describe()}: rank {source} sent {sent}, but the array is "
        f"{call.recv.dtype.name}[{call.recv.total}]. The message is lost; pg.probe(src, tag) tells "
        "what the next one is before it is received"
    )


def dtype_name(code: int, text: bytes) -> str:
    """Return the name of the dtype that a header holds."""
    return BY_CODE[code].name if code in BY_CODE else text.rstrip(b"\0").decode(errors="replace")


def _cancelled(request: MPI.Request, status: MPI.Status, because: BaseException) -> bool:
    """Cancel a receive; return whether it is, or else its message has come.

    Raises:
        Uncancelled: neither is the case within a moment.
    """
    if request == MPI.REQUEST_NULL:  # it was found complete just before
        return bool(status.Is_cancelled())
    request.Cancel()
    until_then = monotonic() + CANCELLING
    while not request.Test(status):
        if monotonic() > until_then:
            pending().append(request)
            raise Uncancelled from because
    return bool(status.Is_cancelled())


def _finish(request: MPI.Request, because: BaseException) -> None:
    """Wait a moment for a payload, the header of which has come.

    Raises:
        Uncancelled: its sender goes no further.
    """
    until_then = monotonic() + CANCELLING
    while not request.Test():
        if monotonic() > until_then:
            pending().append(request)
            raise Uncancelled from because
