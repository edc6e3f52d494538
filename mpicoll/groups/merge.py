"""How the groups of a plan become one communicator: the first takes in the others, one by one.

Groups whose leaders are of one MPI world reach one another through it.  Separately launched jobs
are connected by a port that the first group's leader opens.  MPI's calls for that block, and can
crash if the other side has died, so nobody makes them before both leaders have said, through the
store, that they are about to:

    offer      "connect to this port"     the first group's leader, to the one whose turn it is
    coming     "I am about to connect"    its answer
    accepting  "I am about to accept"     the first one again
    failed     "there will be no merge"   whoever gives up, to all, and why

Whatever a leader learns, it broadcasts to those who then make the same call.  Where a step fails,
all groups of the plan are left as they were.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from ..engine.communicators import MakesComm, Plan, free, host_mark, strangers
from ..engine.progress import engine
from ..errors import (
    CollectiveTimeoutError,
    InvalidCallError,
    UnsupportedError,
    interrupts,
)
from ..runtime.library import (
    IDLE,
    MPI,
    POLL,
    Abandoned,
    Steps,
    greeting_tag,
    merge_tag,
    pause,
    pending,
)
from ..runtime.processes import NOBODY, Identity, watch
from ..stores import Store
from .rendezvous import BEAT, PREFIX, Entry

CONNECTING = 10  # seconds that a side which says it is about to connect, or accept, may still take

_SAYS = 2048  # bytes of what a leader tells its members, as JSON
_OP = "merge_remote_group"
_USABLE = ". The group is still usable"
_LAST_WORD = 0.5  # seconds that a leader's word may take to its members


def merge(comm: MPI.Intracomm, plan: Plan, store: Store | None, deadline: float) -> MakesComm:
    """Merge the groups of a plan.  Rank 0 of each, its leader, has the store."""
    if "late" in plan:
        raise too_late(plan["late"])
    if plan["wrong"]:
        raise InvalidCallError(f"{_OP}: {plan['wrong']}")
    if plan.get("apart"):
        raise UnsupportedError(f"{_OP}: these jobs can't be connected: {plan['apart']}{_USABLE}")
    groups, place = plan["groups"], plan["place"]
    if len(groups) == 1:
        return (yield from engine.outside(deadline, "MPI_Comm_dup", comm.Dup))
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
        raise  # what has merged so far stays where it is: its members may be gone
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
        seconds = min(CONNECTING, max(1, math.ceil(deadline - time.monotonic())))
        info = MPI.Info.Create({"timeout": str(seconds)})  # Open MPI knows no such thing
        try:
            return (merged.Connect if joins else merged.Accept)(port, info, 0)
        except MPI.Exception as error:
            raise too_late(
                f"{what} failed: its leader said that it is about to "
                f"{'accept' if joins else 'connect'}, but has not: {error}"
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

    return (yield from engine.outside(deadline, what, take_in))


def _agree(
    merged: MPI.Intracomm, talk: _Talk | None, i: int, deadline: float
) -> Generator[int, None, str]:
    """Have the leaders say that they are about to connect group `i`; return the port."""
    said: dict[str, str] = {}
    if merged.Get_rank() == 0:
        assert talk is not None
        said = yield from talk.about(i)
    said = yield from tell(merged, said, deadline, _OP)
    if "failed" in said:
        raise too_late(said["failed"])
    return str(said["port"])


class _Talk:
    """What one leader says to the others through the store, and hears from them."""

    def __init__(self, store: Store, plan: Plan, deadline: float) -> None:
        self._store = store
        self._prefix = f"{PREFIX}connect/{plan['nonces'][0]}/"
        self._groups: Sequence[Entry] = plan["groups"]
        self._place: int = plan["place"]
        self._deadline = deadline

    def about(self, i: int) -> Generator[int, None, dict[str, str]]:
        """Make sure that both sides of step `i` are there; return the port, or what failed."""
        port = ""
        try:
            if self._place == i:
                port = yield from self._hear(f"{i}/offer", self._groups[0])
                self._say(f"{i}/coming")
                yield from self._hear(f"{i}/accepting", self._groups[0])
                yield from pause(BEAT)  # a process that dies of what it is about to do is seen to
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
        return {"failed": why}

    def give_up(self, why: str) -> None:
        """Let the other leaders know that there will be no merge."""
        try:
            self._say("failed", why.removeprefix(f"{_OP}: ").removesuffix(_USABLE))
        except Exception as error:  # they find out by themselves, at their deadlines
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
        """Wait for a word of another leader."""
        while True:
            self._look_after(peer)
            said = self._said(key)
            if said is not None:
                return said
            failed = self._said("failed")
            if failed is not None:
                raise CollectiveTimeoutError(failed)
            if time.monotonic() > self._deadline:
                raise CollectiveTimeoutError(
                    f"group {peer['name']!r} was there, but has not gone on in time: "
                    "its rank 0 is stopped or dead"
                )
            yield from pause(BEAT)

    @staticmethod
    def _look_after(peer: Entry) -> None:
        """Raise if another leader is of this machine, and seen to be dead."""
        who = Identity(*peer["process"])
        if peer["host"] != host_mark() or who.namespace == NOBODY:
            return
        watch.add(who, stranger=True)
        watch.look()
        if who in watch.dead:
            raise CollectiveTimeoutError(
                f"group {peer['name']!r} was there, but its rank 0 {watch.dead[who]}"
            )


# ---- what spawn.py does alike ----


def tell(
    comm: MPI.Intracomm, said: dict[str, Any], deadline: float, op: str
) -> Generator[int, None, dict[str, Any]]:
    """Return on all ranks what rank 0 says."""
    room = np.zeros(_SAYS, dtype=np.uint8)
    if comm.Get_rank() == 0:
        text = json.dumps(said)
        if len(text) > _SAYS:  # an error's, or a group's name
            text = json.dumps({"failed": str(said)[: _SAYS // 12]})  # 6 letters may stand for one
        room[: len(text)] = np.frombuffer(text.encode(), dtype=np.uint8)
    yield from _before(comm.Ibcast([room, MPI.BYTE], 0), deadline, IDLE, op)
    told: dict[str, Any] = json.loads(room.tobytes().rstrip(b"\0"))
    return told


def greet(comm: MPI.Intracomm, deadline: float, op: str) -> Steps:
    """Exchange a byte with every rank of another world, so that MPI has connected them all.

    It connects two ranks when the first message goes, and crashes where one of them has died: a
    failure would be the worst time to speak for the first time.
    """
    others, tag = strangers(comm), greeting_tag()
    room = np.zeros((2, comm.Get_size()), dtype=np.uint8)
    requests = [comm.Irecv([room[0, r : r + 1], MPI.BYTE], r, tag) for r in others]
    requests += [comm.Isend([room[1, r : r + 1], MPI.BYTE], r, tag) for r in others]
    for place, request in enumerate(requests):
        try:
            yield from _before(request, deadline, POLL, op)
        except BaseException:
            pending.extend(requests[place + 1 :])
            raise


def _before(request: MPI.Request, deadline: float, mood: int, op: str) -> Steps:
    """Wait for a request; raise if the deadline passes, as where a process of the peers' died."""
    try:
        while not request.Test():
            if time.monotonic() > deadline + _LAST_WORD:
                raise too_late("some that were there have not gone on in time", op)
            yield mood
    except (Abandoned, CollectiveTimeoutError):
        pending.append(request)
        raise


def too_late(why: str, op: str = _OP) -> CollectiveTimeoutError:
    """Return the error of a merge to which not all came, or not in time."""
    return CollectiveTimeoutError(f"{op}: {why}{_USABLE}", op=op, breaks_group=False)
