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

How the process ends is told in leaving.py.
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
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from .alive import watch
from .claims import Claims
from .config import has_cores_for, survives_deaths
from .errors import (
    CollectiveTimeoutError,
    GroupBrokenError,
    InvalidCallError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
    TransportError,
    translate,
)
from .library import IDLE, KEEN, MOVED, MPI, Abandoned, Steps
from .memory import unlink_segments
from .peers import Every, Peers
from .recorder import leave_trace

if TYPE_CHECKING:
    from .arrival import Exchange, Once
    from .calls import Call

LOOK_AHEAD = 0.5  # seconds before a deadline at which peers are asked, at most
QUIET = 0.02  # seconds in which nothing must have moved before a deadline counts
NEWS = 0.05  # seconds that the death of a peer may take to show after a call failed by it
HEARD = 0.005  # seconds in which a notice that was sent long ago is surely seen
IDLE_LANES = 32  # lanes without a call under way that are listened to in one pass
LOOK_OUT = 0.1  # seconds between looks at calls that block inside MPI
SAID = 0.2  # seconds that a launcher gets to pass on why the job is ended, before it ends it
KEEPING = 0.005  # seconds between looks at deadlines that nobody waits for; less than QUIET
PARKED = 1.0  # seconds without anything under way after which these looks end
MESSAGES = 64  # of a lane's sends and receives that are stepped in one pass
BLOCKED = 2.0  # seconds past its deadline that a call blocked inside MPI is left alone


class Expired(Exception):
    """Thrown into the steps of a task that can be cancelled when its deadline passes."""


class Uncancelled(Exception):
    """Raised by steps in which `Expired` was thrown, and that can't let go of the task's memory."""


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
        "fetched",
        "lane",
        "queued",
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
        self.error: BaseException | None = None
        self.fetched = False
        self.asked = False
        self.callbacks: list[Callable[[], None]] = []

    @property
    def recovers(self) -> bool:
        """Whether it goes on in spite of the peers' failures, of which it makes the best."""
        return self.call.kind == "shrink_group"

    def place(self) -> str:
        """Return the file and line of the user's that called, where that is known."""
        return "?"

    def ended(self) -> None:
        """Called under the lock when the task is done."""


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
        self.beside: dict[Task, None] = {}  # sends and receives; those at the front wait longest
        self.due = math.inf  # when a deadline is to be looked at
        self.moved = 0.0  # when a pass last moved something
        self.broken: BaseException | None = None
        self.closed = ""
        self.deserted = False  # a wait for one of its calls was interrupted
        self.told = False  # the program has been given the error that broke it
        self.replaced = False  # shrink_group has made another group of its members
        self.unfetched: BaseException | None = None  # of a Work that was dropped unasked
        self.seq = 0
        self.left = 0  # the call that it was broken in, or before
        self.exchange: Exchange | None = None  # where its records meet over MPI
        self.once: Once | None = None  # what goes without arrival, and without a number
        self.finished: tuple[str, int] | None = None  # kind and number of the last good call
        self.page, self.word = _NOWHERE, 0  # where the node sees its number
        self.farewell: Callable[[], None] | None = None
        self.abort: Callable[[], None] | None = None  # lets go of what the peers hold together
        self.peers = Peers(comm, self._where)

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

    def _where(self) -> tuple[int, bool, str]:
        """Say what this rank is doing in this group, for a peer that asks."""
        if self.queue:
            head = self.queue[0]
            number = f"call #{head.seq}, " if head.seq else ""
            return head.seq, True, f"is in {number}{head.call.describe()}"
        last = "nothing" if self.finished is None else f"{self.finished[0]} #{self.finished[1]}"
        since = f", and since then {self.once.said()}" if self.once and self.once.count else ""
        return self.seq, False, f"is in no call of this group; last finished {last}{since}"


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
            os.sched_yield()
        elif self._idle > self.YIELDS:
            time.sleep(min(self.LONGEST, 1e-5 * (self._idle - self.YIELDS)))
        elif self._idle > self.SPINS or _CROWDED:
            os.sched_yield()


_CROWDED = False  # more ranks on this machine than cores: spinning would only hold up a peer


class Engine:
    """All tasks of this process."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._inside = False  # whether the lock's holder is at work, not merely about to be
        self._active: dict[Lane, None] = {}
        self._claims: Claims[Task] = Claims()  # the memory that tasks use
        self._unclaimed: dict[Task, None] = {}  # theirs is entered when another call asks for it
        self._lanes: dict[Lane, None] = {}  # all open groups; those at the front wait longest
        self._handed: deque[Callable[[], None]] = deque()  # for when the engine is done
        self._calls: deque[Callable[[], None]] = deque()  # callbacks that are due
        self._abandoned: list[object] = []  # what MPI may still use: never freed
        self.broken: dict[Lane, None] = {}  # lanes whose members take leave of one another at exit
        self._ears: list[Callable[[], bool]] = []
        self._poll = Every(0.005)
        self._looked = self._looking = 0.0  # when the last pass was, and since when they have come
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._stay = False  # whether the thread outlives the work at hand
        self._stop = False
        self._keeper: threading.Thread | None = None
        self._parked = False  # the keeper waits until something is under way again
        self._unpark = threading.Event()
        self._stepping: Task | None = None  # whose step is being taken
        self._steps = 0  # that were taken so far
        self.inside: Callable[[], None] | None = None  # frees the step that may block, as in NCCL
        self._freed: Task | None = None  # whose step was stuck, and was freed
        self._guarded: dict[int, tuple[float, str]] = {}  # calls that block: until when, and what
        self._watchdog: threading.Thread | None = None
        self._look = threading.Event()  # a call is guarded that the watchdog may not know of

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
        self._lock.acquire()
        if self._active or self._inside:
            self._lock.release()
            return False
        self._inside = True
        try:
            if not attempt(task.call, task.seq):
                return False
            self._settle(task, None)
            if task.called >= self._poll.next:
                self._hear(task.called)  # who never waits answers its peers' questions, too
            return True
        except Exception as error:
            self._end(task, self._fault(task, error))
            return True
        except BaseException as error:
            self._end(task, _interrupted(error, task))
            raise
        finally:
            self._exit()

    def launch(self, task: Task, steps: Steps) -> None:
        """Enter a task, and take it as far as its first wait if it is its lane's head."""
        task.steps = steps
        if not self._enter():
            self._handed.append(lambda: self._admit(task))
            return
        try:
            self._admit(task)
            if not task.queued:
                self._step(task)
                self._rest(task.lane)
            elif task.lane.queue[0] is task:
                self._advance(task.lane)
        finally:
            self._exit()
        if self._thread is not None:
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
        pace = Pace()
        while not task.done and (on_host or task.call.enqueued is None):
            if not self._enter():
                raise InvalidCallError(
                    "wait() was called by a signal handler that interrupted mpicoll itself: "
                    "launch there, and wait outside"
                )
            try:
                found = MOVED if task.done else self._pass(task)
            finally:
                self._exit()
            pace.after(found)

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
        if self._enter():
            try:
                self._pass()
            finally:
                self._exit()

    def fail_all(self, lane: Lane, error: BaseException, said: str = "") -> None:
        """Give up everything that a lane has under way; tell the peers so, in these words."""
        if not self._enter():
            self._handed.append(lambda: self._give_up(lane, error, said))
            return
        try:
            self._give_up(lane, error, said)
        finally:
            self._exit()

    def listen(self, ear: Callable[[], bool]) -> None:
        """Have a callback made, under the lock, whenever peers are heard, until it returns True."""
        self._ears.append(ear)

    def between_steps(self, act: Callable[[], None]) -> None:
        """Have something done while no step is being taken: now, or when the one at hand is."""
        if not self._enter():
            self._handed.append(act)
            return
        try:
            act()
        finally:
            self._exit()

    def delist(self, lane: Lane) -> None:
        """Listen to a lane no more: its group is closed, or made."""
        with self._lock:
            self._lanes.pop(lane, None)

    def lanes(self) -> list[Lane]:
        """Return the lanes of all open groups."""
        return list(self._lanes)

    @property
    def busy(self) -> bool:
        """Whether any task is not done."""
        return bool(self._active)

    def unfinished(self) -> Iterator[Task]:
        """Yield every task that is not done."""
        for lane in list(self._active):
            yield from lane.tasks()

    def conflicting(self, call: Call) -> Task | None:
        """Return a task that writes what a call is to read, or uses what it is to write."""
        with self._lock:
            for task in self._unclaimed:
                self._claims.add(*task.call.spans(), task)
            self._unclaimed.clear()
            return self._claims.conflicting(*call.spans())

    def release(self, task: Task) -> None:
        """Note that a task's memory may be used otherwise, as the user's streams wait for it."""
        with self._lock:
            self._disclaim(task)

    def background(self, *, stay: bool = False) -> None:
        """Have a thread progress what is under way until it is done; with `stay`, for good."""
        self._stay = self._stay or stay
        if self._thread is None:
            check_threads()
            thread = threading.Thread(target=self._work, name="mpicoll", daemon=True)
            if not start(thread):
                raise InvalidCallError(
                    "at the end of the interpreter no thread can be started, as progress from a "
                    "thread needs: use wait() instead of futures there"
                )
            self._thread = thread
        self._wake.set()

    def keep_deadlines(self) -> None:
        """Have a thread look, now and then, at what is under way, though nobody waits for it.

        So a call that is left to the GPU keeps its deadline, at no cost to the calls: a thread that
        progressed all the time would contend with the user's for the interpreter.  The thread that
        watches over calls that block watches over the steps, too: one that is stuck inside NCCL
        past its deadline it frees, whichever thread took it.
        """
        if self._keeper is None:
            check_threads()
            self._watch_over()
            keeper = threading.Thread(target=self._keep, name="mpicoll keeper", daemon=True)
            self._keeper = keeper if start(keeper) else None
            self._look.set()

    def _keep(self) -> None:
        quiet = 0.0
        while not self._stop:
            if self._active:
                quiet = 0.0
                self._enter()  # (no signal handler runs in this thread)
                try:
                    self._pass()
                finally:
                    self._exit()
            elif quiet >= PARKED:
                self._parked = True
                if not self._active:  # or it was launched before it could see that we are parked
                    self._unpark.wait()
                    self._unpark.clear()
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
        if self._watchdog is None:
            # One for all: with MPICH loaded each thread that was leaves some 300 bytes behind.
            # (At the end of the interpreter none can be started: what blocks then is not bounded.)
            watchdog = threading.Thread(target=self._watch, name="mpicoll guard", daemon=True)
            self._watchdog = watchdog if start(watchdog) else None

    def _watch(self) -> None:
        while True:
            self._look.wait()
            self._look.clear()
            lost, steps = len(watch.lost), -1
            while self._guarded or (self._keeper is not None and not self._parked):
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
                self._look.clear()

    # ---- one pass; all of this under the lock ----

    def _enter(self) -> bool:
        """Take the lock; False, without it, if this thread is at work in the engine already."""
        self._lock.acquire()
        if self._inside:  # we are a signal handler that interrupted a step
            self._lock.release()
            return False
        self._inside = True
        return True

    def _exit(self) -> None:
        while self._handed:
            self._handed.popleft()()
        self._inside = False
        self._lock.release()
        if self._calls:
            self._run_callbacks()

    def _admit(self, task: Task) -> None:
        lane = task.lane
        if task.queued:
            lane.queue.append(task)
        else:
            lane.beside[task] = None
        lane.due = min(lane.due, _due(task))
        self._unclaimed[task] = None
        self._active[lane] = None

    def _pass(self, wanted: Task | None = None) -> int:
        now, found = time.monotonic(), IDLE
        if now - self._looked > QUIET:  # before a deadline counts, there must be a while of looking
            self._looking = now
        self._looked = now
        if wanted is not None and wanted in wanted.lane.beside:
            found = self._step(wanted)
            if found == MOVED:
                wanted.lane.moved = now
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
            self._lanes[lane] = self._lanes.pop(lane)
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
            lane.enqueued.append(lane.queue.popleft())
        while lane.enqueued:
            oldest = lane.enqueued[0]
            found = max(found, self._step(oldest))
            if not oldest.done:
                break
        for task in list(itertools.islice(lane.beside, MESSAGES)):
            lane.beside[task] = lane.beside.pop(task)  # to the end: the others have their turn
            found = max(found, self._step(task))
        self._rest(lane)
        return found

    def _rest(self, lane: Lane) -> None:
        """Leave a lane alone from now on, if nothing is under way."""
        if not lane.busy:
            self._active.pop(lane, None)
            lane.due = math.inf

    def _step(self, task: Task) -> int:
        self._stepping = task
        self._steps += 1
        try:
            mood = next(task.steps)
            if task is not self._freed:
                return mood
            self._end(task, self._stuck(task))
        except StopIteration:
            self._end(task, self._stuck(task) if task is self._freed else None)
        except Exception as error:
            self._end(task, self._fault(task, error))
        except BaseException as error:  # KeyboardInterrupt and the like: the step is half done
            self._end(task, _interrupted(error, task))
            raise
        finally:
            self._stepping = None
        return MOVED

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
        return _too_late(task, time.monotonic() - task.called, {})

    def _end(self, task: Task, error: MpicollError | None) -> None:
        lane = task.lane
        lane.drop(task)
        if error is None or not error.breaks_group:
            self._settle(task, error)
            return
        task.error = error
        try:
            self._disclaim(task)
            task.ended()
            own = task.seq if task.queued else lane.queue[0].seq if lane.queue else 0
            self._break(lane, error, own or lane.seq + 1, arrived=task.queued and bool(own))
            self._abandon(task)
        finally:
            task.done = True  # last: a thread that sees it finds the group broken, the GPU free
            self._calls.extend(task.callbacks)

    def _settle(self, task: Task, error: MpicollError | None) -> None:
        task.error = error
        if error is None:
            if task.seq:  # messages have no number
                lane = task.lane
                lane.finished = task.call.kind, task.seq
                lane.page[lane.word] = task.seq
        elif not error.breaks_group:
            error.__traceback__ = None  # its frames hold the task, which a drop should free
        if self._active:  # else it was done at once, and has claimed nothing
            self._disclaim(task)
        task.ended()
        task.done = True  # last: another thread may look, without the lock
        if task.callbacks:
            self._calls.extend(task.callbacks)

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
            if lane.peers.size > 1 and not MPI.Is_finalized():
                self.broken[lane] = None
                with contextlib.suppress(MPI.Exception):
                    if isinstance(error, RemoteRankError):  # the cause must not be buried
                        lane.peers.follow()
                    elif isinstance(error, RankFailedError):
                        lane.peers.report_death(error.rank)
                    else:
                        lane.peers.leave(seq, said or f"left the group: {error}", arrived=arrived)
            if lane.abort is not None:
                with contextlib.suppress(Exception):  # of NCCL, or for want of threads
                    lane.abort()
        while tasks := lane.tasks():
            task = tasks[0]
            lane.drop(task)
            task.error = GroupBrokenError(f"{task.call.kind} given up, because: {error}")
            task.error.__cause__ = error
            task.fetched = True  # the cause is what gets reported
            try:
                self._disclaim(task)
                self._abandon(task)
                task.ended()
            finally:
                task.done = True
                self._calls.extend(task.callbacks)
        self._active.pop(lane, None)
        if lane.broken is error:
            leave_trace()

    def _listen(self, lane: Lane) -> bool:
        """Read a lane's notices; fail its head if a peer has left that call."""
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
            if head.asked and head.deadline - time.monotonic() <= _look_ahead(head):
                continue  # it is about to say by itself who is missing
            self._end(head, RemoteRankError(f"rank {rank} {notice.text}", rank=rank))
            return True
        for rank, how in lane.peers.dead.items():
            self._end(head, _died(rank, how))
            return True
        return False

    def _look_at_clock(self, now: float) -> None:
        for lane in list(self._active):
            if now < lane.due:
                continue
            quiet = now - max(self._looking, lane.moved) >= QUIET
            tasks = lane.tasks()
            lane.due = min(map(_due, tasks), default=math.inf)
            asked = False
            for task in tasks:
                if task.done or now < _due(task):
                    continue
                if not task.asked and task.call.kind != "recv":
                    task.asked = True
                    if not asked:
                        lane.peers.ask()
                    asked = True
                if now >= task.deadline and quiet:
                    self._expire(task, now)

    def _expire(self, task: Task, now: float) -> None:
        if task in task.lane.beside:
            self._step(task)  # it may not have had its turn for a while
            if task.done:
                return
        elapsed = now - task.called
        if task.call.kind == "recv":
            late = _too_late(task, elapsed, {})
            self.cancel(task, late, _too_late(task, elapsed, {}, cancelled=False))
            return
        peers = task.lane.peers
        with contextlib.suppress(MPI.Exception):
            peers.poll()
        head = task.lane.queue[0] if task.queued else task
        if task.lane.once is not None and not head.seq and head.call.kind != "send":
            self._end(task, _too_late(task, elapsed, peers.answers(), compared=False))
        else:
            self._end(task, _too_late(task, elapsed, peers.missing(head.seq)))

    def cancel(self, task: Task, error: MpicollError, stuck: MpicollError) -> None:
        """Cancel a receive, which ends with `error`; `stuck`: its message has begun to come."""
        try:
            task.steps.throw(Expired())
        except StopIteration:
            self._end(task, None)
        except Expired:
            self._end(task, error)
        except Uncancelled as thrown:
            self._abandoned.append(thrown)  # its frames hold what MPI may still write to
            self._end(task, stuck)
        except Exception as fault:
            self._end(task, self._fault(task, fault))

    def _shorten(self, task: Task, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        if deadline < task.deadline:
            task.deadline = deadline
            task.timeout = timeout
            task.lane.due = min(task.lane.due, _due(task))

    # ---- callbacks and the thread ----

    def _run_callbacks(self) -> None:
        while self._calls:
            try:
                callback = self._calls.popleft()
            except IndexError:
                return
            try:
                callback()
            except Exception:  # it is nobody's fault who waits here
                traceback.print_exc()

    def _work(self) -> None:
        pace = Pace(background=True)
        while not self._stop:
            self._enter()  # (no signal handler runs in this thread)
            try:
                if not (self._active or self._stay):
                    self._thread = None
                    return
                found = self._pass()
                self._wake.clear()
                idle = not self._active
            finally:
                self._exit()
            if idle and not self._stop:
                self._wake.wait()
                pace.moved()
            else:
                pace.after(found)

    # ---- the end of the process ----

    def stop(self) -> None:
        """End the progress thread."""
        self._stop = True
        self._wake.set()
        self._unpark.set()
        thread = self._thread
        if thread is not None:
            thread.join(1.0)

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
            self._enter()
            try:
                found = self._pass()
            finally:
                self._exit()
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


def start(thread: threading.Thread) -> bool:
    """Start a thread; False: at the end of the interpreter, where none can be started any more."""
    if sys.is_finalizing():  # Python 3.11 would wait for ever
        return False
    try:
        thread.start()
    except RuntimeError as error:
        if "shutdown" not in str(error):  # but for want of memory or of threads
            raise
        return False
    return True


def _interrupted(error: BaseException, task: Task) -> GroupBrokenError:
    return GroupBrokenError(f"{type(error).__name__} interrupted {task.call.kind}")


def _died(rank: int, how: str) -> RankFailedError:
    return RankFailedError(f"rank {rank} {how}", rank=rank)


def _look_ahead(task: Task) -> float:
    return min(LOOK_AHEAD, task.timeout / 10)


def _due(task: Task) -> float:
    """Return when a task's deadline is to be looked at next."""
    if task.asked or task.call.kind == "recv":
        return task.deadline
    return task.deadline - _look_ahead(task)


def _too_late(
    task: Task,
    elapsed: float,
    missing: dict[int, str],
    *,
    compared: bool = True,
    cancelled: bool = True,
) -> CollectiveTimeoutError:
    call = task.call
    number = f" (call #{task.seq})" if task.seq else ""
    text = (
        f"{call.describe()}{number} of group {task.lane.name!r} was not done after {elapsed:.3f} s"
    )
    if call.kind == "recv" and not cancelled:
        text += (
            ": its message has begun to come, and its sender goes no further. Such a receive can't "
            "be cancelled, so the group is broken, and the array may still be written"
        )
    elif call.kind == "recv":
        text += ": no matching message came. The receive was cancelled; the group is still usable"
    elif call.kind == "send":
        text += ": the receiver did not take the message"
    elif not compared:
        text += ": it was not compared (checks='first'), and peers may have called something else"
        text += "".join(f"; rank {rank} {said}" for rank, said in sorted(missing.items()))
        missing = {}
    elif missing:
        text += f": ranks {sorted(missing)} have not arrived"
        text += "".join(f"; rank {rank} {said}" for rank, said in sorted(missing.items()))
    else:
        text += ", although all ranks have arrived: a peer is slow or stuck in moving the data"
    return CollectiveTimeoutError(
        text,
        op=call.kind,
        seq=task.seq,
        elapsed=elapsed,
        missing=sorted(missing) if call.kind != "send" else (),
        breaks_group=call.kind != "recv" or not cancelled,
    )


def share_machine(ranks: int) -> None:
    """Say how many ranks share this machine, so that waiting suits them."""
    global _CROWDED
    _CROWDED = not has_cores_for(ranks)


engine = Engine()
