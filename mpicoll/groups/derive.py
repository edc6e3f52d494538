"""Groups of some ranks of a group: by lists, by colors, by nodes.

Every rank of the parent calls, and the parent remembers what was made, so that it can be given back
when all ranks have dropped it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..engine import calls, communicators
from ..engine.calls import Call
from ..transports.select import Resources
from .caller import Caller


def split_group(
    parent: Caller,
    ranks: Sequence[int],
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
        return Call("split_group", payload=calls.split_ranks(size, ranks))

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        return communicators.split_by_lists(parent.comm, call.payload, deadline)

    made, call = parent.make_comm("split_group", timeout, check, make)
    name = name or f"{parent.lane.name}:split:{list(call.payload)}"
    return _part(parent, made, name, desc, timeout)


def split(parent: Caller, color: int | bool | None, key: int, timeout: object) -> Caller | None:
    """Make the group of the ranks that give this rank's color; None where that is None."""

    def check(rank: int, size: int) -> Call:
        return Call("split", payload=(calls.color(color), calls.int32(key, "key")))

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        chosen, order = call.payload
        return communicators.split(parent.comm, chosen, order, deadline)

    made, call = parent.make_comm("split", timeout, check, make)
    return _part(parent, made, f"{parent.lane.name}:split:{call.payload[0]}", None, timeout)


def by_node(parent: Caller, kind: str, timeout: object) -> Caller:
    """Make the group of this rank's node ("local_group"), or that across the nodes."""

    def make(call: Call, deadline: float) -> communicators.MakesComm:
        nodes, _ = yield from communicators.nodes_of(parent.comm, parent.options.sizes)
        node, place = nodes.locate(parent.rank)
        color = node if kind == "local_group" else place
        made = yield from communicators.split(parent.comm, color, parent.rank, deadline)
        return made

    made, _ = parent.make_comm(kind, timeout, lambda rank, size: Call(kind), make)
    group = _part(parent, made, f"{parent.lane.name}:{kind}", None, timeout)
    assert group is not None
    return group


def _part(
    parent: Caller, made: Resources | None, name: str, desc: str | None, timeout: object
) -> Caller | None:
    """Return a group of some of the parent's ranks, which the parent remembers."""
    part = None if made is None else parent.successor(made, name, desc, timeout)
    parent.children.add(None if part is None else part.child)
    return part
