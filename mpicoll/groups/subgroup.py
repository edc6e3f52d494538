"""How some ranks of a group make a group of their own, without the others."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import checks, communicators, kinds
from ..engine.call import Call
from ..engine.progress import engine
from ..engine.work import Work
from ..runtime.library import Steps
from ..runtime.settings import seconds
from ..transports import select
from .caller import VERDICT, Caller, wait_through


def subgroup(
    group: Caller,
    ranks: Sequence[int],
    timeout: object,
    name: str | None,
    desc: str | None,
) -> Caller:
    """Make the group of the ranks in a list, all of which call, and no other.

    The call takes no number, and waits in no queue: the other ranks know nothing of it.  So the
    group does not remember what was made, either, as it does of `split_group`.
    """
    group.check_usable()
    limit = seconds(timeout, group.timeout)
    members = checks.members(group.rank, group.size, ranks)
    state = group.group_state
    work = Work(state, Call(kinds.SUBGROUP, payload=members), 0, limit, group.recorder)
    engine().launch(work, _steps(group, work, members.ranks))
    wait_through(work)
    name = name or f"{state.name}:{list(members.ranks)}"
    return group.successor(work.call.result, name, desc, timeout)


def _steps(group: Caller, work: Work, ranks: Sequence[int]) -> Steps:
    deadline = work.deadline
    work.deadline += VERDICT
    made = yield from communicators.part(group.comm, group.group_state.peers, ranks, deadline)
    assert made is not None
    work.call.result = yield from select.prepare(made, group.options, deadline)
