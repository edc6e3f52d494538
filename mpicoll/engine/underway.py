"""The tasks under way in this process: how they enter, what memory they use, how they end.

All of it is done under the engine's lock, and can be done twice: an exception from a signal handler
may strike in the middle (progress.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import (
    CallInterruptedError,
    GroupBrokenError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
    TransportError,
    interrupts,
    translate,
)
from ..runtime.library import MPI, Abandoned
from ..runtime.process import monotonic
from ..runtime.processes import watch
from .claims import Claims
from .deadlines import LOOK_AHEAD, due, too_late
from .recorder import leave_trace
from .tasks import Expired, Failure, GroupState, Task, Uncancelled

if TYPE_CHECKING:
    from .call import Call

NEWS = 0.05  # seconds that the death of a peer may take to show after a call failed by it


class UnderWay:
    """All tasks of this process that are not done, and what outlives them.

    Attributes:
        broken: groups whose members take leave of one another at exit.
    """

    def __init__(self) -> None:
        self._active: dict[GroupState, None] = {}
        self.light: dict[Any, Any] = {}  # messages under way that went the direct way, see `work`
        self._claims: Claims[Task] = Claims()  # the memory that tasks use
        self._unclaimed: dict[Task, None] = {}  # theirs is entered when another call asks for it
        self._ended: deque[Task] = deque()  # whose callbacks are due
        self._just_ended: set[int] = set()  # ids of tasks, since the lock was taken
        self._abandoned: list[object] = []  # what MPI may still use: never freed
        self._freed: Task | None = None  # whose step was stuck, and was freed
        self.broken: dict[GroupState, None] = {}

    def active(self) -> list[GroupState]:
        """Return the groups that have a call under way."""
        return list(self._active)

    @property
    def busy(self) -> bool:
        """Whether any task is not done."""
        return bool(self._active or self.light)

    def unfinished(self) -> Iterator[Task]:
        """Yield every task that is not done."""
        for state in list(self._active):
            yield from state.tasks()

    def _admit(self, task: Task) -> None:
        state = task.group_state
        self._active[state] = None
        if task.queued:
            state.queue.append(task)
        else:
            state.beside[task] = None
        if task.deadline - LOOK_AHEAD < state.due:
            state.due = min(state.due, due(task))
        self._unclaimed[task] = None

    def _rest(self, state: GroupState) -> None:
        """Leave a group alone from now on, if nothing is under way."""
        if not (state.beside or state.queue or state.enqueued):
            self._active.pop(state, None)

    @staticmethod
    def _entered(claims: Claims[Task], tasks: Iterable[Task]) -> Claims[Task]:
        for task in tasks:
            claims.add(*task.call.spans(), task)
        return claims

    def _claimants(self) -> Iterator[Task]:
        """Yield the tasks whose memory may not be used otherwise."""
        for task in self.unfinished():
            if not (task.done or task.released):
                yield task

    def _in_the_way(self, call: Call) -> Task | None:
        """Return a task whose memory a call wants; a receive that it repeats as `left`, if dropped.

        An exception that strikes when `recv` has just returned leaves its Work with nobody.
        Whether the program has it is seen by letting go of it.
        """
        task = self._claims.conflicting(*call.spans())
        if task is None or task.left or task.callbacks or not same(task.call, call):
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
        task.group_state.beside[twin] = None
        task.group_state.drop(task)
        self._claims.add(*twin.call.spans(), twin)

    def _disclaim(self, task: Task) -> None:
        if task in self._unclaimed:
            del self._unclaimed[task]
        else:
            self._claims.discard(*task.call.spans(), task)

    def _forget(self, task: Task, error: MpicollError | None) -> None:
        """End a task by what the user has heard of already."""
        task.fetched = True
        self._end(task, error)

    def cancel(
        self,
        task: Task,
        cancelled: MpicollError,
        stuck: MpicollError,
        lost: MpicollError | None = None,
    ) -> None:
        """End a receive, according to whether it can be cancelled, or its message has come."""
        try:
            task.steps.throw(Expired())
        except StopIteration:
            self._end(task, lost)
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
        ours = translate(error, task.call.kind.name)
        if isinstance(ours, TransportError) and not task.recovers:
            peers, until = task.group_state.peers, monotonic() + NEWS
            while not peers.dead and monotonic() < until:
                watch().look()
                with contextlib.suppress(MPI.Exception):
                    peers.poll()
            for rank, how in peers.dead.items():
                failed = died(rank, how)
                failed.__cause__ = ours
                return failed
        return ours

    def _stuck(self, task: Task) -> MpicollError:
        return too_late(task, monotonic() - task.called)

    def _end(self, task: Task, error: MpicollError | None) -> None:
        state = task.group_state
        if error is None or not error.breaks_group:
            self._settle(task, error)
            self._just_ended.add(id(task))
        else:
            task.error = error
            own = state.queue[0].seq if state.queue else 0  # of all that it leaves, the first
            if task.queued:
                own = min(own or task.seq, task.seq)
            self._break(state, error, own or state.seq + 1, arrived=task.queued and bool(own))
            self._give(task, error)
        state.drop(task)

    def _settle(self, task: Task, error: MpicollError | None) -> None:
        task.error = error
        if error is None:
            if task.seq:  # messages have no number
                state = task.group_state
                state.finished = task.call.kind, task.seq
                state.board.finish(task.seq)
        elif not error.breaks_group:
            error.__traceback__ = None  # its frames hold the task, which a drop should free
        if task in self._unclaimed:
            del self._unclaimed[task]
        elif self._active and not task.released:  # else it was done at once, or claims no more
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
            task.group_state.failures.append(task.failure)
        task.ended()

    def _abandon(self, task: Task) -> None:
        """Leave a task's steps where they are, and keep what they hold.

        What they wait for goes to `library.pending()`.  The frames through which the exception went
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

    def _give_up(self, state: GroupState, error: BaseException, said: str) -> None:
        seq = state.queue[0].seq if state.queue else 0
        self._break(state, error, seq or state.seq + 1, arrived=bool(seq), said=said)

    def _break(
        self, state: GroupState, error: BaseException, seq: int, *, arrived: bool, said: str = ""
    ) -> None:
        """Mark a group unusable from call `seq` on, tell its peers, fail what it has under way."""
        if state.broken is None:
            state.broken, state.left = error, seq
        if not state.said:
            if not MPI.Is_finalized():
                self.broken[state] = None
                with contextlib.suppress(MPI.Exception):
                    if isinstance(error, RemoteRankError):  # the cause must not be buried
                        state.peers.follow()
                    elif isinstance(error, RankFailedError):
                        state.peers.report_death(error.rank)
                    else:
                        state.peers.leave(seq, said or f"left the group: {error}", arrived=arrived)
            try:
                state.channel.abort()
            except Exception as failed:  # of NCCL, or for want of threads
                if interrupts(failed):
                    raise
            state.said = True
        for task in state.tasks():
            self._give(task, error)
            state.drop(task)
        self._active.pop(state, None)
        if state.broken is error:
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


def died(rank: int, how: str) -> RankFailedError:
    return RankFailedError(f"rank {rank} {how}", rank=rank)


def interrupted(
    task: Task, error: BaseException | None = None, *, cancelled: bool = False
) -> CallInterruptedError:
    by = "an exception from a signal handler" if error is None else type(error).__name__
    text = f"{by} interrupted {task.call.describe()}"
    if cancelled:
        text += ", which was cancelled"
    return CallInterruptedError(text, breaks_group=not cancelled)


def gone(task: Task) -> CallInterruptedError:
    return CallInterruptedError(
        f"the wait for {task.call.describe()} was interrupted, and its array given to another call",
        breaks_group=False,
    )


def same(a: Call, b: Call) -> bool:
    """Return whether two calls are receives of the same message into the same array."""
    if not (a.kind.receives and b.kind.receives):
        return False
    return (a.peer, a.tag, a.spans(), a.dtype) == (b.peer, b.tag, b.spans(), b.dtype)
