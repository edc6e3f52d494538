"""A line, long before any deadline, that says for whom a call waits.

After MPICOLL_WARN_AFTER seconds, and again whenever the call has waited for twice as long as at the
last time.  Of a collective the lowest rank that waits says it for all, found by a roll call; of the
messages of a group each rank says it for the one that has waited longest.  The words are those of
the error that the deadline would bring.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator

from ..errors import interrupts
from ..runtime.settings import NEVER, warn_after
from .deadlines import (
    LOOK_AHEAD,
    NOT_COMPARED,
    answered,
    ask_where,
    crossed,
    look_ahead,
    named,
    other_end,
    unmatched,
    who_is_late,
)
from .tasks import GroupState, Task

LOOKS = 20  # at what waits, in the time after which it is said
MOVING = 1.0  # seconds since something was moved in a group: its ranks are busy, not stuck


def look(state: GroupState, now: float, states: Iterable[GroupState]) -> float:
    """Write what is to be said of a group's calls; return when to look again.

    Args:
        states: those of all open groups.
    """
    after = warn_after()
    if math.isinf(after):
        return math.inf
    ahead, again = min(LOOK_AHEAD, after / 10), now + after / LOOKS
    for task in _longest(state, after):
        if now < task.warn_at - ahead:
            continue
        begins, task.warning = not task.warning, True
        if begins:
            task.warn_at = max(task.warn_at, now + ahead)
        text = _find_out(task, now, states, begins=begins)
        if text is None:
            again = now
            continue
        task.warning = False
        task.warn_at = 2 * now - task.called
        if text:
            _write(f"{named(task)}{task.where()}{text}{_others(task, now, ahead)}", task, now)
    return again


def _longest(state: GroupState, after: float) -> Iterator[Task]:
    """Yield the collective that holds up the others, and the message that has waited longest."""
    heads = list(itertools.islice(itertools.chain(state.queue, state.enqueued), 1))
    for tasks in (heads, state.beside):
        waiting = [task for task in tasks if _counts(task, after)]
        if waiting:
            yield min(waiting, key=lambda task: (not task.warning, task.warn_at, task.called))


def _counts(task: Task, after: float) -> bool:
    task.warn_at = task.warn_at or task.called + after
    if task.done or task.blocked or task.recovers or task.call.leaving or task.timeout >= NEVER:
        return False
    return task.warn_at < task.deadline - look_ahead(task)


def _find_out(task: Task, now: float, states: Iterable[GroupState], *, begins: bool) -> str | None:
    """Say what holds a task up: "" if another rank does, None while it is not known."""
    state, peers = task.group_state, task.group_state.peers
    if task.call.kind.queued and task.seq:
        verdict = peers.find_late(task.seq, task.warn_at, anew=begins)
        if verdict is None:
            return None
        if verdict.by != peers.rank or (not verdict.missing and now < state.moved + MOVING):
            return ""
        return who_is_late(task, verdict, crossed(task, verdict, states))
    if begins:
        ask_where(task, set())
    if now < task.warn_at:
        return None
    if task.call.kind.queued:
        return NOT_COMPARED + answered(peers)
    return unmatched(task) + other_end(task)


def _others(task: Task, now: float, ahead: float) -> str:
    """Count the messages that are said to wait with this one."""
    if task.call.kind.queued:
        return ""
    state = task.group_state
    others = [x for x in state.beside if x is not task and 0 < x.warn_at <= now + ahead]
    for other in others:
        other.warn_at = task.warn_at
    return f" (and so {len(others)} more messages)" if others else ""


def _write(text: str, task: Task, now: float) -> None:
    rank, waited = task.group_state.peers.rank, now - task.called
    line = f"mpicoll: rank {rank} has waited {waited:.3g} s in {text}".splitlines()[0]
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except Exception as error:  # it may be closed, or anything
        if interrupts(error):
            raise
