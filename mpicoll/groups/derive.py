"""Groups of some ranks of a group: by lists, by colors, by nodes.

Every rank of the parent calls, and the parent remembers what was made, so that it can be given back
when all ranks have dropped it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..engine import checks, communicators, kinds
from ..engine.call import Call, Color, Members
from ..engine.kinds import Kind
from ..transports.select import Resources
from .caller import Caller


def split_group(
    parent: Caller,
    ranks: object,
    timeout: object,
    options: Any,
    name: str | None,
    desc: str | None,
) -> Caller | None:
    """Make the group of the ranks in this rank's list; None on a rank that is not in it.

    Args:
        options: where it has a `_timeout`, that counts if `timeout` is None, as in torch.
    """
    if timeout is None:
        timeout = getattr(options, "_timeout", None)

    def check(rank: int, size: int) -> Call:
        return Call(kinds.SPLIT_GROUP, payload=checks.split_ranks(size, ranks))

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        assert isinstance(call.payload, Members)
        return communicators.split_by_lists(parent.comm, call.payload.ranks, deadline)

    made, call = parent.make_comm(kinds.SPLIT_GROUP, timeout, check, make)
    assert isinstance(call.payload, Members)
    name = name or f"{parent.group_state.name}:split:{list(call.payload.ranks)}"
    return _part(parent, made, name, desc, timeout)


def split(parent: Caller, color: object, key: object, timeout: object) -> Caller | None:
    """Make the group of the ranks that give this rank's color; None where that is None."""

    def check(rank: int, size: int) -> Call:
        return Call(kinds.SPLIT, payload=Color(checks.color(color), checks.int32(key, "key")))

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        assert isinstance(call.payload, Color)
        return communicators.split(parent.comm, *call.payload, deadline)

    made, call = parent.make_comm(kinds.SPLIT, timeout, check, make)
    assert isinstance(call.payload, Color)
    return _part(
        parent, made, f"{parent.group_state.name}:split:{call.payload.color}", None, timeout
    )


def local_group(parent: Caller, timeout: object) -> Caller:
    """Make the group of the ranks on this rank's node."""
    return _by_node(parent, kinds.LOCAL_GROUP, timeout, lambda node, place: node)


def cross_node_group(parent: Caller, timeout: object) -> Caller:
    """Make the group of the ranks that have this rank's place on their nodes."""
    return _by_node(parent, kinds.CROSS_NODE_GROUP, timeout, lambda node, place: place)


def _by_node(
    parent: Caller, kind: Kind, timeout: object, color: Callable[[int, int], int]
) -> Caller:
    """Make the group of the ranks whose node and place on it have this rank's color."""

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        nodes, _ = yield from communicators.nodes_of(parent.comm, parent.options.sizes)
        mine = color(*nodes.locate(parent.rank))
        made = yield from communicators.split(parent.comm, mine, parent.rank, deadline)
        return made

    made, _ = parent.make_comm(kind, timeout, lambda rank, size: Call(kind), make)
    group = _part(parent, made, f"{parent.group_state.name}:{kind}", None, timeout)
    assert group is not None
    return group


def _part(
    parent: Caller, made: Resources | None, name: str, desc: str | None, timeout: object
) -> Caller | None:
    """Return a group of some of the parent's ranks, which the parent remembers."""
    part = None if made is None else parent.successor(made, name, desc, timeout)
    parent.children.add(None if part is None else part.child)
    return part
