"""What the calls of a group go through, as the engine sees it, until the group is closed.

It holds nothing of what the user holds: a group that the program has dropped still answers its
peers, and arrives one last time when the process ends.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from ..engine import kinds
from ..engine.arrival import Arrival
from ..engine.call import Call
from ..engine.progress import engine
from ..engine.recorder import Recorder
from ..engine.tasks import Channel, GroupState
from ..engine.work import Work
from ..runtime.library import Steps
from ..runtime.settings import default_timeout
from ..transports.base import Transport

if TYPE_CHECKING:
    from ..transports.shm.core import Core, Rings


class OpenChannel(Channel):
    """That of one group.

    Args:
        state, arrival, transport, recorder: those of the group.
        core, rings: the compiled ways of its small calls and of its messages, if it has them.
    """

    def __init__(
        self,
        state: GroupState,
        arrival: Arrival,
        transport: Transport,
        recorder: Recorder,
        core: Core | None,
        rings: Rings | None,
    ) -> None:
        self.exchange = arrival.exchange
        self.gathering = arrival.gathering
        self._core = None if core is None else weakref.ref(core)
        self._transport: Transport | None = transport
        self._rings = rings
        self._arrive: Callable[[], None] = partial(
            _arrive_finally, state, arrival, transport, recorder
        )

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    @property
    def core(self) -> Core | None:
        return None if self._core is None else self._core()

    def arrive_finally(self) -> None:
        self._arrive()

    def drain(self) -> None:
        if self._rings is not None:
            self._rings.advance()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self._transport = self._rings = None
        self._arrive = super().arrive_finally


def _arrive_finally(
    state: GroupState, arrival: Arrival, transport: Transport, recorder: Recorder
) -> None:
    state.seq += 1
    call = Call(kinds.SHUTDOWN, leaving=True)
    work = Work(state, call, state.seq, default_timeout(), recorder)

    def steps() -> Steps:
        yield from arrival.meet(call, work.seq)
        yield from transport.clear(state)

    engine().launch(work, steps())
