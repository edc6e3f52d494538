"""The engine: the one place that loops, looks at the clock and decides how to idle.

Its rules:

- Collectives of one group run one at a time, in program order: only the head of a lane's
  queue is started and stepped.  (Several multi-phase collectives in flight on one
  communicator mix up their data on MPICH and Open MPI.)  Lanes progress independently.
  Sends and receives never queue: all their parts are posted at the call.
- A head starts eagerly, up to its first wait.  Waiting for any task advances them all.
- The cost of a call does not grow with the number of those under way.  A pass takes the head of
  each queue, the task that is waited for, and some of the messages, in turn; what memory is in use
  is looked up by address (claims.py), and deadlines are looked at when the first of them is due.
- A deadline counts from the call.  It is looked at only after a pass that moved nothing, so
  a rank that computed for long before it waits does not fail untried.
- A collective that is enqueued on a GPU's stream leaves the queue, and goes on beside it: the
  stream keeps the order, so only the oldest one is looked at.  Waiting for it may end then, and
  leave the rest to the GPU.
- Whoever leaves a call early tells its peers, and they raise at once; so does who sees a peer
  die.  What an abandoned call was using is kept for ever: MPI may still write there.
- One lock.  A signal handler that interrupts its holder finds the engine at work: what it
  launches is put on a list that the engine drains.  Callbacks run unlocked.
- Nothing blocks inside MPI under the lock: a call that does is made by the thread that waits for
  its task, between two passes.
- An exception from a signal handler may strike between any two bytecodes, and goes to the user as
  itself.  A receive in whose step it struck is cancelled, any other call breaks its group.  What it
  left half done is mended when the lock is taken next: everything that is done under the lock can
  be done twice, a task stays in its lane until it is done, and the claims are derived from those.

How the process ends is told in exit.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import threading
import time
import traceback
import weakref
from _thread import start_new_thread
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from queue import Empty, SimpleQueue
from types import CodeType, FrameType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ..errors import (
    CallInterruptedError,
    CollectiveTimeoutError,
    GroupBrokenError,
    InvalidCallError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
    TransportError,
    interrupts,
    translate,
)
from ..runtime.library import IDLE, KEEN, MOVED, MPI, Abandoned, Steps
from ..runtime.memory import unlink_segments
from ..runtime.processes import watch
from ..runtime.settings import has_cores_for, survives_deaths
from .claims import Claims
from .peers import Every, Peers, State
from .recorder import leave_trace
from .rollcall import SHOWN, Said, Verdict

if TYPE_CHECKING:
    from .arrival import Exchange, Gathering, Once
    from .calls import Call, Spans

LOOK_AHEAD = 0.5  # seconds before a deadline at which peers are asked, at most
QUIET = 0.02  # seconds in which nothing must have moved before a deadline counts
NEWS = 0.05  # seconds that the death of a peer may take to show after a call failed by it
HEARD = 0.005  # seconds in which a notice that was sent long ago is surely seen
IDLE_LANES = 32  # lanes without a call under way that are listened to in one pass
LOOK_OUT = 0.1  # seconds between looks at calls that block inside MPI
SAID = 0.2  # seconds that a launcher gets to pass on why the job is ended, before it ends it
KEEPING = 0.005  # seconds between looks at deadlines that nobody waits for; less than QUIET
PARKED = 1.0  # seconds without anything under way after which these looks end
LOOKS = 8  # at the message that is waited for, in one pass
FEW = 8  # tasks whose memory is compared one by one: entering it in an index would take longer
MESSAGES = 64  # of a lane's sends and receives that are stepped in one pass
BLOCKED = 2.0  # seconds past its deadline that a call blocked inside MPI is left alone


class Expired(Exception):
    """Thrown into the steps of a task that can be cancelled when its deadline passes.

    They raise it where they are cancelled; also where a signal handler's exception struck, as the
    cause.
    """


class Uncancelled(Exception):
    """Raised in its place by steps that can't let go of the task's memory."""


class Completed(Exception):
    """Raised by a receive that was complete already when a signal handler's exception struck.

    Args:
        error: what is wrong with its message, or None.
    """

    def __init__(self, error: MpicollError | None) -> None:
        super().__init__(error)
        self.error = error


_SEVERAL = 3  # calls that are named where a rank has many under way


class Task:
    """One call as the engine sees it: steps to take, a deadline, an end."""

    __slots__ = (
        "__weakref__",
        "asked",
        "call",
        "called",
        "callbacks",
        "deadline",
        "done",
        "error",
        "failure",
        "fetched",
        "lane",
        "left",
        "outside",
        "queued",
        "released",
        "seq",
        "steps",
        "timeout",
    )

    steps: Steps  # given at the launch

    def __init__(self, lane: Lane, call: Call, seq: int, timeout: float) -> None:
        self.lane = lane
        self.call = call
        self.seq = seq
        self.timeout = timeout
        self.called = time.monotonic()
        self.deadline = self.called + timeout
        self.queued = call.kind not in ("send", "recv")  # or it goes on beside its lane's queue
        self.done = False
        self.error: MpicollError | None = None
        self.fetched = False  # the user has heard of the error
        self.failure: Failure | None = None
        self.asked = False
        self.released = False  # its memory may be used otherwise
        self.left = False  # an exception ended the user's wait for it
        self.outside: Blocking[Any] | None = None  # what is to be done without the lock
        self.callbacks: list[Callable[[], None]] = []

    @property
    def recovers(self) -> bool:
        """Whether it goes on in spite of the peers' failures, of which it makes the best."""
        return self.call.kind == "shrink_group"

    @property
    def blocked(self) -> bool:
        """Whether a call is under way for it that blocks inside MPI, which has a guard."""
        return self.outside is not None and self.outside.taken

    def twin(self) -> Task:
        """Return another of the same, to take its place."""
        other: Task = object.__new__(type(self))
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if name != "__weakref__" and hasattr(self, name):
                    setattr(other, name, getattr(self, name))
        return other

    def fetch(self) -> None:
        """Note that the user hears of the error."""
        self.fetched = True
        if self.failure is not None:
            self.failure.fetched = True

    def place(self) -> str:
        """Return the file and line of the user's that called, where that is known."""
        return "?"

    def ended(self) -> None:
        """Called under the lock when the task is done."""

    def where(self) -> str:
        """Say where it was called, if that is known."""
        place = self.place()
        return "" if place == "?" else f" ({place})"


T = TypeVar("T")


class Failure:
    """How a task failed, and whether that has been asked for; it outlives the task."""

    __slots__ = ("error", "fetched", "task")

    def __init__(self, task: Task, error: MpicollError) -> None:
        self.task = weakref.ref(task)  # without a callback: that would run anywhere
        self.error = error
        self.fetched = False


class _Signal:
    """An event to wait for.  Unlike `threading.Event`, no exception can leave it locked."""

    def __init__(self) -> None:
        self._news: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake who waits, or who waits next."""
        if self._news.empty():
            self._news.put(None)

    def wait(self, timeout: float | None = None) -> None:
        with contextlib.suppress(Empty):
            self._news.get(timeout=timeout)


class Blocking(Generic[T]):
    """A call that blocks inside MPI, for whoever waits for the task to make without the lock."""

    __slots__ = ("deadline", "error", "function", "over", "taken", "value", "what")

    value: T  # once it is over, without an error

    def __init__(self, deadline: float, what: str, function: Callable[[], T]) -> None:
        self.deadline = deadline
        self.what = what
        self.function = function
        self.taken = False
        self.over = False
        self.error: Exception | None = None


_NOWHERE = memoryview(bytearray(8)).cast("q")


class Lane:
    """One group's share of the engine: its collectives in program order, its messages, its peers.

    Args:
        name: the group's name, for messages.
        comm: the group's communicator.
    """

    def __init__(self, name: str, comm: MPI.Comm) -> None:
        self.name = name
        self.queue: deque[Task] = deque()
        self.enqueued: deque[Task] = deque()  # on the GPU's stream, oldest first
        # Sends and receives; those at the front wait longest.
        self.beside: OrderedDict[Task, None] = OrderedDict()
        self.due = math.inf  # when a deadline is to be looked at
        self.moved = 0.0  # when a pass last moved something
        self.broken: BaseException | None = None
        self.closed = ""
        self.said = False  # the peers have been told that it is broken
        self.deserted = False  # a wait for one of its calls was interrupted
        self.told = False  # the program has been given the error that broke it
        self.replaced = False  # shrink_group has made another group of its members
        self.failures: deque[Failure] = deque()  # that nobody has asked for, when last seen
        self.seq = 0
        self.mark = ""  # by which its members tell the group from others
        self.left = 0  # the call that it was broken in, or before
        self.exchange: Exchange | None = None  # where its records meet over MPI
        self.gathering: Gathering | None = None  # where it is told who called what
        self.once: Once | None = None  # what goes without arrival, and without a number
        self.finished: tuple[str, int] | None = None  # kind and number of the last good call
        self.page, self.word = _NOWHERE, 0  # where the node sees its number
        self.farewell: Callable[[], None] | None = None
        self.abort: Callable[[], None] | None = None  # lets go of what the peers hold together
        self.peers = Peers(comm, self._state)

    @property
    def busy(self) -> bool:
        """Whether any of its tasks is not done."""
        return bool(self.queue or self.enqueued or self.beside)

    def tasks(self) -> list[Task]:
        """Return its tasks that are not done."""
        return [*self.queue, *self.enqueued, *self.beside]

    def drop(self, task: Task) -> None:
        """Take a task out, wherever it is."""
        if task in self.beside:
            del self.beside[task]
            return
        for where in (self.queue, self.enqueued):
            if where and where[0] is task:
                where.popleft()
                return
        for where in (self.queue, self.enqueued):
            with contextlib.suppress(ValueError):
                where.remove(task)

    def close(self, how: str) -> None:
        """Note that its group was closed, and let go of the memory that was shared."""
        self.closed = how
        self.farewell = self.abort = None
        self.page, self.word = _NOWHERE, 0
        self.peers.forget_node()

    @property
    def reached(self) -> int:
        """The number of the last call in which this rank has arrived."""
        return self.queue[0].seq or self.seq if self.queue else self.seq

    def _state(self, seq: int) -> State:
        """Say what this rank is doing, for a peer that asks because of call `seq`, or a message."""
        if self.broken is not None and not self.queue:
            return State(False, False, Said(f"has left the group: {self.broken}"))
        waiting = any(task.seq == seq for task in (*self.queue, *self.enqueued))
        arrived = 0 < seq <= self.reached and self.broken is None
        return State(waiting, arrived, self._where())

    def _where(self) -> Said:
        if self.queue:
            return Said(f"is in {_placed(self.queue[0])}")
        others = [lane for lane in engine.active() if lane is not self and lane.peers.size > 1]
        heads = [lane.queue[0] for lane in others if lane.queue]
        found = [
            _placed(task, " of this group") for task in itertools.islice(self.beside, _SEVERAL)
        ]
        messages = (task for lane in others for task in lane.beside)
        for task in (*heads, *itertools.islice(messages, _SEVERAL)):
            found.append(_placed(task, f" of group {task.lane.name!r}"))
        last = "nothing" if self.finished is None else f"{self.finished[0]} #{self.finished[1]}"
        since = f", and since then {self.once.said()}" if self.once and self.once.count else ""
        if found:
            text = f"is in {' and in '.join(found[:_SEVERAL])}; last finished here {last}{since}"
        else:
            text = f"is in no call of this group; last finished {last}{since}"
        calls = [(task.lane.mark, task.seq) for task in heads if task.seq and task.lane.mark]
        return Said(text, tuple(calls[:_SEVERAL]))


def _placed(task: Task, of: str = "") -> str:
    """Say which call a task is, of which group, and where it was made."""
    number = f"call #{task.seq}{of}, " if task.seq else ""
    return f"{number}{task.call.describe()}{'' if number else of}{task.where()}"


class Pace:
    """How to wait: spin a little, then yield the core, then sleep, ever longer."""

    SPINS = 200
    YIELDS = 2000
    EAGERLY = 100_000  # yields to MPI's data before it is given up as stuck
    LONGEST = 1e-3

    def __init__(self, *, background: bool = False) -> None:
        self._start = self.YIELDS if background else 0
        self.moved()

    def moved(self) -> None:
        """Note that something got done."""
        self._idle = self._start

    def after(self, found: int) -> None:
        """Go on at once after a pass that moved something; else give the machine back a moment.

        The longer nothing has moved the longer, but never for long where MPI is to be asked again.
        """
        if found == MOVED:
            self.moved()
            return
        self._idle += 1
        if found == KEEN and self._idle <= self._start + self.EAGERLY:
            if self._idle > self.SPINS or _CROWDED:
                os.sched_yield()
        elif self._idle > self.YIELDS:
            time.sleep(min(self.LONGEST, 1e-5 * (self._idle - self.YIELDS)))
        elif self._idle > self.SPINS or _CROWDED:
            os.sched_yield()


_CROWDED = False  # more ranks on this machine than cores: spinning would only hold up a peer


class Engine:
    """All tasks of this process."""

    def __init__(self) -> None:
        self._lock: Any = threading.RLock()
        self._struck = False  # the lock's holder is at work, or was when an exception struck it
        self._active: dict[Lane, None] = {}
        self._claims: Claims[Task] = Claims()  # the memory that tasks use
        self._unclaimed: dict[Task, None] = {}  # theirs is entered when another call asks for it
        # All open groups; those at the front wait longest to be heard.
        self._lanes: OrderedDict[Lane, None] = OrderedDict()
        self._handed: deque[Callable[[], None]] = deque()  # for when the engine is done
        self._ended: deque[Task] = deque()  # whose callbacks are due
        self._abandoned: list[object] = []  # what MPI may still use: never freed
        self.broken: dict[Lane, None] = {}  # lanes whose members take leave of one another at exit
        self._ears: list[Callable[[], bool]] = []
        self._poll = Every(0.005)
        self._looked = self._looking = 0.0  # when the last pass was, and since when they have come
        self._wake = _Signal()
        self._thread = False  # whether there is a thread that progresses what is under way
        self._stay = False  # whether the thread outlives the work at hand
        self._stop = False
        self._keeper = False  # whether there is a thread that keeps deadlines
        self._parked = False  # the keeper waits until something is under way again
        self._unpark = _Signal()
        self._stepping: Task | None = None  # whose step is being taken
        self._ending: tuple[Task, MpicollError | None] | None = None  # what has ended, and how
        self._steps = 0  # that were taken so far
        self.inside: Callable[[], None] | None = None  # frees the step that may block, as in NCCL
        self._freed: Task | None = None  # whose step was stuck, and was freed
        self._guarded: dict[int, tuple[float, str]] = {}  # calls that block: until when, and what
        self._watchdog = False  # whether there is a thread that watches over calls that block
        self._look = _Signal()  # a call is guarded that the watchdog may not know of

    # ---- what groups call ----

    def enlist(self, lane: Lane) -> None:
        """Make a group known, so that its peers' questions are answered."""
        with self._lock:
            self._lanes[lane] = None

    def at_once(self, task: Task, attempt: Callable[[Call, int], bool]) -> bool:
        """Have a call carried out in one go, and return whether that could be.

        Not where anything else is under way, which would have to come first.  An attempt that
        returns False has done nothing that the task's steps don't do again.
        """
        if self._active or self._is_inside():
            return False
        with self._lock:
            if self._active or self._struck:
                return False
            self._struck = True
            self._stepping = task
            try:
                if not attempt(task.call, task.seq):
                    self._stepping, self._struck = None, False
                    return False
                self._ending = task, None
                self._settle(task, None)
                if task.called >= self._poll.next:
                    self._hear(task.called)  # who never waits answers its peers' questions, too
            except Exception as error:
                if interrupts(error):
                    raise
                self._end(task, self._fault(task, error))
            self._stepping = self._ending = None
            self._leave()
        if self._ended:
            self._run_callbacks()
        return True

    def launch(self, task: Task, steps: Steps) -> None:
        """Enter a task, and take it as far as its first wait if it is its lane's head."""
        task.steps = steps
        if self._is_inside():
            self._handed.append(lambda: self._admit_late(task))
            return
        with self._lock:
            self._enter()
            lane = task.lane
            self._admit(task)
            if lane.broken is not None and not task.recovers:  # just now
                self._break(lane, lane.broken, task.seq, arrived=False)
            elif not task.queued:
                self._step(task)
                if task.done:
                    self._rest(lane)
            elif lane.queue[0] is task:
                self._advance(lane)
            self._leave()
        if self._ended:
            self._run_callbacks()
        if self._thread:
            self._wake.set()
        if self._parked:
            self._unpark.set()

    def wait(self, task: Task, timeout: float | None = None, *, on_host: bool = True) -> None:
        """Progress everything until `task` is done; its deadline may be brought forward.

        With `on_host` False until it is enqueued, if the rest is up to the GPU.
        """
        if task.done or not (on_host or task.call.enqueued is None):
            return
        if timeout is not None:
            self._shorten(task, timeout)
        pace = None
        while not task.done and (on_host or task.call.enqueued is None):
            if self._is_inside():
                raise InvalidCallError(
                    "wait() was called by a signal handler that interrupted mpicoll itself: "
                    "launch there, and wait outside"
                )
            with self._lock:
                self._enter()
                found = MOVED if task.done else self._pass(task)
                self._leave()
            if self._ended:
                self._run_callbacks()
            if task.outside is not None:
                self._go_outside(task, task.outside)
            if not task.done:
                pace = pace or Pace()
                pace.after(found)

    def outside(
        self, deadline: float, what: str, function: Callable[[], T]
    ) -> Generator[int, None, T]:
        """Steps that have a call which blocks inside MPI made without the lock, under the guard.

        The thread that waits for the task makes it: so others go on, such as one that makes the
        call without which this one does not return.
        """
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            yield MOVED
            with self.guard(deadline, what):
                return function()
        task = self._stepping
        assert task is not None
        blocking: Blocking[T] = Blocking(deadline, what, function)
        task.outside = blocking
        while not blocking.over:
            yield IDLE
        task.outside = None
        if blocking.error is not None:
            raise blocking.error
        return blocking.value

    def _go_outside(self, task: Task, blocking: Blocking[Any]) -> None:
        with self._lock:
            if blocking.taken:
                return
            blocking.taken = True
        try:
            with self.guard(blocking.deadline, blocking.what):
                blocking.value = blocking.function()
        except Exception as error:
            if interrupts(error):
                raise
            blocking.error = error
        blocking.over = True

    def forsake(self, task: Task, error: BaseException) -> None:
        """End a task that nobody can wait for, as an exception struck before its call returned."""
        self.between_steps(lambda: self._forsake(task, error))

    def _forsake(self, task: Task, error: BaseException) -> None:
        cancelled = _interrupted(task, error, cancelled=True)
        if task in task.lane.beside and task.call.kind == "recv":
            lost = CallInterruptedError(
                f"{cancelled} after its message had come: that is lost", breaks_group=False
            )
            task.fetched = True
            self.cancel(task, cancelled, _interrupted(task, error), lost)
            if task.error is lost:
                task.lane.failures.append(Failure(task, lost))
        elif not task.done:
            self._forget(task, cancelled if task.call.kind == "recv" else _interrupted(task, error))

    def when_done(self, task: Task, callback: Callable[[], None]) -> None:
        """Have `callback` called, unlocked, when `task` is done; at once if it is."""
        with self._lock:
            done = task.done
            if not done:
                task.callbacks.append(callback)
        if done:
            callback()

    def test(self) -> None:
        """Make one pass; who polls with this gets deadlines kept as well."""
        if self._is_inside():
            return
        with self._lock:
            self._enter()
            self._pass()
            self._leave()
        if self._ended:
            self._run_callbacks()

    def fail_all(self, lane: Lane, error: BaseException, said: str = "") -> None:
        """Give up everything that a lane has under way; tell the peers so, in these words."""
        self.between_steps(lambda: self._give_up(lane, error, said))

    def look(self, at: Callable[[], T]) -> T | None:
        """Look at what the steps work on; None where a signal handler has interrupted one."""
        if self._is_inside():
            return None
        with self._lock:
            self._enter()
            seen = at()
            self._pass()
            self._leave()
        if self._ended:
            self._run_callbacks()
        return seen

    def check_peers(self, lane: Lane) -> None:
        """Break a lane, if a peer has left it or died, and raise that."""
        peers = lane.peers
        left = [RemoteRankError(f"rank {r} {said.text}", rank=r) for r, said in peers.left.items()]
        for gone in (*left, *(_died(rank, how) for rank, how in peers.dead.items())):
            self.fail_all(lane, gone)
            raise gone

    def listen(self, ear: Callable[[], bool]) -> None:
        """Have a callback made, under the lock, whenever peers are heard, until it returns True."""
        self._ears.append(ear)

    def between_steps(self, act: Callable[[], None]) -> None:
        """Have something done while no step is being taken: now, or when the one at hand is."""
        if self._is_inside():
            self._handed.append(act)
            return
        with self._lock:
            self._enter()
            act()
            self._leave()
        if self._ended:
            self._run_callbacks()

    def mend(self) -> None:
        """Put right what an exception has struck, if one has: what is looked at next is true."""
        if self._struck:
            self.between_steps(lambda: None)

    def delist(self, lane: Lane) -> None:
        """Listen to a lane no more: its group is closed, or made."""
        with self._lock:
            self._lanes.pop(lane, None)

    def lanes(self) -> list[Lane]:
        """Return the lanes of all open groups."""
        return list(self._lanes)

    def active(self) -> list[Lane]:
        """Return the lanes that have a call under way."""
        return list(self._active)

    @property
    def busy(self) -> bool:
        """Whether any task is not done."""
        return bool(self._active)

    def unfinished(self) -> Iterator[Task]:
        """Yield every task that is not done."""
        for lane in list(self._active):
            yield from lane.tasks()

    def make_room(self, call: Call, lane: Lane) -> Task | None:
        """Return a task that writes what a call is to read, or uses what it is to write.

        None, if there is none.  What nobody waits for any more, as an exception has ended the wait,
        is out of the way: a receive is cancelled, and a collective of the same lane comes before
        the new call anyway.  The same receive is ended, for the new one to go on with its steps, so
        that what has come for it is not lost: then that is returned, and it is done.
        """
        if self._is_inside():  # what a signal handler interrupted may have been the claims
            return self._entered(Claims(), self._claimants()).conflicting(*call.spans())
        few = len(self._unclaimed) <= FEW and not (self._struck or self._claims)
        if few and _are_apart(call, list(self._unclaimed)):
            return None
        with self._lock:
            self._enter()
            self._entered(self._claims, self._unclaimed)
            self._unclaimed.clear()
            while (task := self._in_the_way(call)) is not None:
                if not task.left or task.blocked:
                    break
                if task.call.kind == "recv":
                    task.fetched = True
                    if task.lane is lane and _same(task.call, call):
                        self._end(task, _gone(task))
                        break
                    self.cancel(task, _gone(task), _interrupted(task))
                elif task.queued and task.lane is lane:
                    task.released = True
                    self._disclaim(task)
                else:
                    break
            self._leave()
        return task

    @staticmethod
    def _entered(claims: Claims[Task], tasks: Iterable[Task]) -> Claims[Task]:
        for task in tasks:
            claims.add(*task.call.spans(), task)
        return claims

    def _in_the_way(self, call: Call) -> Task | None:
        """Return a task whose memory a call wants; a receive that it repeats as `left`, if dropped.

        An exception that strikes when `recv` has just returned leaves its Work with nobody.
        Whether the program has it is seen by letting go of it.
        """
        task = self._claims.conflicting(*call.spans())
        if task is None or task.left or task.callbacks or not _same(task.call, call):
            return task
        twin, seen = task.twin(), weakref.ref(task)
        self._replace(task, twin)
        del task
        task = seen()
        if task is not None:
            self._replace(twin, task)
            return task
        twin.left = True
        return twin

    def _replace(self, task: Task, twin: Task) -> None:
        self._claims.discard(*task.call.spans(), task)
        task.lane.beside[twin] = None
        task.lane.drop(task)
        self._claims.add(*twin.call.spans(), twin)

    def _claimants(self) -> Iterator[Task]:
        """Yield the tasks whose memory may not be used otherwise."""
        for task in self.unfinished():
            if not (task.done or task.released):
                yield task

    def release(self, task: Task) -> None:
        """Note that a task's memory may be used otherwise, as the user's streams wait for it."""
        with self._lock:
            self._enter()
            task.released = True
            self._disclaim(task)
            self._leave()

    def background(self, *, stay: bool = False) -> None:
        """Have a thread progress what is under way until it is done; with `stay`, for good."""
        self._stay = self._stay or stay
        if not self._thread:
            check_threads()
            if sys.is_finalizing():  # Python 3.11 would wait for ever
                raise InvalidCallError(
                    "at the end of the interpreter no thread can be started, as progress from a "
                    "thread needs: use wait() instead of futures there"
                )
            self._thread = True  # nothing strikes before the next call returns
            start_new_thread(self._work, ())
        self._wake.set()

    def keep_deadlines(self) -> None:
        """Have a thread look, now and then, at what is under way, though nobody waits for it.

        So a call that is left to the GPU keeps its deadline, at no cost to the calls: a thread that
        progressed all the time would contend with the user's for the interpreter.  The thread that
        watches over calls that block watches over the steps, too: one that is stuck inside NCCL
        past its deadline it frees, whichever thread took it.
        """
        if not (self._keeper or sys.is_finalizing()):
            check_threads()
            self._watch_over()
            self._keeper = True  # nothing strikes before the next call returns
            start_new_thread(self._keep, ())
            self._look.set()

    def _keep(self) -> None:
        quiet = 0.0
        while not self._stop:
            if self._active:
                quiet = 0.0
                self.test()
            elif quiet >= PARKED:
                self._parked = True
                if not self._active:  # or it was launched before it could see that we are parked
                    self._unpark.wait()
                self._parked, quiet = False, 0.0
                self._look.set()
            time.sleep(KEEPING)
            quiet += KEEPING

    def _free_a_stuck_step(self, before: int) -> int:
        """Free the step that is being taken, if it was at the look before; return its number."""
        task, free, steps = self._stepping, self.inside, self._steps
        if (
            steps == before
            and task is not None
            and free is not None
            and task is not self._freed
            and time.monotonic() >= task.deadline
        ):
            self._freed = task
            free()
        return steps

    @contextlib.contextmanager
    def guard(self, deadline: float, what: str) -> Iterator[None]:
        """Bound a call that blocks inside MPI: past its deadline, or if a peer dies, the job ends.

        (With MPI's fault tolerance such a call returns by itself when a peer dies.)  The end of a
        process of another MPI world is no reason: it may have nothing to do with the call.
        """
        guarded = max(deadline, time.monotonic()) + BLOCKED, what
        key = id(guarded)
        self._guarded[key] = guarded
        self._watch_over()
        self._look.set()
        try:
            yield
        finally:
            del self._guarded[key]

    def _watch_over(self) -> None:
        if not (self._watchdog or sys.is_finalizing()):
            # One for all: with MPICH loaded each thread that was leaves some 300 bytes behind.
            # (At the end of the interpreter none can be started: what blocks then is not bounded.)
            self._watchdog = True  # nothing strikes before the next call returns
            start_new_thread(self._watch, ())

    def _watch(self) -> None:
        while True:
            self._look.wait()
            lost, steps = len(watch.lost), -1
            while self._guarded or (self._keeper and not self._parked):
                steps = self._free_a_stuck_step(steps)
                if not self._guarded:
                    self._look.wait(LOOK_OUT)
                    continue
                watch.look()  # for who is blocked, and holds the engine's lock
                for until, what in list(self._guarded.values()):
                    if len(watch.lost) > lost and not survives_deaths():
                        end_job(1, f"{what} can't return, since a peer {watch.lost[-1]}")
                    if time.monotonic() >= until:
                        end_job(1, f"{what} never returned")
                self._look.wait(LOOK_OUT)

    # ---- one pass; all of this under the lock ----

    def _is_inside(self) -> bool:
        """Return whether this thread holds the lock: it is in a signal handler that interrupted it.

        If the lock is this thread's, and no function that takes it is under way, an exception has
        struck just when it was taken.  It is released then.
        """
        if not self._lock._is_owned():
            return False
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_code in _HOLDERS:
                return True
            frame = frame.f_back
        while self._lock._is_owned():
            self._lock.release()
        return False

    def _enter(self) -> None:
        """Begin to work, with the lock just taken."""
        if self._struck:
            self._mend()
        self._struck = True

    def _leave(self) -> None:
        """End the work: all that was begun since `_enter` is done."""
        while self._handed:
            self._handed[0]()
            self._handed.popleft()
        self._struck = False

    def _mend(self) -> None:
        """Put right what an exception left half done that struck the last holder of the lock."""
        if self._ending is not None:
            self._end(*self._ending)
        elif self._stepping is not None and not self._stepping.done:
            self._forget(self._stepping, _interrupted(self._stepping))
        self._stepping = self._ending = None
        for lane in dict.fromkeys([*self._lanes, *self._active]):
            if lane.broken is not None and (lane.busy or not lane.said):
                self._give_up(lane, lane.broken, "")
            steps: set[int] = set()
            for task in lane.tasks():
                if task.done or id(task.steps) in steps:
                    lane.drop(task)
                steps.add(id(task.steps))
            if lane.queue and lane.enqueued and lane.queue[0] is lane.enqueued[-1]:
                lane.queue.popleft()
            lane.due = 0.0
            self._rest(lane)
        self._claims = Claims()
        self._unclaimed = dict.fromkeys(self._claimants())

    def _admit_late(self, task: Task) -> None:
        """Enter what a signal handler has launched; once, if it is done twice."""
        if not task.done and task not in task.lane.tasks():
            self._admit(task)

    def _admit(self, task: Task) -> None:
        lane = task.lane
        self._active[lane] = None
        if task.queued:
            lane.queue.append(task)
        else:
            lane.beside[task] = None
        if task.deadline - LOOK_AHEAD < lane.due:
            lane.due = min(lane.due, _due(task))
        self._unclaimed[task] = None

    def _pass(self, wanted: Task | None = None) -> int:
        now, found = time.monotonic(), IDLE
        if now - self._looked > QUIET:  # before a deadline counts, there must be a while of looking
            self._looking = now
        self._looked = now
        if wanted is not None and wanted in wanted.lane.beside:
            lane = wanted.lane
            for _ in range(1 if _CROWDED else LOOKS):
                found = self._step(wanted)
                if found == MOVED:
                    lane.moved = now
                    break
            if wanted.done and now < self._poll.next:
                self._rest(lane)
                if not (lane.queue or lane.enqueued) and len(self._active) <= 1:
                    return MOVED  # other messages are looked at when they are waited for
        for lane in list(self._active):
            moved = self._advance(lane)
            if moved == MOVED:
                lane.moved = now
            found = max(found, moved)
        if found == MOVED and now < self._poll.next:
            return found  # what is busy must not keep the others' deadlines from being looked at
        now = time.monotonic()
        if self._hear(now):
            found = MOVED
        self._look_at_clock(now)
        return found

    def _hear(self, now: float) -> bool:
        """Every few milliseconds read what peers say; return whether it ended a task."""
        ended = False
        if self._poll.due(now):
            watch.look()
            for lane in self._to_hear():
                ended = self._listen(lane) or ended
            self._lend_ears()
        return ended

    def _lend_ears(self) -> None:
        for ear in list(self._ears):
            with contextlib.suppress(MPI.Exception):
                if ear():
                    self._ears.remove(ear)

    def _to_hear(self) -> list[Lane]:
        """Return the lanes to listen to now: the active ones, and some others in turn."""
        turn = list(itertools.islice(self._lanes, IDLE_LANES))
        for lane in turn:
            self._lanes.move_to_end(lane)
        return list(dict.fromkeys([*self._active, *turn]))

    def _advance(self, lane: Lane) -> int:
        found = IDLE
        while lane.queue:
            head = lane.queue[0]
            found = max(found, self._step(head))
            if head.done:
                continue
            if head.call.enqueued is None:
                break
            head.queued = False
            lane.enqueued.append(head)
            lane.queue.popleft()
        while lane.enqueued:
            oldest = lane.enqueued[0]
            found = max(found, self._step(oldest))
            if not oldest.done:
                break
        for task in list(itertools.islice(lane.beside, MESSAGES)):
            if not task.done:
                lane.beside.move_to_end(task)  # the others have their turn
                found = max(found, self._step(task))
        self._rest(lane)
        return found

    def _rest(self, lane: Lane) -> None:
        """Leave a lane alone from now on, if nothing is under way."""
        if not (lane.beside or lane.queue or lane.enqueued):
            self._active.pop(lane, None)

    def _step(self, task: Task) -> int:
        self._stepping = task
        self._steps += 1
        try:
            mood = next(task.steps)
            if task is not self._freed:
                self._stepping = None
                return mood
            self._end(task, self._stuck(task))
        except StopIteration:
            self._ending = task, self._stuck(task) if task is self._freed else None
            self._end(*self._ending)
        except BaseException as error:
            struck = self._ended_by(task, error)
            if struck is error:
                raise
            if struck is not None:
                raise struck from struck.__cause__
        self._stepping = self._ending = None
        return MOVED

    def _ended_by(self, task: Task, error: BaseException) -> BaseException | None:
        """End a task by what its steps raised; return what of it came from a signal handler."""
        wrapped = isinstance(error, (Expired, Uncancelled, Completed))
        struck = error.__cause__ if wrapped else error
        if struck is None or not interrupts(struck):
            assert isinstance(error, Exception)
            self._end(task, self._fault(task, error))
            return None
        if isinstance(error, Completed):
            self._end(task, error.error)
        elif isinstance(error, Expired):
            self._forget(task, _interrupted(task, struck, cancelled=True))
        elif _are_over(task.steps):  # else it struck when the step was taken already
            self._abandoned.append(error.__traceback__)  # its frames hold what MPI may still use
            self._forget(task, _interrupted(task, struck))
        self._stepping = None
        return struck

    def _forget(self, task: Task, error: MpicollError | None) -> None:
        """End a task by what the user has heard of already."""
        task.fetched = True
        self._end(task, error)

    def cancel(
        self,
        task: Task,
        cancelled: MpicollError,
        stuck: MpicollError,
        too_late: MpicollError | None = None,
    ) -> None:
        """End a receive, according to whether it can be cancelled, or its message has come."""
        try:
            task.steps.throw(Expired())
        except StopIteration:
            self._end(task, too_late)
        except Expired:
            self._end(task, cancelled)
        except Uncancelled as thrown:
            self._abandoned.append(thrown)  # its frames hold what MPI may still write to
            self._end(task, stuck)
        except Exception as failed:
            if interrupts(failed):
                raise
            self._end(task, self._fault(task, failed))

    def _fault(self, task: Task, error: Exception) -> MpicollError:
        """Turn what a step raised into our error: a peer's death, if that was behind it."""
        if task is self._freed:
            return self._stuck(task)
        ours = translate(error, task.call.kind)
        if isinstance(ours, TransportError) and not task.recovers:
            peers, until = task.lane.peers, time.monotonic() + NEWS
            while not peers.dead and time.monotonic() < until:
                watch.look()
                with contextlib.suppress(MPI.Exception):
                    peers.poll()
            for rank, how in peers.dead.items():
                failed = _died(rank, how)
                failed.__cause__ = ours
                return failed
        return ours

    def _stuck(self, task: Task) -> MpicollError:
        return _too_late(task, time.monotonic() - task.called)

    def _end(self, task: Task, error: MpicollError | None) -> None:
        lane = task.lane
        if error is None or not error.breaks_group:
            self._settle(task, error)
        else:
            task.error = error
            own = lane.queue[0].seq if lane.queue else 0  # of all that it leaves, the first
            if task.queued:
                own = min(own or task.seq, task.seq)
            self._break(lane, error, own or lane.seq + 1, arrived=task.queued and bool(own))
            self._give(task, error)
        lane.drop(task)

    def _settle(self, task: Task, error: MpicollError | None) -> None:
        task.error = error
        if error is None:
            if task.seq:  # messages have no number
                lane = task.lane
                lane.finished = task.call.kind, task.seq
                lane.page[lane.word] = task.seq
        elif not error.breaks_group:
            error.__traceback__ = None  # its frames hold the task, which a drop should free
        if task in self._unclaimed:
            del self._unclaimed[task]
        elif self._active:  # else it was done at once, and has claimed nothing
            self._claims.discard(*task.call.spans(), task)
        if error is None:
            task.ended()
        else:
            self._conclude(task)
        if task.callbacks:
            self._ended.append(task)
        task.done = True  # last: another thread may look, without the lock

    def _conclude(self, task: Task) -> None:
        if task.error is not None and task.failure is None and not task.fetched:
            task.failure = Failure(task, task.error)
            task.lane.failures.append(task.failure)
        task.ended()

    def _disclaim(self, task: Task) -> None:
        if task in self._unclaimed:
            del self._unclaimed[task]
        else:
            self._claims.discard(*task.call.spans(), task)

    def _abandon(self, task: Task) -> None:
        """Leave a task's steps where they are, and keep what they hold.

        What they wait for goes to `library.pending`.  The frames through which the exception went
        hold the arrays that MPI may still use.
        """
        steps = getattr(task, "steps", None)  # none, if it was done at once
        try:
            if steps is not None:
                steps.throw(Abandoned())
        except Abandoned as thrown:
            self._abandoned.append(thrown)
        except Exception as error:
            if interrupts(error):
                raise
            self._abandoned.append(error)
        self._abandoned.append(task)

    def _give_up(self, lane: Lane, error: BaseException, said: str) -> None:
        seq = lane.queue[0].seq if lane.queue else 0
        self._break(lane, error, seq or lane.seq + 1, arrived=bool(seq), said=said)

    def _break(
        self, lane: Lane, error: BaseException, seq: int, *, arrived: bool, said: str = ""
    ) -> None:
        """Mark a lane unusable from call `seq` on, tell its peers, fail what it has under way."""
        if lane.broken is None:
            lane.broken, lane.left = error, seq
        if not lane.said:
            if not MPI.Is_finalized():
                self.broken[lane] = None
                with contextlib.suppress(MPI.Exception):
                    if isinstance(error, RemoteRankError):  # the cause must not be buried
                        lane.peers.follow()
                    elif isinstance(error, RankFailedError):
                        lane.peers.report_death(error.rank)
                    else:
                        lane.peers.leave(seq, said or f"left the group: {error}", arrived=arrived)
            if lane.abort is not None:
                try:
                    lane.abort()
                except Exception as failed:  # of NCCL, or for want of threads
                    if interrupts(failed):
                        raise
            lane.said = True
        for task in lane.tasks():
            self._give(task, error)
            lane.drop(task)
        self._active.pop(lane, None)
        if lane.broken is error:
            leave_trace()

    def _give(self, task: Task, error: BaseException) -> None:
        """Give a task up, because its group is broken; by its own error, if it has one."""
        if task.done:
            return
        if task.error is None:
            task.fetched = True  # the cause is what gets reported
            task.error = GroupBrokenError(f"{task.call.kind} given up, because: {error}")
            task.error.__cause__ = error
        try:
            self._disclaim(task)
            self._abandon(task)
            self._conclude(task)
        finally:
            self._ended.append(task)
            task.done = True  # last: a thread that sees it finds the group broken, the GPU free

    def _listen(self, lane: Lane) -> bool:
        """Read a lane's notices; fail its head if a peer has left that call."""
        if lane.queue and lane.queue[0].blocked:
            return False  # its communicator may be on the way to be freed
        with contextlib.suppress(MPI.Exception):
            lane.peers.poll()
        if not (lane.peers.left or lane.peers.dead) or not lane.busy:
            return False
        head = lane.tasks()[0]
        if head.recovers:
            return False
        for rank, notice in lane.peers.left.items():
            if head.queued and head.seq and notice.seq > head.seq:
                continue
            if self._says_the_same(head, notice.verdict):
                continue
            self._end(head, RemoteRankError(f"rank {rank} {notice.text}", rank=rank))
            return True
        for rank, how in lane.peers.dead.items():
            self._end(head, _died(rank, how))
            return True
        return False

    @staticmethod
    def _says_the_same(head: Task, verdict: Verdict | None) -> bool:
        """Return whether a task is about to say by itself what one has left for who has left it."""
        return (
            verdict is not None
            and verdict.seq == head.seq
            and head.lane.peers.rank not in verdict.missing
            and head.deadline - time.monotonic() <= _look_ahead(head)
        )

    def _look_at_clock(self, now: float) -> None:
        for lane in list(self._active):
            if now < lane.due:
                continue
            quiet = now - max(self._looking, lane.moved) >= QUIET
            tasks = lane.tasks()
            lane.due = min(map(_due, tasks), default=math.inf)
            asked: set[int] = set()  # peers, about messages
            for task in tasks:
                if task.done or now < _due(task) or task.blocked:
                    continue
                if not task.asked:
                    task.asked = True
                    self._ask(task, asked)
                if now >= task.deadline and quiet:
                    self._expire(task, now)

    @staticmethod
    def _head(task: Task) -> Task:
        """Return the task for which a task waits, or itself."""
        lane = task.lane
        if task.queued:
            return lane.queue[0]
        return lane.enqueued[0] if task in lane.enqueued else task

    def _ask(self, task: Task, asked: set[int]) -> None:
        """Begin to find out, shortly before its deadline, what holds a task up."""
        lane = task.lane
        head = self._head(task)
        if task.call.kind in ("send", "recv"):
            peers = {task.call.peer} if task.call.peer >= 0 else set(range(lane.peers.size))
            some = sorted(peers - asked)[:SHOWN]
            lane.peers.ask(some)
            asked.update(some)
        elif head.seq and not head.recovers:
            lane.peers.call_roll(head.seq, task.deadline)
        elif lane.once is not None:
            lane.peers.ask()

    def _expire(self, task: Task, now: float) -> None:
        if task in task.lane.beside:
            self._step(task)  # it may not have had its turn for a while
            if task.done:
                return
        elapsed = now - task.called
        peers = task.lane.peers
        with contextlib.suppress(MPI.Exception):
            peers.poll()
        if task.call.kind == "recv":
            stuck = _late_message(task, elapsed, cancelled=False)
            self.cancel(task, _late_message(task, elapsed), stuck)
            return
        head = self._head(task)
        if task.call.kind == "send":
            self._end(task, _late_message(task, elapsed))
        elif task.recovers:
            self._end(task, _too_late(task, elapsed))
        elif not head.seq:
            self._end(task, _not_compared(task, elapsed))
        else:
            verdict = peers.find_missing(head.seq, task.deadline)
            if verdict is None:
                return  # it is being found out
            if peers.rank in verdict.missing:
                self._end(task, _came_too_late(verdict))
            else:
                self._end(task, _too_late(task, elapsed, verdict, self._crossed(head, verdict)))

    def _crossed(self, head: Task, verdict: Verdict) -> str:
        """Say whether one that is missing waits in another group, for this rank."""
        lane, me = head.lane, head.lane.peers.rank
        lanes = {other.mark: other for other in self._lanes if other.mark and other is not lane}
        for rank, said in (verdict.said or {}).items():
            for mark, seq in said.calls:
                other = lanes.get(mark)
                if other is not None and other.seq < seq:
                    return (
                        f". Groups are called in opposite orders: rank {me} is in call #{head.seq} "
                        f"of group {lane.name!r}{head.where()} and waits for rank {rank}, which is "
                        f"in call #{seq} of group {other.name!r} and waits for rank {me}. Call "
                        "groups in one order on all ranks"
                    )
        return ""

    def _shorten(self, task: Task, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if deadline < task.deadline:
            task.deadline = deadline
            task.timeout = timeout
            task.lane.due = min(task.lane.due, _due(task))

    # ---- callbacks and the thread ----

    def _run_callbacks(self) -> None:
        while self._ended:
            try:
                task = self._ended[0]
                while task.callbacks:
                    callback = task.callbacks[0]
                    try:
                        callback()
                    except Exception as error:  # it is nobody's fault who waits here
                        if interrupts(error):
                            raise
                        traceback.print_exc()
                    task.callbacks.remove(callback)
                self._ended.remove(task)
            except (IndexError, ValueError):
                continue  # another thread was faster

    def _work(self) -> None:
        pace = Pace(background=True)
        while not self._stop:
            with self._lock:
                self._enter()
                working = bool(self._active or self._stay)
                found = self._pass() if working else IDLE
                idle = not self._active
                self._thread = working
                self._leave()
            if self._ended:
                self._run_callbacks()
            if not working:
                return
            if idle and not self._stop:
                self._wake.wait()
                pace.moved()
            else:
                pace.after(found)
        self._thread = False

    # ---- the end of the process ----

    def stop(self) -> None:
        """End the progress thread."""
        self._stop = True
        self._wake.set()
        self._unpark.set()
        until = time.monotonic() + 1.0
        while self._thread and time.monotonic() < until:
            time.sleep(1e-3)

    def say_farewell(self, seconds: float) -> None:
        """Finish what is under way, and arrive one last time in every open group.

        So peers that still wait for this rank raise at once.  For the peers one waits, as
        MPI_Finalize would; but only `seconds` for a call whose wait was interrupted, and, after all
        else, for the making of a group.
        """
        lanes = [x for x in self._lanes if x.farewell and x.broken is None]
        lanes = [x for x in lanes if x.peers.size > 1 or x.beside]
        # Where somebody has left already, an arrival would never be complete.  MPI may not see at
        # once that a notice has come.
        heard = time.monotonic() + HEARD
        while (lanes or self._ears) and time.monotonic() < heard:
            for lane in lanes:
                with contextlib.suppress(MPI.Exception):
                    lane.peers.poll()
            self._lend_ears()
        for lane in lanes:
            for rank, notice in lane.peers.left.items():
                self.fail_all(lane, RemoteRankError(f"rank {rank} {notice.text}", rank=rank))
                break
            else:
                assert lane.farewell is not None
                lane.farewell()
        pace, until, last = Pace(), time.monotonic() + seconds, math.inf
        while self._active:
            now = time.monotonic()
            if any(lane.farewell for lane in self._active):
                last = now + seconds
            given_up = (t for t in self.unfinished() if t.lane.deserted and not t.call.leaving)
            if now > last or (now > until and any(given_up)):
                return
            with self._lock:
                self._enter()
                found = self._pass()
                self._leave()
            if self._ended:
                self._run_callbacks()
            pace.after(found)


def end_job(code: int, why: str = "") -> None:
    """End all ranks of the world, at once."""
    if why:
        print(f"mpicoll: {why}; ending the job", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if why:
        time.sleep(SAID)
    unlink_segments()
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)


def check_threads() -> None:
    """Refuse what needs a thread that calls MPI, where MPI allows none."""
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise InvalidCallError(
            "progress from a thread (progress='thread', futures, await) needs "
            "MPI_THREAD_MULTIPLE, but MPI was initialized with less: leave mpi4py.rc.thread_level "
            "and mpi4py.rc.threads as they are, or ask for MPI.THREAD_MULTIPLE; or use wait()"
        )


def _are_over(steps: Steps) -> bool:
    return cast("GeneratorType[int, None, None]", steps).gi_frame is None


def _interrupted(
    task: Task, error: BaseException | None = None, *, cancelled: bool = False
) -> CallInterruptedError:
    by = "an exception from a signal handler" if error is None else type(error).__name__
    text = f"{by} interrupted {task.call.describe()}"
    if cancelled:
        text += ", which was cancelled"
    return CallInterruptedError(text, breaks_group=not cancelled)


def _gone(task: Task) -> CallInterruptedError:
    return CallInterruptedError(
        f"the wait for {task.call.describe()} was interrupted, and its array given to another call",
        breaks_group=False,
    )


def _same(a: Call, b: Call) -> bool:
    """Return whether two calls are receives of the same message into the same array."""
    if not a.kind == b.kind == "recv":
        return False
    return (a.peer, a.tag, a.spans(), a.dtype) == (b.peer, b.tag, b.spans(), b.dtype)


def _are_apart(call: Call, tasks: Iterable[Task]) -> bool:
    """Return whether no task writes what a call reads or writes, nor reads what it writes."""
    reads, writes = call.spans()
    for task in tasks:
        read, written = task.call.spans()
        if _overlap(writes, written) or _overlap(writes, read) or _overlap(reads, written):
            return False
    return True


def _overlap(spans: Spans, others: Spans) -> bool:
    for start, stop in spans:
        for begin, end in others:
            if begin < stop and start < end:
                return True
    return False


def _died(rank: int, how: str) -> RankFailedError:
    return RankFailedError(f"rank {rank} {how}", rank=rank)


def _look_ahead(task: Task) -> float:
    return min(LOOK_AHEAD, task.timeout / 10)


def _due(task: Task) -> float:
    """Return when a task's deadline is to be looked at next."""
    if task.asked:
        return task.deadline
    return task.deadline - _look_ahead(task)


def _was_late(task: Task, elapsed: float) -> str:
    number = f" (call #{task.seq})" if task.seq else ""
    name = task.lane.name
    return f"{task.call.describe()}{number} of group {name!r} was not done after {elapsed:.3f} s"


def _late(
    task: Task, elapsed: float, text: str, missing: Sequence[int] = (), *, breaks_group: bool = True
) -> CollectiveTimeoutError:
    return CollectiveTimeoutError(
        _was_late(task, elapsed) + text,
        op=task.call.kind,
        seq=task.seq,
        elapsed=elapsed,
        missing=missing,
        breaks_group=breaks_group,
    )


def _too_late(
    task: Task, elapsed: float, verdict: Verdict | None = None, crossed: str = ""
) -> CollectiveTimeoutError:
    if verdict is None or not verdict.missing:
        text = ", although all ranks have arrived: a peer is slow or stuck in moving the data"
        return _late(task, elapsed, text)
    missing = list(verdict.missing)
    text = f": ranks {missing[:SHOWN]}{_more(len(missing))} have not arrived"
    if task.call.met:
        text += ", or can't be reached any more"
    text += _in_words(task.lane.peers.describe(verdict)) + crossed
    return _late(task, elapsed, text, missing)


def _not_compared(task: Task, elapsed: float) -> CollectiveTimeoutError:
    """Say where the peers are in a call of whose arrival nothing is known."""
    text = ": it was not compared (checks='first'), and peers may have called something else"
    return _late(task, elapsed, text + _answered(task.lane.peers))


def _late_message(task: Task, elapsed: float, *, cancelled: bool = True) -> CollectiveTimeoutError:
    """Say what became of a message, and what its other end is doing."""
    call, peers = task.call, task.lane.peers
    if call.kind == "send":
        text = ": the receiver did not take the message"
    elif cancelled:
        text = ": no matching message came. The receive was cancelled; the group is still usable"
    else:
        text = (
            ": its message has begun to come, and its sender goes no further. Such a receive can't "
            "be cancelled, so the group is broken, and the array may still be written"
        )
    if call.peer < 0:
        text += _answered(peers)
    elif call.peer != peers.rank:
        text += _in_words({call.peer: peers.whereabouts(call.peer)})
    return _late(task, elapsed, text, breaks_group=call.kind == "send" or not cancelled)


def _came_too_late(verdict: Verdict) -> RemoteRankError:
    return RemoteRankError(
        f"rank {verdict.by} gave up call #{verdict.seq} before this rank had arrived in it",
        rank=verdict.by,
    )


def _answered(peers: Peers) -> str:
    """Say where those are that have answered."""
    answers = peers.answers()
    more = _more(len(answers))
    text = _in_words({rank: answers[rank] for rank in sorted(answers)[:SHOWN]})
    return f"{text};{more} have answered" if more else text


def _in_words(said: dict[int, str]) -> str:
    return "".join(f"; rank {rank} {words}" for rank, words in said.items())


def _more(ranks: int) -> str:
    """Count those of so many ranks that are not described."""
    return f" and {ranks - SHOWN} more" if ranks > SHOWN else ""


def share_machine(ranks: int) -> None:
    """Say how many ranks share this machine, so that waiting suits them."""
    global _CROWDED
    _CROWDED = not has_cores_for(ranks)


_HOLDERS: frozenset[CodeType] = frozenset(
    function.__code__
    for function in vars(Engine).values()
    if isinstance(function, FunctionType) and "_lock" in function.__code__.co_names
)  # the functions that take the engine's lock

engine = Engine()
