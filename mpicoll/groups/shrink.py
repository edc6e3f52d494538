"""How the ranks that are left after a failure make a group without the others."""

from __future__ import annotations

from functools import partial

from ..engine import checks, communicators, kinds
from ..engine.call import Call
from ..engine.progress import engine
from ..engine.work import Work
from ..errors import GroupBrokenError
from ..runtime.settings import seconds
from ..transports import select
from .caller import Caller, make_unnumbered


def shrink_group(
    group: Caller,
    ranks_to_exclude: object,
    timeout: object,
    name: str | None,
    desc: str | None,
) -> Caller:
    """Make the group of the ranks that are neither excluded nor dead, and give this one up.

    The call takes no number: the order of the group's calls may be lost.
    """
    group.check_usable(even_if_broken=True)
    state = group.group_state
    out = checks.excluded(group.rank, group.size, ranks_to_exclude)
    limit = seconds(timeout, group.timeout)
    if state.broken is None:
        engine().fail_all(state, GroupBrokenError("shrink_group was called"))
    work = Work(state, Call(kinds.SHRINK_GROUP), state.seq, limit, group.recorder)
    make = partial(communicators.shrink, group.comm, state.peers, out)
    resources = make_unnumbered(group, work, make, select.prepare_survivors)
    state.replaced = True
    return group.successor(resources, name or f"{state.name}:shrink", desc, timeout)
