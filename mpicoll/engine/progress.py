"""The engine: the one place that loops, looks at the clock and decides how to idle.

Its rules:

- Collectives of one group run one at a time, in program order: only the head of a group's
  queue is started and stepped.  (Several multi-phase collectives in flight on one
  communicator mix up their data on MPICH and Open MPI.)  Groups progress independently.
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
- Nothing else spins or sleeps in a call.  The exceptions are bounded: a step may look some hundred
  times at a word in shared memory before it yields (`runtime/memory.py`: a peer of the node answers
  within microseconds, and a pass costs more), and a receive that is cancelled is tested for 20 ms
  at most (`transports/messages.py`: MPI must not keep half of it).  What sleeps in stores.py
  runs where no step is taken: in the user's thread, or outside of the lock.
- Nothing blocks inside MPI under the lock: a call that does is made by the thread that waits for
  its task, between two passes.
- An exception from a signal handler may strike between any two bytecodes, and goes to the user as
  itself.  A receive in whose step it struck is cancelled, any other call breaks its group.  What it
  left half done is mended when the lock is taken next: everything that is done under the lock can
  be done twice, a task stays in its group until it is done, and the claims are derived from those.

How the process ends is told in exit.py.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import sys
import threading
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from types import CodeType, FrameType, FunctionType, GeneratorType
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ..errors import (
    CallInterruptedError,
    InvalidCallError,
    MpicollError,
    RemoteRankError,
    interrupts,
)
from ..runtime.library import IDLE, MPI, PROGRESSED, Steps
from ..runtime.process import monotonic, process
from ..runtime.processes import watch
from ..runtime.waiting import Backoff, Signal
from ..runtime.watchdog import watchdog
from . import patience
from .claims import Claims, apart
from .deadlines import ask, due, late_message, says_the_same, why_late
from .peers import Every
from .tasks import Blocking, Completed, Expired, Failure, GroupState, Task, Uncancelled
from .underway import UnderWay, died, gone, interrupted, same

if TYPE_CHECKING:
    from .call import Call

LOOKS = 8  # at the message that is waited for, in one pass
FEW = 8  # tasks whose memory is compared one by one: entering it in an index would take longer
QUIET = 0.02  # seconds in which nothing must have moved before a deadline counts
IDLE_GROUPS = 32  # groups without a call under way that are listened to in one pass
PARTING = 2.0  # seconds in which what a rank sent in a group's last call comes, if it is gone
MESSAGES = 64  # of a group's sends and receives that are stepped in one pass

T = TypeVar("T")


class Engine(UnderWay):
    """All tasks of this process, and the loop that takes their steps.

    Attributes:
        alarms: signals to give at each launch, for threads that wait for one.
        inside: frees the step that is being taken, while that may block, as inside NCCL.
    """

    __slots__ = ("_struck",)  # a slot, for the compiled core

    def __init__(self) -> None:
        super().__init__()
        self._lock: Any = threading.RLock()
        self._struck = False  # the lock's holder is at work, or was when an exception struck it
        # All open groups; those at the front wait longest to be heard.
        self._group_states: OrderedDict[GroupState, None] = OrderedDict()
        self._handed: deque[Callable[[], None]] = deque()  # for when the engine is done
        self._pollers: list[Callable[[], bool]] = []
        self._poll = Every(0.005)
        self._looked = self._looking = 0.0  # when the last pass was, and since when they have come
        self._stepping: Task | None = None  # whose step is being taken
        self._ending: tuple[Task, MpicollError | None] | None = None  # what has ended, and how
        self._steps = 0  # that were taken so far
        self.alarms: dict[Signal, None] = {}
        self.inside: Callable[[], None] | None = None

    # ---- what groups call ----

    def enlist(self, state: GroupState) -> None:
        """Make a group known, so that its peers' questions are answered."""
        with self._lock:
            self._group_states[state] = None

    def at_once(self, task: Task, attempt: Callable[[Call, int], bool]) -> bool:
        """Have a call carried out in one go, and return whether that could be.

        Not where anything else is under way, which would have to come first.  An attempt that
        returns False has done nothing that the task's steps don't do again.
        """
        if self._active or self.light or self._is_inside():
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
        """Enter a task, and take it as far as its first wait if it is its group's head."""
        task.steps = steps
        if self._is_inside():
            self._handed.append(lambda: self._admit_late(task))
            return
        with self._lock:
            self._enter()
            self._admit(task)
            if task.group_state.broken is not None and not task.recovers:  # just now
                self._break(task.group_state, task.group_state.broken, task.seq, arrived=False)
            elif not task.queued:
                self._step(task)
                if task.done:
                    self._rest(task.group_state)
            elif task.group_state.queue[0] is task:
                self._advance(task.group_state)
            if task.called >= self._poll.next:
                self._hear(task.called)  # who never waits answers its peers' questions, too
            self._leave()
        if self._ended:
            self._run_callbacks()
        if self.alarms:
            for alarm in list(self.alarms):
                alarm.set()

    def wait(self, task: Task, timeout: float | None = None, *, on_host: bool = True) -> None:
        """Progress everything until `task` is done; its deadline may be brought forward.

        With `on_host` False until it is enqueued, if the rest is up to the GPU.
        """
        if task.done or not (on_host or task.call.enqueued is None):
            return
        if timeout is not None:
            self._shorten(task, timeout)
        backoff = None
        while not task.done and (on_host or task.call.enqueued is None):
            if self._is_inside():
                raise InvalidCallError(
                    "wait() was called by a signal handler that interrupted mpicoll itself: "
                    "launch there, and wait outside"
                )
            with self._lock:
                self._enter()
                found = PROGRESSED if task.done else self._pass(task)
                self._leave()
            if self._ended:
                self._run_callbacks()
            if task.outside is not None:
                self._go_outside(task, task.outside)
            if not task.done:
                backoff = backoff or Backoff()
                backoff.after(found)

    def outside(
        self, deadline: float, what: str, function: Callable[[], T]
    ) -> Generator[int, None, T]:
        """Steps that have a call which blocks inside MPI made without the lock, under the guard.

        The thread that waits for the task makes it: so others go on, such as one that makes the
        call without which this one does not return.
        """
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            yield PROGRESSED
            with watchdog().guard(deadline, what):
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
            with watchdog().guard(blocking.deadline, blocking.what):
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
        cancelled = interrupted(task, error, cancelled=True)
        if task in task.group_state.beside and task.call.kind.receives:
            lost = CallInterruptedError(
                f"{cancelled} after its message had come: that is lost", breaks_group=False
            )
            task.fetched = True
            self.cancel(task, cancelled, interrupted(task, error), lost)
            if task.error is lost:
                task.group_state.failures.append(Failure(task, lost))
        elif not task.done:
            self._forget(task, cancelled if task.call.kind.receives else interrupted(task, error))

    def when_done(self, task: Task, callback: Callable[[], None]) -> None:
        """Have `callback` called, unlocked, when `task` is done; at once if it is."""
        with self._lock:
            done = task.done
            if not done:
                task.callbacks.append(callback)
        if done:
            callback()

    def if_let_go(self, task: Task, callback: Callable[[], None]) -> None:
        """Have `callback` called, unlocked, if the engine frees `task`, having just ended it.

        (Inside the engine the collector may free any other.)
        """
        if id(task) in self._just_ended and self._is_inside():
            task.callbacks.append(callback)
            self._ended.append(task)

    def let_go(self, tasks: list[Task]) -> None:
        """Free those that are held by this list alone, as if they had just ended."""

        def free() -> None:
            self._just_ended.update(map(id, tasks))
            tasks.clear()

        self.between_steps(free)

    def test(self) -> int:
        """Make one pass, and return what it found; who polls with this gets deadlines kept too."""
        if self._is_inside():
            return IDLE
        with self._lock:
            self._enter()
            found = self._pass()
            self._leave()
        if self._ended:
            self._run_callbacks()
        return found

    def turn(self, goes_on: Callable[[], bool]) -> int | None:
        """Make one pass for a thread if it is to go on, which it is asked under the lock."""
        with self._lock:
            self._enter()
            found = self._pass() if goes_on() else None
            self._leave()
        if self._ended:
            self._run_callbacks()
        return found

    def fail_all(self, state: GroupState, error: BaseException, said: str = "") -> None:
        """Give up everything that a group has under way; tell the peers so, in these words."""
        self.between_steps(lambda: self._give_up(state, error, said))

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

    def check_peers(self, state: GroupState) -> None:
        """Break a group, if a peer has left it or died, and raise that."""
        peers = state.peers
        left = [RemoteRankError(f"rank {r} {said.text}", rank=r) for r, said in peers.left.items()]
        for error in (*left, *(died(rank, how) for rank, how in peers.dead.items())):
            self.fail_all(state, error)
            raise error

    def add_poller(self, poller: Callable[[], bool]) -> None:
        """Have a callback made, under the lock, whenever peers are heard, until it returns True."""
        self._pollers.append(poller)

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

    def take_on(self) -> None:
        """Make tasks of the messages that went the direct way, and are under way."""
        if self.light:
            self.between_steps(lambda: None)

    def mend(self) -> None:
        """Put right what an exception has struck, if one has: what is looked at next is true."""
        if self._struck:
            self.between_steps(lambda: None)

    def is_overdue(self) -> bool:
        """Return whether a call whose deadline has passed is still under way."""
        with self._lock:
            return any(task.deadline < monotonic() for task in self.unfinished())

    def delist(self, state: GroupState) -> None:
        """Listen to a group no more: it is closed, or made."""
        with self._lock:
            self._group_states.pop(state, None)

    def group_states(self) -> list[GroupState]:
        """Return what is known of each open group."""
        return list(self._group_states)

    def make_room(self, call: Call, state: GroupState) -> Task | None:
        """Return a task that writes what a call is to read, or uses what it is to write.

        None, if there is none.  What nobody waits for any more, as an exception has ended the wait,
        is out of the way: a receive is cancelled, and a collective of the same group comes before
        the new call anyway.  The same receive is ended, for the new one to go on with its steps, so
        that what has come for it is not lost: then that is returned, and it is done.
        """
        if self._is_inside():  # what a signal handler interrupted may have been the claims
            return self._entered(Claims(), self._claimants()).conflicting(*call.spans())
        self.take_on()
        few = len(self._unclaimed) <= FEW and not (self._struck or self._claims)
        if few and not self._unclaimed:
            return None
        if few and apart(call.spans(), [task.call.spans() for task in list(self._unclaimed)]):
            return None
        with self._lock:
            self._enter()
            self._entered(self._claims, self._unclaimed)
            self._unclaimed.clear()
            while (task := self._in_the_way(call)) is not None:
                if not task.left or task.blocked:
                    break
                if task.call.kind.receives:
                    task.fetched = True
                    if task.group_state is state and same(task.call, call):
                        self._end(task, gone(task))
                        break
                    self.cancel(task, gone(task), interrupted(task))
                elif task.queued and task.group_state is state:
                    task.released = True
                    self._disclaim(task)
                else:
                    break
            self._leave()
        return task

    def release(self, task: Task) -> None:
        """Note that a task's memory may be used otherwise, as the user's streams wait for it."""
        with self._lock:
            self._enter()
            task.released = True
            self._disclaim(task)
            self._leave()

    def free_a_stuck_step(self, before: int) -> int:
        """Free the step that is being taken, if it was at the look before; return its number."""
        task, free, steps = self._stepping, self.inside, self._steps
        if (
            steps == before
            and task is not None
            and free is not None
            and task is not self._freed
            and monotonic() >= task.deadline
        ):
            self._freed = task
            free()
        return steps

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
        if self.light:
            self._take_on()

    def _take_on(self) -> None:
        for posted, task in list(self.light.items()):
            if task.becomes_a_task():
                if not task.done and task not in task.group_state.beside:
                    self._admit(task)
                if not task.done:
                    self._step(task)
                self._rest(task.group_state)
            self.light.pop(posted, None)

    def _leave(self) -> None:
        """End the work: all that was begun since `_enter` is done."""
        while self._handed:
            self._handed[0]()
            self._handed.popleft()
        self._just_ended.clear()
        self._struck = False

    def _mend(self) -> None:
        """Put right what an exception left half done that struck the last holder of the lock."""
        if self._ending is not None:
            self._end(*self._ending)
        elif self._stepping is not None and not self._stepping.done:
            self._forget(self._stepping, interrupted(self._stepping))
        self._stepping = self._ending = None
        for state in dict.fromkeys([*self._group_states, *self._active]):
            if state.broken is not None and (state.busy or not state.said):
                self._give_up(state, state.broken, "")
            steps: set[int] = set()
            for task in state.tasks():
                if task.done or id(task.steps) in steps:
                    state.drop(task)
                steps.add(id(task.steps))
            if state.queue and state.enqueued and state.queue[0] is state.enqueued[-1]:
                state.queue.popleft()
            state.due = 0.0
            self._rest(state)
        self._claims = Claims()
        self._unclaimed = dict.fromkeys(self._claimants())

    def _admit_late(self, task: Task) -> None:
        """Enter what a signal handler has launched; once, if it is done twice."""
        if not task.done and task not in task.group_state.tasks():
            self._admit(task)

    def _pass(self, wanted: Task | None = None) -> int:
        now, found = monotonic(), IDLE
        if now - self._looked > QUIET:  # before a deadline counts, there must be a while of looking
            self._looking = now
        self._looked = now
        if wanted is not None and wanted in wanted.group_state.beside:
            state = wanted.group_state
            for _ in range(LOOKS):
                found = self._step(wanted)
                if found == PROGRESSED:
                    state.moved = now
                    break
            if wanted.done and now < self._poll.next:
                self._rest(state)
                if not (state.queue or state.enqueued) and len(self._active) <= 1:
                    return PROGRESSED  # other messages are looked at when they are waited for
        for state in list(self._active):
            moved = self._advance(state)
            if moved == PROGRESSED:
                state.moved = now
            found = max(found, moved)
        if found == PROGRESSED and now < self._poll.next:
            return found  # what is busy must not keep the others' deadlines from being looked at
        now = monotonic()
        if self._hear(now):
            found = PROGRESSED
        self._look_at_clock(now)
        return found

    def _hear(self, now: float) -> bool:
        """Every few milliseconds read what peers say; return whether it ended a task."""
        ended = False
        if self._poll.due(now):
            watch().look()
            for state in self._to_hear():
                ended = self._listen(state) or ended
            self.run_pollers()
        return ended

    def run_pollers(self) -> bool:
        """Have the callbacks made; return whether any are left."""
        for poller in list(self._pollers):
            with contextlib.suppress(MPI.Exception):
                if poller():
                    self._pollers.remove(poller)
        return bool(self._pollers)

    def _to_hear(self) -> list[GroupState]:
        """Return the groups to listen to now: the active ones, and some others in turn."""
        turn = list(itertools.islice(self._group_states, IDLE_GROUPS))
        for state in turn:
            self._group_states.move_to_end(state)
        return list(dict.fromkeys([*self._active, *turn]))

    def _advance(self, state: GroupState) -> int:
        found, new = IDLE, None
        state.channel.drain()
        while state.queue:
            head = state.queue[0]
            found = max(found, self._step(head))
            if head.done:
                continue
            if head.call.enqueued is None:
                break
            head.queued = False
            state.enqueued.append(head)
            state.queue.popleft()
            new = new or head
        while state.enqueued:
            oldest = state.enqueued[0]
            if oldest is new:
                break  # the GPU has hardly begun with it
            found = max(found, self._step(oldest))
            if not oldest.done:
                break
        for task in list(itertools.islice(state.beside, MESSAGES)):
            if not task.done:
                state.beside.move_to_end(task)  # the others have their turn
                found = max(found, self._step(task))
        self._rest(state)
        return found

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
        return PROGRESSED

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
            self._forget(task, interrupted(task, struck, cancelled=True))
        elif _are_over(task.steps):  # else it struck when the step was taken already
            self._abandoned.append(error.__traceback__)  # its frames hold what MPI may still use
            self._forget(task, interrupted(task, struck))
        self._stepping = None
        return struck

    def _listen(self, state: GroupState) -> bool:
        """Read a group's notices; fail its head if a peer has left that call."""
        if state.queue and state.queue[0].blocked:
            return False  # its communicator may be on the way to be freed
        state.channel.drain()
        with contextlib.suppress(MPI.Exception):
            state.peers.poll()
        if not (state.peers.left or state.peers.dead) or not state.busy:
            return False
        head = state.tasks()[0]
        if head.recovers:
            return False
        for rank, notice in state.peers.left.items():
            if head.queued and head.seq and notice.seq > head.seq:
                continue
            if says_the_same(head, notice.verdict):
                continue
            self._end(head, RemoteRankError(f"rank {rank} {notice.text}", rank=rank))
            return True
        for rank, how in state.peers.dead.items():
            if head.call.kind.ends and head.call.met:
                state.parting = min(state.parting, monotonic() + PARTING)
                if monotonic() < state.parting:
                    return False
            self._end(head, died(rank, how))
            return True
        return False

    def _look_at_clock(self, now: float) -> None:
        for state in list(self._active):
            if now >= state.warn_at:
                state.warn_at = patience.look(state, now, self._group_states)
            if now < state.due:
                continue
            quiet = now - max(self._looking, state.moved) >= QUIET
            tasks = state.tasks()
            state.due = min(map(due, tasks), default=math.inf)
            asked: set[int] = set()  # peers, about messages
            for task in tasks:
                if task.done or now < due(task) or task.blocked:
                    continue
                if not task.asked:
                    task.asked = True
                    ask(task, asked)
                if now >= task.deadline and quiet:
                    self._expire(task, now)

    def _expire(self, task: Task, now: float) -> None:
        if task in task.group_state.beside:
            self._step(task)  # it may not have had its turn for a while
            if task.done:
                return
        elapsed = now - task.called
        with contextlib.suppress(MPI.Exception):
            task.group_state.peers.poll()
        if task.call.kind.receives:
            stuck = late_message(task, elapsed, cancelled=False)
            self.cancel(task, late_message(task, elapsed), stuck)
            return
        error = why_late(task, elapsed, self._group_states)
        if error is not None:
            self._end(task, error)

    def _shorten(self, task: Task, timeout: float) -> None:
        deadline = monotonic() + timeout
        if deadline < task.deadline:
            task.deadline = deadline
            task.timeout = timeout
            task.group_state.due = min(task.group_state.due, due(task))

    # ---- callbacks ----

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


def _are_over(steps: Steps) -> bool:
    return cast("GeneratorType[int, None, None]", steps).gi_frame is None


_HOLDERS: frozenset[CodeType] = frozenset(
    function.__code__
    for function in vars(Engine).values()
    if isinstance(function, FunctionType) and "_lock" in function.__code__.co_names
)  # the functions that take the engine's lock


def engine() -> Engine:
    """Return this rank's."""
    return process().the(Engine)
