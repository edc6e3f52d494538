"""What mpicoll asks of the MPI library, for ranks that are threads of one process.

The names, arguments and results are mpi4py's, as far as the library uses them: communicators made
by splitting, merging and duplicating, messages, and collectives in their nonblocking form.  Data
are copied when they are given; a large send is done when it is received, as with MPI.  A collective
is done when all ranks have begun it; each then takes its result out of what they gave.

One lock guards all of it, and one condition tells threads that block that something has changed.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import UnsupportedError
from ..runtime.process import Process
from ..runtime.settings import machine
from ..transports.kernels import UFUNCS

Bytes: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

ANY = -1
UNDEFINED = -32766
_LOOK = 0.01  # seconds after which a thread that blocks looks again
HIGHEST_TAG = 2**30
EAGER = 2**16  # bytes of a message that the sender need not wait for


class Ended(SystemExit):
    """The world was ended, by `Abort` on one of its ranks."""


class Failure(RuntimeError):
    """An error of the library: the arguments are wrong, or a message is longer than its room."""

    def __init__(self, text: str, code: int = 16) -> None:
        super().__init__(text)
        self._code = code

    def Get_error_class(self) -> int:
        return self._code


ERR_TRUNCATE = 15


class World:
    """Ranks that are threads.

    Attributes:
        size: how many.
        lock: guards what they share.
        changed: tells those who block that something has.
        ended: why `Abort` was called; "": it wasn't.
        polls: by rank, how often it has looked for a message in vain: a rank that waits does so.
        gone: ranks that have ended.
        processes: the ranks, as the library sees them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.ended = ""
        self.polls = [0] * size
        self.gone: set[int] = set()
        self.processes: list[Process] = []
        self.everyone = Context(self, tuple(range(size)))
        self.meetings: dict[Hashable, Meeting] = {}  # that are not over

    def check(self) -> None:
        if self.ended:
            raise Ended(self.ended)

    def end(self, why: str) -> None:
        """Have every rank end at its next call."""
        with self.lock:
            self.ended = self.ended or why
            self.changed.notify_all()

    def wait(self, rank: int, until: Callable[[], bool]) -> None:
        """Block a rank until something is the case; under the lock."""
        while not until():
            self.check()
            self.changed.wait(_LOOK)
            self.polls[rank] += 1

    def meet(self, key: Hashable, rank: int, size: int, given: Any) -> Meeting:
        """Enter a meeting, giving something to it; `size` ranks enter."""
        with self.lock:
            self.check()
            meeting = self.meetings.setdefault(key, Meeting(size))
            meeting.given[rank] = given
            if meeting.is_full:
                del self.meetings[key]
                self.changed.notify_all()
            return meeting


class Meeting:
    """What some ranks give to one another.

    Attributes:
        given: by each, by its rank.
        made: what the first to ask has made of it, for all.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self.given: dict[int, Any] = {}
        self.made: dict[Hashable, Any] = {}

    @property
    def is_full(self) -> bool:
        return len(self.given) == self._size


class Context:
    """What the ranks of one communicator share: who they are, and what was sent.

    Attributes:
        members: ranks of the world.
        arrived: by rank, messages that no receive has taken, in their order.
        posted: by rank, receives that have no message.
    """

    def __init__(self, world: World, members: tuple[int, ...]) -> None:
        self.world = world
        self.members = members
        self.arrived: list[list[Message]] = [[] for _ in members]
        self.posted: list[list[Request]] = [[] for _ in members]


class Datatype:
    """A type of elements; `kind` is NumPy's, in which they are reduced."""

    def __init__(self, kind: Any = np.uint8, count: int = 1) -> None:
        self.kind = np.dtype(kind)
        self.nbytes = self.kind.itemsize * count

    @classmethod
    def fromcode(cls, code: str) -> Datatype:
        return cls(code)

    def Create_contiguous(self, count: int) -> Datatype:
        return Datatype(self.kind, count)

    def Create_hindexed(self, lengths: Sequence[int], starts: Iterable[int]) -> Datatype:
        """Pieces that follow one another, as the library makes them of one that is too long."""
        return Datatype(self.kind, sum(lengths))

    def Commit(self) -> Datatype:
        return self

    def Free(self) -> None:
        """Nothing is held."""


BYTE = Datatype()


class Status:
    """What is known of a message, or of a receive that was cancelled."""

    def __init__(self) -> None:
        self.message: Message | None = None
        self.cancelled = False

    def Get_source(self) -> int:
        return ANY if self.message is None else self.message.source

    def Get_tag(self) -> int:
        return ANY if self.message is None else self.message.tag

    def Get_count(self, datatype: Datatype = BYTE) -> int:
        return 0 if self.message is None else self.message.data.size // datatype.nbytes

    Get_elements = Get_count

    def Is_cancelled(self) -> bool:
        return self.cancelled


class Message:
    """One that was sent."""

    def __init__(self, source: int, tag: int, data: Bytes) -> None:
        self.source, self.tag, self.data = source, tag, data
        self.is_taken = data.size <= EAGER  # by its receiver, or as good as

    def fits(self, source: int, tag: int) -> bool:
        return source in (ANY, self.source) and tag in (ANY, self.tag)

    def Recv(self, spec: Any, status: Status | None = None) -> None:
        if status is not None:
            status.message = self
        _deliver(self, spec)

    def Irecv(self, spec: Any) -> Request:
        request = Request(lambda: True, lambda: _deliver(self, spec))
        request.message = self
        return request


class Request:
    """Something under way: it is over when `ready`, and then `finish` is called, once."""

    def __init__(self, ready: Callable[[], bool], finish: Callable[[], None]) -> None:
        self._ready, self._finish = ready, finish
        self.message: Message | None = None  # that a receive has got
        self.wanted = ANY, ANY  # by a receive: source and tag
        self.cancelled = False
        self._over = False
        self._withdraw: Callable[[], bool] = lambda: False

    def __eq__(self, other: object) -> bool:  # one that is over is null, as mpi4py makes it
        return self is other or (isinstance(other, Request) and self._over and other._over)

    __hash__ = None  # type: ignore[assignment]

    def Test(self, status: Status | None = None) -> bool:
        if self._over:
            return True
        if not (self.cancelled or self._ready()):
            return False
        self._over = True
        if status is not None:
            status.message, status.cancelled = self.message, self.cancelled
        if not self.cancelled:
            self._finish()
        return True

    def Wait(self, status: Status | None = None) -> None:
        while not self.Test(status):
            time.sleep(_LOOK / 100)

    def Cancel(self) -> None:
        """Cancel a receive, if no message has come for it."""
        self.cancelled = self.cancelled or self._withdraw()


REQUEST_NULL = Request(lambda: True, lambda: None)
REQUEST_NULL.Test()


class Group:
    """Some ranks of the world, in an order."""

    def __init__(self, members: Sequence[int]) -> None:
        self.members = tuple(members)

    def Incl(self, ranks: Sequence[int]) -> Group:
        return Group([self.members[rank] for rank in ranks])

    def Translate_ranks(self, ranks: Sequence[int] | None, other: Group) -> list[int]:
        places = {member: place for place, member in enumerate(other.members)}
        own = self.members if ranks is None else [self.members[rank] for rank in ranks]
        return [places.get(member, UNDEFINED) for member in own]

    def Free(self) -> None:
        """Nothing is held."""


class Comm:
    """A communicator, as one of its ranks holds it.

    Args:
        context: what its ranks share; None: it is null, or was freed.
        rank: this rank's number in it.
    """

    def __init__(self, context: Context | None = None, rank: int = 0) -> None:
        self._context = context
        self._rank = rank
        self._calls = itertools.count()  # of collectives: all ranks make them in one order
        self._attributes: dict[int, Any] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Comm) and self._context is other._context

    def __hash__(self) -> int:
        return hash(self._context)

    _keys = itertools.count(1)

    @classmethod
    def Create_keyval(cls, **_: Any) -> int:
        return next(cls._keys)

    @staticmethod
    def Get_parent() -> Any:
        return COMM_NULL

    def Get_attr(self, key: int) -> Any:
        return HIGHEST_TAG if key == TAG_UB else self._attributes.get(key)

    def Set_attr(self, key: int, value: Any) -> None:
        self._attributes[key] = value

    @property
    def context(self) -> Context:
        if self._context is None:
            raise Failure("this communicator is null, or was freed")
        self._context.world.check()
        return self._context

    @property
    def _own(self) -> int:
        """This rank's number in the world."""
        return self.context.members[self._rank]

    def Get_rank(self) -> int:
        return self._rank

    def Get_size(self) -> int:
        return len(self.context.members)

    def Get_group(self) -> Group:
        return Group(self.context.members)

    rank = property(Get_rank)
    size = property(Get_size)

    def Free(self) -> None:
        self._attributes.clear()
        self._context = None

    def Abort(self, code: int = 1) -> None:
        """End the world: every rank's next call raises `Ended`, and so does this one."""
        world = self.context.world
        world.end(f"rank {self._rank} ended the job, with exit code {code}")
        world.check()

    # ---- messages ----

    def Isend(self, spec: Any, dest: int, tag: int = 0) -> Request:
        context, message = self.context, Message(self._rank, tag, _taken(spec))
        with context.world.lock:
            for request in context.posted[dest]:
                if message.fits(*request.wanted):
                    context.posted[dest].remove(request)
                    request.message, message.is_taken = message, True
                    break
            else:
                context.arrived[dest].append(message)

        def ready() -> bool:
            context.world.check()
            return message.is_taken

        return Request(ready, lambda: None)

    def Irecv(self, spec: Any, source: int = ANY, tag: int = ANY) -> Request:
        context = self.context
        posted = context.posted[self._rank]

        def deliver() -> None:
            assert request.message is not None
            _deliver(request.message, spec)

        def withdraw() -> bool:
            with context.world.lock:
                waits = any(one is request for one in posted)
                posted[:] = [one for one in posted if one is not request]
                return waits

        def ready() -> bool:
            context.world.check()
            return request.message is not None

        request = Request(ready, deliver)
        request.wanted, request._withdraw = (source, tag), withdraw
        with context.world.lock:
            request.message = self._find(source, tag, take=True)
            if request.message is None:
                posted.append(request)
        return request

    def Send(self, spec: Any, dest: int, tag: int = 0) -> None:
        self.Isend(spec, dest, tag).Wait()

    def Recv(
        self, spec: Any, source: int = ANY, tag: int = ANY, status: Status | None = None
    ) -> None:
        context = self.context
        with context.world.lock:
            context.world.wait(self._own, lambda: self._find(source, tag) is not None)
            message = self._find(source, tag, take=True)
        assert message is not None
        message.Recv(spec, status)

    def Improbe(
        self, source: int = ANY, tag: int = ANY, status: Status | None = None
    ) -> Message | None:
        return self._probe(source, tag, status, take=True)

    def Iprobe(self, source: int = ANY, tag: int = ANY, status: Status | None = None) -> bool:
        return self._probe(source, tag, status) is not None

    def _probe(
        self, source: int, tag: int, status: Status | None, *, take: bool = False
    ) -> Message | None:
        context = self.context
        with context.world.lock:
            message = self._find(source, tag, take=take)
            if message is None:
                context.world.polls[self._own] += 1
        if status is not None:
            status.message = message
        return message

    def _find(self, source: int, tag: int, *, take: bool = False) -> Message | None:
        arrived = self.context.arrived[self._rank]
        for message in arrived:
            if message.fits(source, tag):
                if take:
                    arrived.remove(message)
                    message.is_taken = True
                return message
        return None

    # ---- collectives ----

    def _begin(self, given: Any, finish: Callable[[list[Any]], None]) -> Request:
        """Give something to the next collective; `finish` gets what all gave, by rank."""
        context = self.context
        size = len(context.members)
        key = context, next(self._calls)
        meeting = context.world.meet(key, self._rank, size, given)

        def ready() -> bool:
            context.world.check()
            return meeting.is_full

        return Request(ready, lambda: finish([meeting.given[rank] for rank in range(size)]))

    def _blocking(self, key: Hashable, rank: int, size: int, given: Any) -> Meeting:
        world = self.context.world
        with world.lock:
            meeting = world.meet(key, rank, size, given)
            world.wait(self._own, lambda: meeting.is_full)
        return meeting

    def _next(self, given: Any) -> Meeting:
        context = self.context
        return self._blocking((context, next(self._calls)), self._rank, self.size, given)

    def Iallreduce(self, send: Any, recv: Any, op: str) -> Request:
        return self._reduce(recv if send is IN_PLACE else send, recv, op, slice(None))

    def Ireduce(self, send: Any, recv: Any, op: str, root: int = 0) -> Request:
        into = recv if self._rank == root else None
        return self._reduce(recv if send is IN_PLACE else send, into, op, slice(None))

    def Iscan(self, send: Any, recv: Any, op: str) -> Request:
        given = recv if send is IN_PLACE else send
        return self._reduce(given, recv, op, slice(None), self._rank + 1)

    def Iexscan(self, send: Any, recv: Any, op: str) -> Request:
        return self._reduce(send, recv if self._rank else None, op, slice(None), self._rank)

    def Ireduce_scatter(self, send: Any, recv: Any, counts: Sequence[int], op: str) -> Request:
        start = sum(counts[: self._rank])
        return self._reduce(send, recv, op, slice(start, start + counts[self._rank]))

    def Ireduce_scatter_block(self, send: Any, recv: Any, op: str) -> Request:
        count = _view(recv).size // _type(recv).nbytes
        return self.Ireduce_scatter(send, recv, [count] * self.size, op)

    def _reduce(
        self, send: Any, recv: Any, op: str, part: slice, upto: int | None = None
    ) -> Request:
        kind, function = _type(send).kind, UFUNCS[op]

        def finish(given: list[Bytes]) -> None:
            if recv is None:
                return
            arrays = [data.view(kind)[part] for data in given[:upto]]
            total = arrays[0].copy()
            with np.errstate(all="ignore"):
                for array in arrays[1:]:
                    function(total, array, out=total, casting="unsafe")
            _view(recv)[:] = total.view(np.uint8)

        return self._begin(_taken(send), finish)

    def Ibcast(self, spec: Any, root: int = 0) -> Request:
        def finish(given: list[Any]) -> None:
            if self._rank != root:
                _view(spec)[:] = given[root]

        return self._begin(_taken(spec) if self._rank == root else None, finish)

    def Iallgather(self, send: Any, recv: Any) -> Request:
        def finish(given: list[Bytes]) -> None:
            for block, data in zip(_blocks(recv, self.size), given, strict=True):
                block[:] = data

        return self._begin(_taken(send), finish)

    def Igather(self, send: Any, recv: Any, root: int = 0) -> Request:
        if self._rank == root:
            return self.Iallgather(send, recv)
        return self._begin(_taken(send), lambda given: None)

    def Iscatterv(self, send: Any, recv: Any, root: int = 0) -> Request:
        mine = None
        if self._rank == root:
            mine = [block.copy() for block in _blocks(send, self.size)]

        def finish(given: list[Any]) -> None:
            if recv is not IN_PLACE:
                _view(recv)[:] = given[root][self._rank]

        return self._begin(mine, finish)

    def Ialltoall(self, send: Any, recv: Any) -> Request:
        def finish(given: list[list[Bytes]]) -> None:
            for block, blocks in zip(_blocks(recv, self.size), given, strict=True):
                block[:] = blocks[self._rank]

        return self._begin([block.copy() for block in _blocks(send, self.size)], finish)

    Iallgatherv, Igatherv, Ialltoallv = Iallgather, Igather, Ialltoall

    def Barrier(self) -> None:
        self._next(None)


class Intracomm(Comm):
    """A communicator of one set of ranks."""

    def Idup(self) -> tuple[Intracomm, Request]:
        context, size = self.context, self.size
        key = context, next(self._calls)
        meeting = context.world.meet(key, self._rank, size, None)
        made = _shared(meeting, "dup", context.world, context.members)
        return Intracomm(made, self._rank), Request(lambda: meeting.is_full, lambda: None)

    def Dup(self) -> Intracomm:
        meeting, context = self._next(None), self.context
        return Intracomm(_shared(meeting, "dup", context.world, context.members), self._rank)

    def Split(self, color: int = 0, key: int = 0) -> Intracomm:
        meeting, context = self._next((color, key)), self.context
        if color == UNDEFINED:
            return Intracomm()
        ranks = sorted(
            (key, rank) for rank, (other, key) in meeting.given.items() if other == color
        )
        members = tuple(context.members[rank] for _, rank in ranks)
        made = _shared(meeting, color, context.world, members)
        return Intracomm(made, members.index(self._own))

    def Create_group(self, group: Group, tag: int = 0) -> Intracomm:
        context, members = self.context, group.members
        rank = members.index(self._own)
        meeting = self._blocking((context, members, tag), rank, len(members), None)
        return Intracomm(_shared(meeting, "group", context.world, members), rank)

    def Create_intercomm(self, leader: int, peers: Comm, remote: int, tag: int = 0) -> Intercomm:
        """Connect with another set of ranks, whose leader is rank `remote` of `peers`."""
        context = self.context
        world, mine = context.world, context.members
        ours, theirs = mine[leader], peers.context.members[remote]
        if self._rank == leader:
            pair = tuple(sorted((ours, theirs)))
            met = self._blocking(("intercomm", pair, tag), int(ours > theirs), 2, mine)
            shared = _shared(met, "inter", world, mine + met.given[int(ours < theirs)])
            others = met.given[int(ours < theirs)]
            told = self._next((shared, others))
        else:
            told = self._next(None)
        shared, others = told.given[leader]
        return Intercomm(shared, self._rank, mine, others)


class Intercomm(Comm):
    """A communicator between two sets of ranks."""

    def __init__(
        self, context: Context, rank: int, mine: tuple[int, ...], others: tuple[int, ...]
    ) -> None:
        super().__init__(context, rank)
        self._sides = mine, others

    def Merge(self, high: bool = False) -> Intracomm:
        """Make one set of both; those that are not `high` come first."""
        context, (mine, others) = self.context, self._sides
        members = others + mine if high else mine + others
        own = mine[self._rank]
        meeting = self._blocking((context, "merge"), members.index(own), len(members), high)
        if len({meeting.given[members.index(rank)] for rank in (mine[0], others[0])}) != 2:
            raise Failure("one side of an intercommunicator must be high, the other not")
        made = _shared(meeting, "merge", context.world, members)
        return Intracomm(made, members.index(own))


def _shared(meeting: Meeting, key: Hashable, world: World, members: tuple[int, ...]) -> Context:
    """Return what the ranks of a new communicator share: the first that asks makes it."""
    with world.lock:
        made: Context = meeting.made.setdefault(key, Context(world, members))
        return made


# ---- buffers ----


def _type(spec: Any) -> Datatype:
    last = spec[-1] if isinstance(spec, (list, tuple)) else BYTE
    return last if isinstance(last, Datatype) else BYTE


def _view(spec: Any) -> Bytes:
    """Return the bytes of a buffer, or of the front of it that its count means."""
    whole = isinstance(spec, (list, tuple))
    data = spec[0] if whole else spec
    if isinstance(data, np.ndarray):
        view: Bytes = data.reshape(-1).view(np.uint8)
    else:
        view = np.frombuffer(data, np.uint8) if len(data) else np.empty(0, np.uint8)
    if whole and len(spec) == 3 and isinstance(spec[1], int):
        view = view[: spec[1] * spec[2].nbytes]
    return view


def _taken(spec: Any) -> Bytes:
    return _view(spec).copy()


def _blocks(spec: Any, size: int) -> list[Bytes]:
    """Return the block of each rank: by counts and displacements, or equal ones."""
    view = _view(spec)
    if len(spec) == 3:
        counts, starts = spec[1]
        width = spec[2].nbytes
        return [
            view[start * width : (start + count) * width]
            for start, count in zip(starts, counts, strict=True)
        ]
    length = view.size // size
    return [view[rank * length : (rank + 1) * length] for rank in range(size)]


def _deliver(message: Message, spec: Any) -> None:
    into, data = _view(spec), message.data
    length = min(into.size, data.size)
    into[:length] = data[:length]
    if length < data.size:
        raise Failure(
            f"message truncated: {data.size} bytes came, and there is room for {into.size}",
            ERR_TRUNCATE,
        )


# ---- the library as one rank sees it ----

COMM_NULL = Intracomm()
IN_PLACE = object()
TAG_UB = 0  # the key of an attribute that every communicator has

_NUMBERS = {
    "INT16_T": Datatype(np.int16),
    "INT32_T": Datatype(np.int32),
    "INT64_T": Datatype(np.int64),
    "UINT8_T": Datatype(np.uint8),
    "C_DOUBLE_COMPLEX": Datatype(np.complex128),
    "C_LONG_DOUBLE_COMPLEX": Datatype(np.clongdouble),
}


class Mpi:
    """The names that stand for mpi4py's, as one rank of a world sees them."""

    ANY_SOURCE = ANY_TAG = ANY
    BYTE, COMM_NULL, ERR_TRUNCATE, IN_PLACE = BYTE, COMM_NULL, ERR_TRUNCATE, IN_PLACE
    REQUEST_NULL, TAG_UB, UNDEFINED = REQUEST_NULL, TAG_UB, UNDEFINED
    Comm, Datatype, Exception = Comm, Datatype, Failure
    Intercomm, Intracomm = Intercomm, Intracomm
    Message, Request, Status = Message, Request, Status
    THREAD_MULTIPLE = 3

    def __init__(self, world: World, rank: int) -> None:
        self.world = world
        self.COMM_WORLD = Intracomm(world.everyone, rank)
        self.COMM_SELF = Intracomm(Context(world, (rank,)), 0)

    def __getattr__(self, name: str) -> Any:
        if name in UFUNCS:
            return name
        if name in _NUMBERS:
            return _NUMBERS[name]
        raise UnsupportedError(
            f"ranks that are threads can't do what takes MPI.{name}: start the program with mpiexec"
        )

    @staticmethod
    def Query_thread() -> int:
        return Mpi.THREAD_MULTIPLE

    @staticmethod
    def Is_finalized() -> bool:
        return False

    @staticmethod
    def Get_processor_name() -> str:
        return machine()

    @staticmethod
    def get_vendor() -> tuple[str, tuple[int, ...]]:
        return "threads", (0,)
