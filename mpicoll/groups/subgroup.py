"""How some ranks of a group make a group of their own, without the others."""

from __future__ import annotations

from functools import partial

from ..engine import checks, communicators, kinds
from ..engine.call import Call
from ..engine.work import Work
from ..runtime.settings import seconds
from ..transports import select
from .caller import Caller, make_unnumbered


def subgroup(
    group: Caller,
    ranks: object,
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
    make = partial(communicators.part, group.comm, state.peers, members.ranks)
    resources = make_unnumbered(group, work, make, select.prepare)
    name = name or f"{state.name}:{list(members.ranks)}"
    return group.successor(resources, name, desc, timeout)
