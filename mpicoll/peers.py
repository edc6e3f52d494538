"""What the members of a group know of one another outside their collectives.

A rank that waits, or that leaves a call early, sends short notices point to point on the
group's communicator, under a tag of our own:

    QUERY  "where are you?"               asked shortly before a deadline
    STATE  "I am in call k; it is ..."    the answer, given by every rank that waits
    LEFT   "I left call k, and why"       by a rank that timed out, raised or aborted
    DIED   "rank k died, and how"         by a rank that noticed it
    HEARD  "I know that it is broken"     by a rank that only follows another's failure
    GONE   "I am leaving the process"     by every member of a broken group, at its end; again
                                          when MPI has nothing pending there
    JOIN   "I am in shrink_group"         to the rank that decides there, and
    PLAN   "these will be members"        its answer (rendezvous.py)

Nothing is sent while all goes well.  That a peer of this machine died is seen without a word from
it (alive.py); deaths elsewhere are MPI's to report, where its fault tolerance is on.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import alive
from .alive import Identity, watch
from .config import survives_deaths
from .library import MPI, notice_tag, pending

QUERY, STATE, LEFT, DIED, HEARD, GONE, JOIN, PLAN = range(8)

_HEAD = struct.Struct("<qqq")  # what, call number (or rank), whether the sender waits in that call
_PIECE = 2**30  # bytes, of which MPI can count so many at a time
_TEXT = 3072  # bytes of text in a notice at most: no library waits for a receiver to send so much


@dataclass(frozen=True, slots=True)
class Notice:
    """What a peer said last: in or about which call, and in its own words."""

    seq: int
    waiting: bool
    text: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message that comes for nobody."""

    source: int
    tag: int
    data: np.ndarray[Any, Any]
    request: MPI.Request


class Peers:
    """The other members of one communicator, and what is known of each.

    Args:
        comm: the group's communicator.
        state: says what this rank is doing: (call number, whether it waits in it, in words).

    Attributes:
        left: the last words of those who left a call or the group.
        dead: those who died, and how.
        aware: those who know that the group is broken.
        gone: those who are at the end of their process.
        settled: those of them with whom MPI has nothing pending.
        met: how many meetings of records over MPI those at their ends have begun.
        joined: what was said by those who are in `shrink_group`.
        plan: what was decided there.
    """

    def __init__(self, comm: MPI.Comm, state: Callable[[], tuple[int, bool, str]]) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.left: dict[int, Notice] = {}
        self.dead: dict[int, str] = {}
        self.aware: set[int] = set()
        self.gone: set[int] = set()
        self.settled: set[int] = set()
        self.met: dict[int, int] = {}
        self.joined: dict[int, str] = {}
        self.plan = ""
        self.forget_node()
        self._answers: dict[int, Notice] = {}
        self._state = state
        self._tag = notice_tag()
        self._kept: list[tuple[int, MPI.Request, bytes]] = []  # unfinished sends: to whom, and what
        self._inbox = bytearray(_HEAD.size + _TEXT)
        self._watched: dict[int, Identity] = {}
        self._look_at_locks = Every(0.05)
        self._deaths_seen = 0

    def forget_node(self) -> None:
        """Do without what the memory of the node would show."""
        self.mark_left: Callable[[int], None] = lambda seq: None
        self.has_arrived: Callable[[int, int], bool] = lambda rank, seq: False
        self.last_seen: Callable[[int], str] = lambda rank: ""
        self._locks: dict[int, Callable[[], bool]] = {}

    # ---- who is alive ----

    def observe(self, others: dict[int, Identity], strangers: Collection[int]) -> None:
        """Watch ranks of this machine and pid namespace from now on; some are of other worlds."""
        for rank, who in others.items():
            if rank != self.rank:
                watch.add(who, stranger=rank in strangers)
                self._watched[rank] = who

    def observe_locks(self, locks: dict[int, Callable[[], bool]]) -> None:
        """Watch ranks through what says, for each, whether it has died."""
        self._locks = {rank: died for rank, died in locks.items() if rank != self.rank}

    def look(self) -> None:
        """Look for ranks of this machine that have died."""
        if len(watch.dead) > self._deaths_seen:
            self._deaths_seen = len(watch.dead)
            for rank, who in self._watched.items():
                if who in watch.dead:
                    self.dead.setdefault(rank, watch.dead[who])
        if self._locks and self._look_at_locks.due():
            for rank, died in self._locks.items():
                if rank not in self.dead and died():
                    self.dead[rank] = "died"

    @property
    def there(self) -> list[int]:
        """The other ranks that are neither dead nor at the end of their process."""
        away = {self.rank, *self.dead, *self.gone}
        return [rank for rank in range(self.size) if rank not in away]

    def _heard_of_deaths(self) -> bool:
        """Note the deaths that MPI has reported; return whether it is able to."""
        if not survives_deaths():
            return False
        with contextlib.suppress(MPI.Exception):
            self.comm.Ack_failed()
            failed, mine = self.comm.Get_failed(), self.comm.Get_group()
            for rank in failed.Translate_ranks(None, mine):
                self.dead.setdefault(rank, "died")
            failed.Free()
            mine.Free()
        return True

    # ---- what they say ----

    def ask(self) -> None:
        """Ask every peer where it is; the answers come in with `poll`."""
        self._answers.clear()
        self._tell_all(QUERY)

    def leave(self, seq: int, text: str, *, arrived: bool) -> None:
        """Tell every peer that this rank leaves call `seq` and makes no later one.

        `arrived` says whether it had arrived in that call before it gave up.
        """
        self._tell_all(LEFT, seq, text, arrived)
        self.mark_left(seq)

    def report_death(self, rank: int) -> None:
        """Tell every peer that a rank died, and so that this one knows that the group is broken."""
        self._tell_all(DIED, rank, self.dead[rank])

    def follow(self) -> None:
        """Tell every peer that this rank has heard of a failure, and sends no cause of its own."""
        self._tell_all(HEARD)

    def go(self, met: int, *, settled: bool) -> None:
        """Tell every peer that this process ends; `settled`, if MPI has nothing pending here.

        Args:
            met: meetings of records over MPI that this rank has begun in the group.
        """
        self._tell_all(GONE, met, waiting=not settled)

    def join(self, rank: int, text: str) -> None:
        """Tell the rank that decides what this one wants of `shrink_group`; "": nothing more."""
        self._tell(rank, JOIN, 0, False, text)

    def decide(self, rank: int, text: str) -> None:
        """Tell a rank what was decided in `shrink_group`."""
        self._tell(rank, PLAN, 0, False, text)

    def poll(self) -> None:
        """Read what the peers have said; answer their questions."""
        if self.size == 1:
            return
        self.look()
        try:
            self._read_all()
        except MPI.Exception:
            if not self._heard_of_deaths():
                raise
            self._read_all()

    def _read_all(self) -> None:
        status = MPI.Status()
        # What was found is received, not looked for again.  A receive from any does not return
        # under MPICH between nodes and where worlds have merged; and one from the source that was
        # found fails under Open MPI's fault tolerance if that has died.
        while message := self.comm.Improbe(MPI.ANY_SOURCE, self._tag, status):
            source = status.Get_source()
            message.Recv([self._inbox, MPI.BYTE], status)
            what, seq, waiting = _HEAD.unpack_from(self._inbox)
            text = self._inbox[_HEAD.size : status.Get_count(MPI.BYTE)].decode(errors="replace")
            self._take(source, what, seq, bool(waiting), text)

    def _take(self, source: int, what: int, seq: int, waiting: bool, text: str) -> None:
        if what == QUERY:
            self._tell(source, STATE, *self._state())
        elif what == STATE:
            self._answers[source] = Notice(seq, waiting, text)
        elif what == JOIN:
            self.joined[source] = text
        elif what == PLAN:
            self.plan = text
        else:
            self.aware.add(source)
            if what == LEFT:
                self.left.setdefault(source, Notice(seq, waiting, text))
            elif what == DIED:
                self.dead.setdefault(seq, text)
            elif what == GONE:
                self.gone.add(source)
                self.met[source] = seq
                if not waiting:
                    self.settled.add(source)

    def drop_messages(self) -> None:
        """Receive what was sent to this rank, and that nobody will receive: its sender may end."""
        while found := self.unwanted():
            pending.append(found.request)

    def unwanted(
        self, wanted: Callable[[int, int], bool] = lambda source, tag: False
    ) -> Dropped | None:
        """Begin to receive the next message that is not `wanted`.

        Args:
            wanted: whether somebody is to receive one from this rank, with this tag.
        """
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status):
            source, tag = status.Get_source(), status.Get_tag()
            if tag == self._tag:
                self.poll()
                continue
            if wanted(source, tag):
                return None
            message = self.comm.Improbe(source, tag, status)
            if message is None:
                return None
            # All of it: too small a buffer is overrun by Open MPI 5.0, and left empty by MPICH.
            data = np.empty(status.Get_elements(MPI.BYTE), np.uint8)
            starts = range(0, max(data.size, 1), _PIECE)
            pieces = MPI.BYTE.Create_hindexed([data[s : s + _PIECE].size for s in starts], starts)
            pieces.Commit()
            request = message.Irecv([data, 1, pieces])
            pieces.Free()
            return Dropped(source, tag, data, request)
        return None

    def answers(self) -> dict[int, str]:
        """Return what each peer has said of where it is; nothing of those that did not answer."""
        return {rank: heard.text for rank, heard in self._answers.items()}

    def missing(self, seq: int) -> dict[int, str]:
        """Return the peers that have not said that they are in call `seq`, and what is known."""
        found = {}
        for rank in range(self.size):
            if rank == self.rank or self.has_arrived(rank, seq):
                continue
            heard = self._answers.get(rank)
            if rank in self.left and not (heard and heard.waiting):
                heard = self.left[rank]
            if heard is None:
                found[rank] = self._silent(rank, seq)
            elif heard.seq < seq or not heard.waiting:
                found[rank] = heard.text
        return found

    def _silent(self, rank: int, seq: int) -> str:
        """Say what is known of a peer that has not answered."""
        who = self._watched.get(rank)
        if rank in self.dead:
            return self.dead[rank]
        if who is not None and alive.is_stopped(who):
            said = f"was stopped by a signal (its process {who.pid} doesn't run)"
        else:
            said = "gave no answer: it is busy outside mpicoll, stopped or dead"
        last = self.last_seen(rank)
        if not last and seq > 1:
            last = f"last heard of in call #{seq - 1}"
        return f"{said}; {last}" if last else said

    def all_sent(self) -> bool:
        """Return whether every notice of this rank has left it."""
        self._kept = [kept for kept in self._kept if not _is_over(kept[1])]
        return not self._kept

    def is_stuck(self) -> bool:
        """Return whether MPI holds back a notice to a rank that knows of the failure.

        The room for messages to ranks that don't take theirs is limited, and theirs may use it up.
        """
        return not self.all_sent() and any(rank in self.aware for rank, _, _ in self._kept)

    def _tell_all(self, what: int, seq: int = 0, text: str = "", waiting: bool = False) -> None:
        for rank in range(self.size):
            if rank != self.rank and rank not in self.dead:
                self._tell(rank, what, seq, waiting, text)

    def _tell(self, rank: int, what: int, seq: int, waiting: bool, text: str) -> None:
        self.all_sent()
        message = _HEAD.pack(what, seq, waiting) + text.encode()[:_TEXT]
        with contextlib.suppress(MPI.Exception):  # the receiver may have died
            request = self.comm.Isend([message, MPI.BYTE], rank, self._tag)
            self._kept.append((rank, request, message))


def _is_over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:  # its receiver died
        return True


class Every:
    """Says yes at most once in so many seconds: for what is too dear to do in each pass."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.next = 0.0

    def due(self, now: float | None = None) -> bool:
        now = time.monotonic() if now is None else now
        if now < self.next:
            return False
        self.next = now + self._interval
        return True
