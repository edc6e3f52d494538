"""Who is late: when a task's deadline is to be looked at, whom it waits for, and that in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import CollectiveTimeoutError, MpicollError, RemoteRankError
from ..runtime.process import monotonic
from .peers import Peers
from .rollcall import SHOWN, Verdict
from .tasks import GroupState, Task

LOOK_AHEAD = 0.5  # seconds before a deadline at which peers are asked, at most
NOT_COMPARED = ": it was not compared (checks='first'), and peers may have called something else"


def look_ahead(task: Task) -> float:
    return min(LOOK_AHEAD, task.timeout / 10)


def due(task: Task) -> float:
    """Return when a task's deadline is to be looked at next."""
    if task.asked:
        return task.deadline
    return task.deadline - look_ahead(task)


def waits_for(task: Task) -> Task:
    """Return the task for which a task waits, or itself."""
    state = task.group_state
    if task.queued:
        return state.queue[0]
    return state.enqueued[0] if task in state.enqueued else task


def ask(task: Task, asked: set[int]) -> None:
    """Begin to find out, shortly before its deadline, what holds a task up."""
    head = waits_for(task)
    if task.call.kind.queued and head.seq and not head.recovers:
        head.group_state.peers.call_roll(head.seq, task.deadline)
    else:
        ask_where(task, asked)


def ask_where(task: Task, asked: set[int]) -> None:
    """Ask peers where they are, but for those that were asked: of a message its other end."""
    state = task.group_state
    if not task.call.kind.queued:
        peers = {task.call.peer} if task.call.peer >= 0 else set(range(state.peers.size))
        some = sorted(peers - asked)[:SHOWN]
        state.peers.ask(some)
        asked.update(some)
    elif state.once is not None:
        state.peers.ask()


def says_the_same(head: Task, verdict: Verdict | None) -> bool:
    """Return whether a task is about to say by itself what one has left for who has left it."""
    return (
        verdict is not None
        and verdict.seq == head.seq
        and head.group_state.peers.rank not in verdict.missing
        and head.deadline - monotonic() <= look_ahead(head)
    )


def why_late(task: Task, elapsed: float, states: Iterable[GroupState]) -> MpicollError | None:
    """Return the error of a task whose deadline has passed; None while that is being found out.

    Not for a receive, which is cancelled; see `late_message`.

    Args:
        task: the task, of whose peers the notices have just been read.
        elapsed: seconds since the call.
        states: those of all open groups.
    """
    head, peers = waits_for(task), task.group_state.peers
    if not task.call.kind.queued:
        return late_message(task, elapsed)
    if task.recovers:
        return too_late(task, elapsed)
    if not head.seq:
        return _not_compared(task, elapsed)
    verdict = peers.find_missing(head.seq, task.deadline)
    if verdict is None:
        return None
    if peers.rank in verdict.missing:
        return _came_too_late(verdict)
    return too_late(task, elapsed, verdict, crossed(head, verdict, states))


def crossed(head: Task, verdict: Verdict, all_states: Iterable[GroupState]) -> str:
    """Say whether one that is missing waits in another group, for this rank."""
    state, me = head.group_state, head.group_state.peers.rank
    states = {other.mark: other for other in all_states if other.mark and other is not state}
    for rank, said in (verdict.said or {}).items():
        for mark, seq in said.calls:
            other = states.get(mark)
            if other is not None and other.seq < seq:
                return (
                    f". Groups are called in opposite orders: rank {me} is in call #{head.seq} "
                    f"of group {state.name!r}{head.where()} and waits for rank {rank}, which is "
                    f"in call #{seq} of group {other.name!r} and waits for rank {me}. Call "
                    "groups in one order on all ranks"
                )
    return ""


def _late(
    task: Task, elapsed: float, text: str, missing: Sequence[int] = (), *, breaks_group: bool = True
) -> CollectiveTimeoutError:
    return CollectiveTimeoutError(
        f"{named(task)} was not done after {elapsed:.3f} s{text}",
        op=task.call.kind.name,
        seq=task.seq,
        elapsed=elapsed,
        missing=missing,
        breaks_group=breaks_group,
    )


def named(task: Task) -> str:
    """Say which call of which group a task is."""
    number = f" (call #{task.seq})" if task.seq else ""
    return f"{task.call.describe()}{number} of group {task.group_state.name!r}"


def too_late(
    task: Task, elapsed: float, verdict: Verdict | None = None, crossed: str = ""
) -> CollectiveTimeoutError:
    missing = () if verdict is None else verdict.missing
    return _late(task, elapsed, who_is_late(task, verdict, crossed), missing)


def who_is_late(task: Task, verdict: Verdict | None, crossed: str) -> str:
    """Go on after `named` with who is missing, and where they are."""
    if verdict is None or not verdict.missing:
        return ", although all ranks have arrived: a peer is slow or stuck in moving the data"
    missing = list(verdict.missing)
    text = f": ranks {missing[:SHOWN]}{_more(len(missing))} have not arrived"
    if task.call.met:
        text += ", or can't be reached any more"
    return text + in_words(task.group_state.peers.describe(verdict)) + crossed


def _not_compared(task: Task, elapsed: float) -> CollectiveTimeoutError:
    """Say where the peers are in a call of whose arrival nothing is known."""
    return _late(task, elapsed, NOT_COMPARED + answered(task.group_state.peers))


def late_message(task: Task, elapsed: float, *, cancelled: bool = True) -> CollectiveTimeoutError:
    """Say what became of a message, and what its other end is doing."""
    call = task.call
    if not call.kind.receives:
        text = ": the receiver did not take the message"
    elif cancelled:
        text = ": no matching message came. The receive was cancelled; the group is still usable"
    else:
        text = (
            ": its message has begun to come, and its sender goes no further. Such a receive can't "
            "be cancelled, so the group is broken, and the array may still be written"
        )
    text += other_end(task)
    return _late(task, elapsed, text, breaks_group=not (call.kind.receives and cancelled))


def unmatched(task: Task) -> str:
    """Go on after `named` with what has not become of a message, or of a `subgroup`."""
    if task.call.kind.receives:
        return ": no matching message has come"
    if task.call.dtype is None:
        return ": not all members of the group that it makes have called it"
    return ": the receiver has not taken the message"


def other_end(task: Task) -> str:
    """Say what those are doing who could send or take a message, as far as they have answered."""
    peers, peer = task.group_state.peers, task.call.peer
    if peer < 0:
        return answered(peers)
    return "" if peer == peers.rank else in_words({peer: peers.whereabouts(peer)})


def _came_too_late(verdict: Verdict) -> RemoteRankError:
    return RemoteRankError(
        f"rank {verdict.by} gave up call #{verdict.seq} before this rank had arrived in it",
        rank=verdict.by,
    )


def answered(peers: Peers) -> str:
    """Say where those are that have answered."""
    answers = peers.answers()
    more = _more(len(answers))
    text = in_words({rank: answers[rank] for rank in sorted(answers)[:SHOWN]})
    return f"{text};{more} have answered" if more else text


def in_words(said: dict[int, str]) -> str:
    """Go on with what is known of some ranks."""
    return "".join(f"; rank {rank} {words}" for rank, words in said.items())


def _more(ranks: int) -> str:
    """Count those of so many ranks that are not described."""
    return f" and {ranks - SHOWN} more" if ranks > SHOWN else ""
