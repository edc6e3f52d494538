"""How groups merge: the first group of a plan takes in the others, one by one.

Groups whose leaders are of one MPI world reach one another through it.  Separately launched jobs
are connected by a port that the first group's leader opens.  MPI's calls for that block, and can
crash if the other side has died, so no rank makes them before both leaders have written to the
store that they are about to:

    offer      "connect to this port"     the first group's leader, to the leader whose turn it is
    coming     "I am about to connect"    that leader's answer
    accepting  "I am about to accept"     the first group's leader again
    failed     "there will be no merge"   a leader that gives up, to all, with its reason

A leader broadcasts what it learns to the ranks that then make the same call with it.  Where a step
fails, all groups of the plan are left as they were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..engine import checks, kinds
from ..engine.call import Call, Pieces
from ..engine.communicators import MakesComm, Plan, foreign_ranks, free, host_mark
from ..engine.progress import engine
from ..errors import (
    CollectiveTimeoutError,
    InvalidCallError,
    UnsupportedError,
    interrupts,
)
from ..runtime.agreement import Decides, before, decision, too_late
from ..runtime.library import MPI, POLL, Steps, greeting_tag, merge_tag, pause, pending
from ..runtime.process import monotonic
from ..runtime.processes import NOBODY, Identity, watch
from . import rendezvous
from .caller import SLACK, Caller
from .rendezvous import BEAT, PREFIX, Entry

if TYPE_CHECKING:
    from ..stores import Store

CONNECTING = 10  # seconds that MPI's call may take on a side that has said it is about to make it

_OP = kinds.MERGE_REMOTE_GROUP.name
_USABLE = ". The group is still usable"


def merge_remote_group(
    group: Caller,
    store: Store,
    size: object,
    timeout: object,
    name: str | None,
    desc: str | None,
) -> Caller:
    """Merge a group with the others that its rank 0, the leader, meets in the store."""

    def check(rank: int, own: int) -> Call:
        total = checks.int32(size, "size")
        if total < own:
            raise InvalidCallError(
                f"size must be at least this group's {own} ranks, but got {total}"
            )
        for method in ("set", "get", "add"):
            if rank == 0 and not callable(getattr(store, method, None)):
                raise InvalidCallError(
                    f"store must have {method}(), as c10d's stores do, but got "
                    f"{type(store).__name__}: use FileStore or TCPStore"
                )
        return Call(kinds.MERGE_REMOTE_GROUP, root=0, count=total)

    def make(call: Call, deadline: float) -> MakesComm:
        members = yield from rendezvous.members(group.comm)
        if group.rank == 0:
            mine = rendezvous.entry(
                group.group_state.name, group.options.alike(), members, call.count
            )
            plan = yield from rendezvous.meet(store, mine, deadline)
            call.payload = Pieces([json.dumps(plan).encode()])
        yield from group.transport.broadcast_object(call)
        agreed = call.payload = json.loads(bytes(call.result[0]))
        made = yield from _merge(group.comm, agreed, store, deadline)
        return made

    made, call = group.make_comm(
        kinds.MERGE_REMOTE_GROUP, timeout, check, make, slack=SLACK, parts=False
    )
    assert made is not None and isinstance(call.payload, dict)
    first = call.payload["groups"][0]["name"]
    return group.successor(made, name or f"{first}:merge", desc, timeout)


def _merge(comm: MPI.Intracomm, plan: Plan, store: Store | None, deadline: float) -> MakesComm:
    """Merge the groups of a plan.  Rank 0 of each, its leader, has the store."""
    if "late" in plan:
        raise too_late(plan["late"], _OP)
    if plan["wrong"]:
        raise InvalidCallError(f"{_OP}: {plan['wrong']}")
    if plan.get("apart"):
        raise UnsupportedError(f"{_OP}: these jobs can't be connected: {plan['apart']}{_USABLE}")
    groups, place = plan["groups"], plan["place"]
    if len(groups) == 1:
        return (yield from engine().outside(deadline, "MPI_Comm_dup", comm.Dup))
    leads = comm.Get_rank() == 0
    one_world = len({one["job"] for one in groups}) == 1
    talk = _Talk(store, plan, deadline) if leads and not one_world and store is not None else None
    merged = comm
    try:
        for i in range(max(1, place), len(groups)):
            port = ""
            if not one_world:
                port = yield from _agree(merged, talk, i, deadline)
            take_in = _take_in(merged, groups, i, joins=i == place, port=port, deadline=deadline)
            wider = yield from take_in
            if merged is not comm:
                yield from free([merged], deadline)
            merged = wider
        yield from greet(merged, deadline, _OP)
    except CollectiveTimeoutError as error:
        if talk is not None:
            talk.give_up(str(error))
        raise  # what has merged so far is not freed: some of its ranks may be gone
    return merged


def _take_in(
    merged: MPI.Intracomm,
    groups: Sequence[Entry],
    i: int,
    *,
    joins: bool,
    port: str,
    deadline: float,
) -> Generator[int, None, MPI.Intracomm]:
    """Connect what has merged so far with group `i`, to which this rank belongs if it `joins`."""
    peer = groups[0 if joins else i]
    what = f"the merge with group {peer['name']!r}"

    def connect() -> MPI.Intercomm:
        seconds = min(CONNECTING, max(1, math.ceil(deadline - monotonic())))
        info = MPI.Info.Create({"timeout": str(seconds)})  # Open MPI knows no such thing
        try:
            return (merged.Connect if joins else merged.Accept)(port, info, 0)
        except MPI.Exception as error:
            raise too_late(
                f"{what} failed: its leader said that it is about to "
                f"{'accept' if joins else 'connect'}, but has not: {error}",
                _OP,
            ) from error
        finally:
            info.Free()
            if merged.Get_rank() == 0 and not joins:
                MPI.Close_port(port)

    def take_in() -> MPI.Intracomm:
        if groups[0]["job"] == groups[i]["job"]:
            inter = merged.Create_intercomm(0, MPI.COMM_WORLD, peer["leader"], merge_tag(i))
        else:
            inter = connect()
        wider = inter.Merge(joins)
        inter.Free()
        return wider

    return (yield from engine().outside(deadline, what, take_in))


def _agree(
    merged: MPI.Intracomm, talk: _Talk | None, i: int, deadline: float
) -> Generator[int, None, str]:
    """Have the leaders say that they are about to connect group `i`; return the port."""

    def about() -> Decides:
        assert talk is not None  # this is rank 0
        return talk.about(i)

    agreed = yield from decision(merged, about, deadline, _OP)
    return str(agreed["port"])


class _Talk:
    """One leader's messages to the other leaders through the store, and theirs to it."""

    def __init__(self, store: Store, plan: Plan, deadline: float) -> None:
        self._store = store
        self._prefix = f"{PREFIX}connect/{plan['nonces'][0]}/"
        self._groups: Sequence[Entry] = plan["groups"]
        self._place: int = plan["place"]
        self._deadline = deadline

    def about(self, i: int) -> Decides:
        """Make sure that both sides of step `i` are there; return the port, or why not."""
        port = ""
        try:
            if self._place == i:
                port = yield from self._hear(f"{i}/offer", self._groups[0])
                self._say(f"{i}/coming")
                yield from self._hear(f"{i}/accepting", self._groups[0])
                yield from pause(BEAT)  # by then it shows if the other process died of the call
                self._look_after(self._groups[0])
                return {"port": port}
            if self._groups[0]["job"] != self._groups[i]["job"]:
                port = MPI.Open_port()
            self._say(f"{i}/offer", port)
            yield from self._hear(f"{i}/coming", self._groups[i])
            self._say(f"{i}/accepting")
            return {"port": port}
        except CollectiveTimeoutError as error:
            why = str(error)
        except Exception as error:
            if interrupts(error):
                raise
            why = f"the store failed: {error!r}"
        if port and self._place != i:
            MPI.Close_port(port)
        return why

    def give_up(self, why: str) -> None:
        """Let the other leaders know that there will be no merge."""
        try:
            self._say("failed", why.removeprefix(f"{_OP}: ").removesuffix(_USABLE))
        except Exception as error:  # the other leaders find out at their deadlines
            if interrupts(error):
                raise

    def _say(self, key: str, text: str = "") -> None:
        self._store.set(f"{self._prefix}{key}", text)
        self._store.add(f"{self._prefix}{key}/said", 1)

    def _said(self, key: str) -> str | None:
        if not self._store.add(f"{self._prefix}{key}/said", 0):
            return None
        return bytes(self._store.get(f"{self._prefix}{key}")).decode()

    def _hear(self, key: str, peer: Entry) -> Generator[int, None, str]:
        """Wait for another leader's message."""
        while True:
            self._look_after(peer)
            said = self._said(key)
            if said is not None:
                return said
            failed = self._said("failed")
            if failed is not None:
                raise CollectiveTimeoutError(failed)
            if monotonic() > self._deadline:
                raise CollectiveTimeoutError(
                    f"group {peer['name']!r} was there, but has not gone on in time: "
                    "its rank 0 is stopped or dead"
                )
            yield from pause(BEAT)

    @staticmethod
    def _look_after(peer: Entry) -> None:
        """Raise if another leader runs on this machine, and is seen to be dead."""
        who = Identity(*peer["process"])
        if peer["host"] != host_mark() or who.namespace == NOBODY:
            return
        watch().add(who, foreign=True)
        watch().look()
        if who in watch().dead:
            raise CollectiveTimeoutError(
                f"group {peer['name']!r} was there, but its rank 0 {watch().dead[who]}"
            )


def greet(comm: MPI.Intracomm, deadline: float, op: str) -> Steps:
    """Exchange a byte with every rank of another world, so that MPI has connected them all.

    MPI connects two ranks when the first message goes between them, and crashes where one of them
    has died: so the first message must not be the one that reports a failure.
    """
    others, tag, kept = foreign_ranks(comm), greeting_tag(), pending()
    room = np.zeros((2, comm.Get_size()), dtype=np.uint8)
    requests = [comm.Irecv([room[0, r : r + 1], MPI.BYTE], r, tag) for r in others]
    requests += [comm.Isend([room[1, r : r + 1], MPI.BYTE], r, tag) for r in others]
    for place, request in enumerate(requests):
        try:
            yield from before(request, deadline, POLL, op)
        except BaseException:
            kept.extend(requests[place + 1 :])
            raise
