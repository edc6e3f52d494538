"""What the members of a group know of one another outside their collectives.

A rank that waits, or that leaves a call early, sends short notices point to point on the
group's communicator, under a tag of our own:

    QUERY  "where are you?"               asked shortly before a deadline
    ROLL   "who is missing in call k?"    to the rank that decides it (rollcall.py)
    STATE  "I am in call k; it is ..."    the answer to both, given by every rank that waits
    ABSENT "these are missing in it"      what was decided
    LEFT   "I left call k, and why"       by a rank that timed out, raised or aborted
    DIED   "rank k died, and how"         by a rank that noticed it
    HEARD  "I know that it is broken"     by a rank that only follows another's failure
    GONE   "I am leaving the process"     by every member of a broken group, at its end; again
                                          when MPI has nothing pending there
    RAISED "this traceback is mine"       before it is written for the user, and
    WRITTEN "it is, for these"            after that (tracebacks.py)
    JOIN   "I am in shrink_group"         to the rank that decides there, and
    PLAN   "these will be members"        its answer (communicators.py)

Nothing is sent while all goes well.  That a peer of this machine died is seen without a word from
it (processes.py); deaths elsewhere are MPI's to report, where its fault tolerance is on, or the
process manager's, where that is ours (world.py).
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ..runtime import processes
from ..runtime.library import MPI, Taken, notice_tag, pending, take
from ..runtime.process import monotonic
from ..runtime.processes import Identity, watch
from ..runtime.settings import survives_deaths
from ..runtime.world import lost
from .board import NO_BOARD, Board
from .rollcall import LOST, SHOWN, RollCall, Said, Verdict, from_ranges, to_ranges

QUERY, STATE, LEFT, DIED, HEARD, GONE, JOIN, PLAN, ROLL, ABSENT, RAISED, WRITTEN = range(12)

_HEAD = struct.Struct("<qqq")  # what, call number (or rank), whether the sender waits in that call
_TEXT = 3072  # bytes that a notice may have: no library waits for a receiver to send so much
_BITS = 24  # of a number that counts gatherings; mismatches are rare
_FEW = 16  # unfinished sends that are kept without a look at them
_RANKS = 1000  # bytes of them that ranks may take, or a verdict


@dataclass(frozen=True, slots=True)
class Notice:
    """What a peer said last: in or about which call, in its words, and who was missing there."""

    seq: int
    waiting: bool
    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What this rank is doing, as far as it concerns one call.

    Attributes:
        waiting: whether it waits in it.
        arrived: whether it has arrived in it, and not left it early.
        said: where it is.
    """

    waiting: bool
    arrived: bool
    said: Said


class Peers:
    """The other members of one communicator, and what is known of each.

    Args:
        comm: the group's communicator.
        state: says what this rank is doing, with regard to the call of a number.
        board: what the ranks of this node show.

    Attributes:
        left: the last words of those who left a call or the group.
        dead: those who died, and how.
        aware: those who know that the group is broken.
        gone: those who are at the end of their process.
        settled: those of them with whom MPI has nothing pending.
        begun: how many meetings of records over MPI, and gatherings of who called what, those at
            their ends have begun.
        raised, shown: what is said of the tracebacks that each is to write, and any has written.
        joined: what was said by those who are in `shrink_group` or `subgroup`.
        plan: what was decided there.
        silence: what is said of those who don't answer.
    """

    def __init__(
        self, comm: MPI.Comm, state: Callable[[int], State], board: Board = NO_BOARD
    ) -> None:
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.left: dict[int, Notice] = {}
        self.dead: dict[int, str] = {}
        self.aware: set[int] = set()
        self.gone: set[int] = set()
        self.settled: set[int] = set()
        self.begun: dict[int, tuple[int, int]] = {}
        self.raised: dict[int, str] = {}
        self.shown: dict[str, None] = {}
        self.joined: dict[int, str] = {}
        self.plan = ""
        self.board = board
        self.silence = "gave no answer: it is busy outside mpicoll, stopped or dead"
        self._answers: dict[int, str] = {}
        self._rolls: dict[int, RollCall] = {}  # that are being called, by the number of the call
        self._decided: Verdict | None = None  # the last one that was asked for
        self._posted: Verdict | None = None  # the one that this node sees
        self._state = state
        self._tag = notice_tag()
        self._kept: list[tuple[int, MPI.Request, bytes]] = []  # unfinished sends: to whom, and what
        self._many = _FEW  # so many are worth a look whether they are still unfinished
        self._inbox = bytearray(_HEAD.size + _TEXT)
        self._watched: dict[int, Identity] = {}
        self._look_at_locks = Every(0.05)
        self._deaths_seen = 0
        self._lost_seen = 0

    # ---- who is alive ----

    def observe(self, others: dict[int, Identity], foreign: Collection[int]) -> None:
        """Watch ranks of this machine and pid namespace from now on; some are of other worlds."""
        for rank, who in others.items():
            if rank != self.rank:
                watch().add(who, foreign=rank in foreign)
                self._watched[rank] = who

    def look(self) -> None:
        """Look for ranks that have died: of this machine, or as our process manager has told."""
        if len(watch().dead) > self._deaths_seen:
            self._deaths_seen = len(watch().dead)
            for rank, who in self._watched.items():
                if who in watch().dead:
                    self.dead.setdefault(rank, watch().dead[who])
        if self.board.locked and self._look_at_locks.due():
            for rank in self.board.ranks:
                if rank not in (self.rank, *self.dead) and self.board.has_died(rank):
                    self.dead[rank] = "died"
        if len(lost) > self._lost_seen:
            self._lost_seen = len(lost)
            self._take_lost()

    def _take_lost(self) -> None:
        """Note which ranks the process manager has told of, unless they are better seen here."""
        mine, world = self.comm.Get_group(), MPI.COMM_WORLD.Get_group()
        for rank, known in enumerate(mine.Translate_ranks(None, world)):
            if known in lost and rank != self.rank and rank not in self._watched:
                self.dead.setdefault(rank, lost[known])
        mine.Free()
        world.Free()

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

    def ask(self, ranks: Iterable[int] | None = None) -> None:
        """Ask peers where they are, all or some; the answers come in with `poll`."""
        for rank in range(self.size) if ranks is None else ranks:
            if rank != self.rank:
                self._answers.pop(rank, None)
                if rank not in self.dead:
                    self._tell(rank, QUERY)

    def leave(self, seq: int, text: str, *, arrived: bool) -> None:
        """Tell every peer that this rank leaves call `seq` and makes no later one.

        `arrived` says whether it had arrived in that call before it gave up.
        """
        found = "" if self._decided is None else self._decided.encode(_RANKS)
        self._tell_all(LEFT, seq, f"{found}\0{_cut(text, _TEXT - len(found))}", arrived)
        self.board.leave(seq)

    def report_death(self, rank: int) -> None:
        """Tell every peer that a rank died, and so that this one knows that the group is broken."""
        self._tell_all(DIED, rank, _cut(self.dead[rank]))

    def follow(self) -> None:
        """Tell every peer that this rank has heard of a failure, and sends no cause of its own."""
        self._tell_all(HEARD)

    def go(self, met: int, told: int, *, settled: bool) -> None:
        """Tell every peer that this process ends; `settled`, if MPI has nothing pending here.

        Args:
            met, told: meetings of records over MPI, and gatherings of who called what, that this
                rank has begun in the group.
        """
        self._tell_all(GONE, met << _BITS | told, waiting=not settled)

    def announce(self, text: str) -> None:
        """Tell every peer of a traceback that this rank is to write."""
        self._tell_all(RAISED, text=text)

    def show(self, text: str) -> None:
        """Note, and tell every peer, for whom this rank has written which one."""
        self.shown[text] = None
        self._tell_all(WRITTEN, text=text)

    def join(self, rank: int, text: str) -> None:
        """Tell the rank that decides what this one wants where a part is made; "": no more."""
        self._tell(rank, JOIN, text=text)

    def decide(self, rank: int, text: str) -> None:
        """Tell a rank what was decided in `shrink_group` or `subgroup`."""
        self._tell(rank, PLAN, text=text)

    def poll(self) -> None:
        """Read what the peers have said; answer their questions."""
        if self.size == 1 or self.is_freed():
            return
        self.look()
        try:
            self._read_all()
        except MPI.Exception:
            if not self._heard_of_deaths():
                raise
            self._read_all()
        for roll in list(self._rolls.values()):
            self._go_on(roll)

    def _read_all(self) -> None:
        status = MPI.Status()
        # What was found is received, not looked for again.  A receive from any does not return
        # under MPICH between nodes and where worlds have merged; and one from the source that was
        # found fails under Open MPI's fault tolerance if that has died.
        while message := self.comm.Improbe(MPI.ANY_SOURCE, self._tag, status):
            source = status.Get_source()
            size = status.Get_count(MPI.BYTE)
            if size > len(self._inbox):
                self._inbox = bytearray(size)
            message.Recv([self._inbox, MPI.BYTE])
            what, seq, waiting = _HEAD.unpack_from(self._inbox)
            text = self._inbox[_HEAD.size : size].decode(errors="replace")
            self._take(source, what, seq, bool(waiting), text)

    def _take(self, source: int, what: int, seq: int, waiting: bool, text: str) -> None:
        if what == QUERY:
            self._answer(source, seq)
        elif what == STATE:
            arrived, calls, said = text.split("\0", 2)
            self._answers[source] = said
            if seq in self._rolls:
                told = Said(said, tuple((mark, number) for mark, number in json.loads(calls)))
                self._rolls[seq].hear(source, waiting, from_ranges(arrived), told, monotonic())
        elif what == ROLL:
            self._is_called(source, seq, text)
        elif what == ABSENT:
            if seq in self._rolls:
                self._rolls[seq].adopt(Verdict.decode(text))
        elif what == JOIN:
            self.joined[source] = text
        elif what == PLAN:
            self.plan = text
        elif what == RAISED:
            self.raised[source] = text
        elif what == WRITTEN:
            self.shown[text] = None
        else:
            self.aware.add(source)
            if what == LEFT:
                found, _, text = text.partition("\0")
                verdict = Verdict.decode(found) if found else None
                self.left.setdefault(source, Notice(seq, waiting, text, verdict))
                for roll in self._rolls.values():
                    self._learn(roll, source)
            elif what == DIED:
                self.dead.setdefault(seq, text)
            elif what == GONE:
                self.gone.add(source)
                self.begun[source] = seq >> _BITS, seq & (1 << _BITS) - 1
                if not waiting:
                    self.settled.add(source)

    def _answer(self, rank: int, seq: int) -> None:
        """Tell a peer where this rank is, and who is known to have arrived in call `seq`."""
        state = self._state(abs(seq))
        arrived = ""
        if state.arrived:
            here = [r for r in self.board.ranks if self.board.has_arrived(r, abs(seq))]
            arrived = to_ranges(here)
        arrived = arrived if len(arrived) <= _RANKS else ""
        calls = json.dumps(state.said.calls)
        text = f"{arrived}\0{calls}\0{_cut(state.said.text, _TEXT - len(arrived) - len(calls))}"
        self._tell(rank, STATE, seq, text, state.arrived)

    def drop_messages(self) -> None:
        """Receive what was sent to this rank, and that nobody will receive: its sender may end."""
        while not self.is_freed() and (found := self.unwanted()):
            pending().append(found.request)

    def is_freed(self) -> bool:
        """Return whether the communicator was given back; a failure may have struck after that."""
        return bool(self.comm == MPI.COMM_NULL)

    def unwanted(
        self, wanted: Callable[[int, int], bool] = lambda source, tag: False
    ) -> Taken | None:
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
            return take(self.comm, source, tag)
        return None

    def answers(self) -> dict[int, str]:
        """Return what each peer has said of where it is; nothing of those that did not answer."""
        return dict(self._answers)

    def whereabouts(self, rank: int) -> str:
        """Say where a peer is that was asked, as far as is known."""
        if rank in self.dead or rank in self._answers:
            return self.dead.get(rank) or self._answers[rank]
        return self._silent(rank, "has not answered: it is busy outside mpicoll, or slow")

    # ---- who is missing ----

    def call_roll(self, seq: int, deadline: float) -> RollCall:
        """Begin to find out who will be missing in call `seq` at its deadline.

        For a warning the roll is called under the number -seq: nothing is decided by that.
        """
        roll = self._rolls.get(seq)
        if roll is None:
            roll = self._rolls[seq] = RollCall(
                seq,
                self.rank,
                self.size,
                monotonic(),
                near=self.board.ranks,
                sees=lambda rank: self.board.has_arrived(rank, abs(seq)),
                lost=self._is_lost,
            )
            for rank in self.left:
                self._learn(roll, rank)
        roll.deadline = min(roll.deadline, deadline)
        return roll

    def find_missing(self, seq: int, deadline: float) -> Verdict | None:
        """Return who is missing in call `seq`, or None while that is being found out."""
        roll = self.call_roll(seq, deadline)
        now = monotonic()
        if roll.verdict is None and now >= deadline + LOST:
            roll.give_up_waiting(now)
        with contextlib.suppress(MPI.Exception):
            self.poll()
        if self.size == 1:
            self._go_on(roll)
        if roll.verdict is None and roll.everyone_is_there(now):
            roll.adopt(Verdict(seq, self.rank, ()))
            self._pass_on(roll)
        self._decided = roll.verdict
        return roll.verdict

    def find_late(self, seq: int, until: float, *, anew: bool) -> Verdict | None:
        """Return who has not arrived in call `seq`, as `find_missing`, but where nobody gives up.

        That takes a roll call of its own, begun `anew` or gone on with.
        """
        if anew and -seq in self._rolls and self._rolls[-seq].verdict is not None:
            del self._rolls[-seq]  # a peer has asked for it
        roll = self.call_roll(-seq, until)
        now = monotonic()
        if roll.verdict is None and now >= until + LOST:
            roll.give_up_waiting(now)
        self._go_on(roll)
        if roll.verdict is not None:  # the next time another is called
            self._rolls.pop(-seq, None)
        return roll.verdict

    def describe(self, verdict: Verdict) -> dict[int, str]:
        """Say what is known of those who are missing, but for all that are beyond `SHOWN`."""
        found = {}
        for rank in verdict.missing[:SHOWN]:
            if rank in self.dead:
                found[rank] = self.dead[rank]
            elif verdict.said is not None:
                said = verdict.said.get(rank)
                before = abs(verdict.seq) - 1
                known = f"last heard of in call #{before}" if before else ""
                found[rank] = said.text if said is not None else self._silent(rank, last=known)
        return found

    def _is_called(self, rank: int, seq: int, text: str) -> None:
        """Answer a peer that wants this rank to decide who is missing."""
        remaining, _, arrived = text.partition("\0")
        in_time = float(remaining)
        if self._state(abs(seq)).arrived:
            now = monotonic()
            self.call_roll(seq, now + in_time).is_called(rank, from_ranges(arrived), in_time, now)
        self._answer(rank, seq)

    def _learn(self, roll: RollCall, rank: int) -> None:
        """Take what a rank that has left says of the call whose roll is called."""
        notice = self.left[rank]
        if notice.verdict is not None and notice.verdict.seq == roll.seq:
            roll.adopt(notice.verdict)
        if notice.seq == roll.seq and notice.waiting:
            roll.has_arrived(rank)

    def _go_on(self, roll: RollCall) -> None:
        """Take a turn in a roll call: look, call, ask, and pass on what was decided."""
        now = monotonic()
        state = self._state(abs(roll.seq))
        if not (state.waiting or roll.followers):
            self._rolls.pop(roll.seq, None)
            return
        for rank in self.board.ranks if roll.verdict is None and roll.seq > 0 else ():
            if rank != self.rank and (text := self.board.notice(rank, roll.seq)):
                roll.adopt(Verdict.decode(text))
        if roll.verdict is None:
            calls, questions = roll.turn(now)
            if calls:
                arrived = to_ranges(roll.arrived)
                arrived = arrived if len(arrived) <= _RANKS else ""
                for rank in calls:
                    self._tell(rank, ROLL, roll.seq, f"{roll.deadline - now}\0{arrived}")
            for rank in questions:
                self._tell(rank, QUERY, roll.seq)
        if roll.verdict is not None:
            self._pass_on(roll)

    def _pass_on(self, roll: RollCall) -> None:
        """Tell those who wait for the verdict; on the node it is there to be seen."""
        assert roll.verdict is not None
        text = roll.verdict.encode()
        final = roll.seq > 0 and self._posted is not roll.verdict
        if final and self.board.post_notice(roll.seq, text.encode()):
            self._posted = roll.verdict
        for rank in roll.followers:
            if self._posted is not roll.verdict or rank not in self.board.ranks:
                self._tell(rank, ABSENT, roll.seq, text)
        roll.followers.clear()

    def _is_lost(self, rank: int) -> bool:
        """Return whether a peer can't answer."""
        who = self._watched.get(rank)
        return rank in self.dead or (who is not None and processes.is_stopped(who))

    def _silent(self, rank: int, said: str = "", last: str = "") -> str:
        """Say what is known of a peer that has not answered."""
        who, said = self._watched.get(rank), said or self.silence
        if who is not None and processes.is_stopped(who):
            said = f"was stopped by a signal (its process {who.pid} doesn't run)"
        last = self.board.last_seen(rank) or last
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
        for rank in () if self.is_freed() else range(self.size):
            if rank != self.rank and rank not in self.dead:
                self._tell(rank, what, seq, text, waiting)

    def _tell(
        self, rank: int, what: int, seq: int = 0, text: str = "", waiting: bool = False
    ) -> None:
        message = _HEAD.pack(what, seq, waiting) + text.encode(errors="replace")
        with contextlib.suppress(MPI.Exception):  # the receiver may have died
            request = self.comm.Isend([message, MPI.BYTE], rank, self._tag)
            if not _is_over(request):
                self._kept.append((rank, request, message))
        if len(self._kept) >= self._many:  # twice as many as at the last look: it costs little each
            self.all_sent()
            self._many = max(_FEW, 2 * len(self._kept))


def _cut(text: str, room: int = _TEXT) -> str:
    """Return what of a text fits into so many bytes."""
    return text.encode(errors="replace")[:room].decode(errors="ignore")


def _is_over(request: MPI.Request) -> bool:
    try:
        return bool(request.Test())
    except MPI.Exception:  # its receiver died
        return True


class Every:
    """Says yes at most once in so many seconds: for what is too dear to do in each pass."""

    __slots__ = ("_interval", "next")

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self.next = 0.0

    def due(self, now: float | None = None) -> bool:
        now = monotonic() if now is None else now
        if now < self.next:
            return False
        self.next = now + self._interval
        return True
