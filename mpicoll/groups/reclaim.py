"""How groups that the program merely dropped are given back.

To free a communicator is collective, and garbage collection is not: each rank's collector runs at
its own time.  So nothing happens when a group is collected.  The next call that makes a group out
of the same parent, in which all ranks of the parent meet anyway, finds with one allreduce of a byte
per child the groups that all ranks have dropped, and frees them.  Groups made by merges have
members outside the parent, and broken groups may have something pending: neither is freed.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from ..engine import communicators
from ..engine.progress import engine
from ..engine.recorder import Recorder
from ..engine.tasks import GroupState
from ..runtime import agreement
from ..runtime.library import MPI, Steps
from ..transports.base import Transport


class Child:
    """One group, as its parent remembers it on this rank.

    Args:
        group: the group's `Caller`, which is gone when the program has dropped the group.
        comms: the group's communicators.
        transport: what moves its data; held, since the collector must not destroy NCCL's, either.
        state: the group as the engine sees it.
        recorder: the group's flight recorder.
        children: the groups that were made out of this one.
    """

    __slots__ = ("_children", "_comms", "_group", "_recorder", "_state", "_transport")

    def __init__(
        self,
        group: object,
        comms: Sequence[MPI.Intracomm],
        transport: Transport,
        state: GroupState,
        recorder: Recorder,
        children: Children,
    ) -> None:
        self._group = weakref.ref(group)
        self._comms = comms
        self._transport = transport
        self._state = state
        self._recorder = recorder
        self._children = children

    @property
    def done(self) -> bool:
        """Whether this rank has no more use for the group, nor for any that was made out of it."""
        state = self._state
        if state.broken is not None or state.busy:
            return False
        return bool(state.closed) or (self._group() is None and self._children.done)

    def free(self, deadline: float) -> Steps:
        """Give the communicators back, unless `shutdown` did.  All members call this together."""
        if not self._state.closed:
            yield from self._children.free(deadline)
            yield from self._state.peers.drain()
            engine().delist(self._state)
            yield from self._transport.clear(self._state)
            self._state.close("reclaimed")
            self._recorder.close()
            yield from self._transport.close()
            self._transport.release(together=True)
            yield from communicators.free(self._comms, deadline)


class Children:
    """The groups that were made out of one parent, in the order of the calls that made them.

    The order is alike on all ranks of the parent; None stands for a group that this rank is not in.
    """

    def __init__(self) -> None:
        self._made: list[Child | None] = []

    def add(self, child: Child | None) -> None:
        """Remember the group that a call has made."""
        self._made.append(child)

    @property
    def done(self) -> bool:
        """Whether this rank has no more use for any of them."""
        return all(child is None or child.done for child in self._made)

    def reclaim(self, comm: MPI.Intracomm, deadline: float) -> Steps:
        """Free the children that no rank of `comm`, the parent's, uses any more.

        All ranks have arrived.
        """
        if not self._made:
            return
        votes = [child is None or child.done for child in self._made]
        done = yield from agreement.unanimous(comm, *votes)
        made, self._made = self._made, []
        for child, everywhere in zip(made, done, strict=True):
            if not everywhere:
                self._made.append(child)
            elif child is not None:
                yield from child.free(deadline)

    def free(self, deadline: float) -> Steps:
        """Free all of them, since no rank uses them or their parent any more."""
        for child in self._made:
            if child is not None:
                yield from child.free(deadline)
        self._made.clear()
