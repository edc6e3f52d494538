"""What the members of a group tell one another outside their collectives.

A rank that waits, or that leaves a call early, sends short notices point to point on the
group's communicator, under a tag of our own:

    QUERY  "where are you?"               asked shortly before a deadline
    STATE  "I am in call k; it is ..."    the answer, given by every rank that waits
    LEFT   "I left call k, and why"       by a rank that timed out, raised or aborted
    GONE   "I am leaving the process"     by a rank that only follows another's failure

Nothing is sent while all goes well.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass

from .library import MPI, notice_tag

QUERY, STATE, LEFT, GONE = range(4)

_HEAD = struct.Struct("<qqq")  # what, call number, whether the sender waits in that call
_TEXT = 4096  # bytes of text in a notice at most


@dataclass(frozen=True, slots=True)
class Notice:
    """What a peer said last: in or about which call, and in its own words."""

    seq: int
    waiting: bool
    text: str


class Peers:
    """The other members of one communicator, and the last thing each was heard to say.

    Args:
        comm: the group's communicator.
        state: says what this rank is doing: (call number, whether it waits in it, in words).
    """

    def __init__(self, comm: MPI.Comm, state: Callable[[], tuple[int, bool, str]]) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.left: dict[int, Notice] = {}
        self.gone: set[int] = set()
        self.mark_left: Callable[[int], None] = lambda seq: None
        self.has_arrived: Callable[[int, int], bool] = lambda rank, seq: False
        self._answers: dict[int, Notice] = {}
        self._state = state
        self._tag = notice_tag()
        self._kept: list[tuple[MPI.Request, bytes]] = []  # unfinished sends and their bytes
        self._inbox = bytearray(_HEAD.size + _TEXT)

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

    def go(self) -> None:
        """Tell every peer that this process ends because of another's failure."""
        self._tell_all(GONE)

    def poll(self) -> None:
        """Read what the peers have said; answer their questions."""
        if self.size == 1:
            return
        while self.comm.Iprobe(MPI.ANY_SOURCE, self._tag):
            status = MPI.Status()
            self.comm.Recv([self._inbox, MPI.BYTE], MPI.ANY_SOURCE, self._tag, status)
            source = status.Get_source()
            what, seq, waiting = _HEAD.unpack_from(self._inbox)
            text = self._inbox[_HEAD.size : status.Get_count(MPI.BYTE)].decode(errors="replace")
            if what == QUERY:
                self._tell(source, STATE, *self._state())
            elif what == STATE:
                self._answers[source] = Notice(seq, bool(waiting), text)
            elif what == LEFT:
                self.left.setdefault(source, Notice(seq, bool(waiting), text))
            else:
                self.gone.add(source)

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
                found[rank] = "gave no answer: it is busy outside mpicoll, stopped or dead"
            elif heard.seq < seq or not heard.waiting:
                found[rank] = heard.text
        return found

    def _tell_all(self, what: int, seq: int = 0, text: str = "", waiting: bool = False) -> None:
        for rank in range(self.size):
            if rank != self.rank:
                self._tell(rank, what, seq, waiting, text)

    def _tell(self, rank: int, what: int, seq: int, waiting: bool, text: str) -> None:
        self._kept = [kept for kept in self._kept if not kept[0].Test()]
        message = _HEAD.pack(what, seq, waiting) + text.encode()[:_TEXT]
        self._kept.append((self.comm.Isend([message, MPI.BYTE], rank, self._tag), message))


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
