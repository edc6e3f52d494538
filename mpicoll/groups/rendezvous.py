"""Where groups that merge find one another: in a store, which may hold anything from earlier runs.

The leaders of the groups, their ranks 0, meet in the store.  Each leader takes a number, writes an
entry under it, and keeps a beat going.  An entry counts only while its beat is seen to move, so the
entry of a dead process is never taken for a living group.  The living leader with the lowest number
decides once the groups add up to `size`.  Its decision is the plan: which groups merge in which
order, or why none do.

A process is known by its MPI world and its rank there: groups may have members of several worlds.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..engine.communicators import FOREIGN, Plan, host_mark, world_ranks
from ..errors import MpicollError, interrupts
from ..runtime import agreement, launcher
from ..runtime.library import MPI, Steps, pause, until
from ..runtime.process import monotonic
from ..runtime.processes import identity
from ..runtime.settings import daemon, environment

if TYPE_CHECKING:
    from ..stores import Store

Entry = dict[str, Any]
"""What a leader writes about its group, as JSON can hold it."""

BEAT = 0.02  # seconds between looks at the store
PREFIX = "mpicoll/merge/"

_JOB = 16  # bytes of the name of an MPI world
_MEMBER = struct.Struct(f"<{_JOB}sq")  # a process: its world and its rank there

_job = b""
"""The name of this MPI world: the same on all its ranks once a group over the world was made."""


def name_job(comm: MPI.Intracomm) -> Steps:
    """Agree on a name for this MPI world, by which groups that merge know one another."""
    global _job
    name = yield from agreement.bytes_of(comm, _job or os.urandom(_JOB), _JOB)
    if not _job or comm.Get_size() == MPI.COMM_WORLD.Get_size():
        _job = name


def members(comm: MPI.Intracomm) -> Generator[int, None, dict[str, list[int]]]:
    """Return the members of a communicator as lists of world ranks, by world; on rank 0 alone."""
    ranks = world_ranks(comm)
    if FOREIGN not in ranks:
        return {_job.hex(): ranks}
    own = _MEMBER.pack(_job, MPI.COMM_WORLD.Get_rank())
    mine = np.frombuffer(own, dtype=np.uint8).copy()
    everyone = np.empty(comm.Get_size() * _MEMBER.size, dtype=np.uint8)
    # Rank 0 alone needs them, so this is a gather and no exchange of `agreement`.
    yield from until(comm.Igather([mine, MPI.BYTE], [everyone, MPI.BYTE], 0))
    found: dict[str, list[int]] = {}
    if comm.Get_rank() == 0:
        for job, rank in _MEMBER.iter_unpack(everyone.tobytes()):
            found.setdefault(job.hex(), []).append(rank)
    return found


def entry(name: str, options: str, members: dict[str, list[int]], size: int) -> Entry:
    """Return what this process, rank 0 of a group, writes about it to the store.

    Args:
        options: what the group runs on, in words; groups that merge must have the same.
        members: what the function of that name returned.
        size: ranks of all groups together, as the user said in this group.
    """
    vendor, version = MPI.get_vendor()
    return {
        "nonce": os.urandom(16).hex(),
        "name": name,
        "options": options,
        "members": members,
        "size": size,
        "job": _job.hex(),
        "leader": MPI.COMM_WORLD.Get_rank(),
        "library": f"{vendor} {'.'.join(map(str, version))}",
        "daemon": daemon(environment()),
        "host": host_mark(),
        "process": list(identity()),
    }


def _count(entry: Entry) -> int:
    return sum(map(len, entry["members"].values()))


def in_order(entries: Sequence[Entry]) -> list[Entry]:
    """Return groups, given in the order of their arrival, in the order in which they merge.

    Worlds follow one another by the name of their first group, ties by arrival; groups of one
    world by their lowest rank there.
    """
    worlds: dict[str, tuple[str, int]] = {}
    for number, one in enumerate(entries):
        place = one["name"], number
        worlds[one["job"]] = min(place, worlds.get(one["job"], place))
    return sorted(entries, key=lambda one: (worlds[one["job"]], min(one["members"][one["job"]])))


class _Meeting:
    """One leader's part in the meeting of leaders."""

    def __init__(self, store: Store, mine: Entry) -> None:
        self.store = store
        self.entry = mine
        self.number = store.add(PREFIX + "entries", 1)
        store.set(f"{PREFIX}{self.number}", json.dumps(self.entry))
        self._beats: dict[int, int] = {}
        self._others: dict[int, Entry] = {}

    def look(self) -> Plan | None:
        """Keep the beat, look at the others, and return the decision if there is one."""
        self.store.add(f"{PREFIX}beat/{self.number}", 1)
        for number in range(1, self.store.add(PREFIX + "entries", 0) + 1):
            if number != self.number:
                self._look_at(number)
        for other in self._others.values():
            if self.store.add(f"{PREFIX}decided/{other['nonce']}", 0):
                plan: Plan = json.loads(self.store.get(f"{PREFIX}decision/{other['nonce']}"))
                if self.entry["nonce"] in plan["nonces"]:
                    return plan
        if self._others and min(self._others) < self.number:
            return None
        return self._decide()

    def _look_at(self, number: int) -> None:
        beat = self.store.add(f"{PREFIX}beat/{number}", 0)
        before = self._beats.setdefault(number, beat)
        if beat != before and number not in self._others:
            self._others[number] = json.loads(self.store.get(f"{PREFIX}{number}"))

    def _entries(self) -> list[Entry]:
        return [one for _, one in sorted({self.number: self.entry, **self._others}.items())]

    def _decide(self) -> Plan | None:
        entries = self._entries()
        there, size = sum(map(_count, entries)), self.entry["size"]
        if there < size and len({one["size"] for one in entries}) == 1:
            return None
        plan = self._plan(entries, there)
        nonce = self.entry["nonce"]
        self.store.set(f"{PREFIX}decision/{nonce}", json.dumps(plan))
        self.store.add(f"{PREFIX}decided/{nonce}", 1)
        return plan

    def _plan(self, entries: list[Entry], there: int) -> Plan:
        plan: Plan = {"nonces": [one["nonce"] for one in entries], "wrong": "", "groups": []}
        processes = [(job, r) for one in entries for job, rs in one["members"].items() for r in rs]
        options = {one["options"] for one in entries}
        if len({one["size"] for one in entries}) > 1 or there > self.entry["size"]:
            plan["wrong"] = f"size must be the ranks of all groups together, {self.came()}"
        elif len(set(processes)) < len(processes):
            plan["wrong"] = f"the groups must not share a rank, {self.came()}"
        elif len(options) > 1:
            plan["wrong"] = f"groups must be made alike, but there are {' and '.join(options)}"
        else:
            if len({one["job"] for one in entries}) > 1:
                libraries = [one["library"] for one in entries]
                plan["apart"] = launcher.apart(libraries, [one["daemon"] for one in entries])
            kept = ("nonce", "name", "job", "leader", "host", "process")
            plan["groups"] = [{key: one[key] for key in kept} for one in in_order(entries)]
        return plan

    def came(self) -> str:
        """Return, in words, which groups have come."""
        groups = ", ".join(
            f"{one['name']!r} of {_count(one)} (size={one['size']})" for one in self._entries()
        )
        return f"and there came: {groups}"


def meet(store: Store, mine: Entry, deadline: float) -> Generator[int, None, Plan]:
    """Find the other groups through a store; the leader of a group does this.

    A failure becomes part of the plan, so that all ranks of the group raise it.  In a plan to
    merge, `place` is this group's among the `groups`.
    """
    try:
        meeting = _Meeting(store, mine)
        while (plan := meeting.look()) is None:
            if monotonic() > deadline:
                size = mine["size"]
                return {"late": f"not all of {size} ranks were there in time, {meeting.came()}"}
            yield from pause(BEAT)
    except MpicollError as error:
        return {"wrong": f"the store failed: {error}"}
    except Exception as error:
        if interrupts(error):
            raise
        return {"wrong": f"the store failed: {error!r}"}
    nonces = [one["nonce"] for one in plan["groups"]]
    return {**plan, "place": nonces.index(mine["nonce"])} if nonces else plan
