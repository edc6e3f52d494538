"""How communicators come to be: duplicated, split, shrunk.  It never sees a group.

How communicators merge stands in modules of the room of groups: rendezvous.py, merge.py, spawn.py.

A call that blocks inside MPI comes after an arrival and under the engine's guard.
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections.abc import Generator, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..errors import CollectiveMismatchError, CollectiveTimeoutError, UnsupportedError
from ..runtime import agreement
from ..runtime.library import IDLE, MPI, Steps, shrink_tag, until
from ..runtime.memory import whereabouts
from ..runtime.process import monotonic
from ..runtime.processes import Identity, identity
from ..runtime.settings import survives_deaths
from ..runtime.topology import Nodes
from .arrival import listed
from .call import digest
from .peers import Peers
from .progress import engine

MakesComm: TypeAlias = "Generator[int, None, MPI.Intracomm | None]"
"""Steps that end in a communicator, or in None for a rank that is not in it."""

Plan = dict[str, Any]
"""What one rank decides for all, as JSON can hold it."""

FOREIGN = -1
"""Stands for the rank in MPI.COMM_WORLD of a process that is not in it."""


def duplicate(comm: MPI.Intracomm) -> MakesComm:
    """Make a private duplicate, without blocking inside MPI."""
    made, request = comm.Idup()
    yield from until(request, IDLE)
    assert isinstance(made, MPI.Intracomm)
    return made


def split(comm: MPI.Intracomm, color: int | None, key: int, deadline: float) -> MakesComm:
    """Split a communicator; `color` None is in no part.  All ranks have arrived."""
    place = MPI.UNDEFINED if color is None else color
    made = yield from engine().outside(deadline, "MPI_Comm_split", lambda: comm.Split(place, key))
    assert isinstance(made, MPI.Intracomm)
    return None if color is None else made


def split_by_lists(comm: MPI.Intracomm, ranks: Sequence[int], deadline: float) -> MakesComm:
    """Split by lists of ranks: the i-th entry of a list becomes rank i.  All have arrived.

    Every list that names a rank must be the list that this rank itself gives.  One allreduce
    of three numbers per rank finds out: the digests of the lists that name it, highest and
    lowest, and that of its own list.
    """
    size, me = comm.Get_size(), comm.Get_rank()
    mine = digest(*ranks)
    table = np.full((3, size), -1, dtype=np.int64)
    top = np.iinfo(np.int64).max
    table[0, list(ranks)] = mine
    table[1, list(ranks)] = top - mine
    table[2, me] = mine
    named_high, named_low, own = yield from agreement.reduced(comm, table, MPI.MAX)
    wrong = (named_high >= 0) & ((named_high != top - named_low) | (named_high != own))
    if wrong.any():
        others = np.flatnonzero(own != mine).tolist()
        raise CollectiveMismatchError(
            f"split_group: the lists that name ranks {np.flatnonzero(wrong).tolist()} differ "
            f"between the ranks; rank {me} gave {list(ranks)}, {listed(others)} another. Lists "
            "must be equal or disjoint, and each member must give its own list. The group is "
            "still usable"
        )
    member = me in ranks
    made = yield from split(
        comm, min(ranks) if member else None, ranks.index(me) if member else 0, deadline
    )
    return made


def host_mark(*more: int) -> int:
    """Return a number that differs between machines, between containers of one, and as `more`."""
    return digest(*MPI.Get_processor_name().encode(), whereabouts(), *more)


def nodes_of(
    comm: MPI.Intracomm, sizes: Sequence[int]
) -> Generator[int, None, tuple[Nodes, dict[int, Identity]]]:
    """Find which ranks share a node, and as which processes those of this rank's node are known.

    Ranks are on one node if they have one host name and one folder for shared memory.  What MPI
    itself finds (`Split_type`) can be wrong on a merged communicator.

    Args:
        sizes: ranks of each node to pretend, by world rank; () if none.
    """
    pretended = []
    if sizes:
        ends = list(itertools.accumulate(sizes))
        pretended.append(bisect.bisect(ends, MPI.COMM_WORLD.Get_rank()))
    table = yield from agreement.rows(comm, host_mark(*pretended), *identity())
    near = np.flatnonzero(table[:, 0] == table[comm.Get_rank(), 0]).tolist()
    return Nodes.of(table[:, 0].tolist()), {r: Identity(*table[r, 1:].tolist()) for r in near}


def free(comms: Sequence[MPI.Intracomm], deadline: float) -> Steps:
    """Give communicators back.  All ranks have arrived.  The steps end with it."""

    def give_back() -> None:
        for comm in comms:
            comm.Free()

    yield from engine().outside(deadline, "MPI_Comm_free", give_back)


def world_ranks(comm: MPI.Intracomm) -> list[int]:
    """Return the ranks of a communicator's members in MPI.COMM_WORLD; `FOREIGN` if they have none.

    Members of another MPI world, separately launched or spawned, have none.
    """
    group, world = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    ranks = group.Translate_ranks(None, world)
    group.Free()
    world.Free()
    return [FOREIGN if rank == MPI.UNDEFINED else rank for rank in ranks]


def foreign_ranks(comm: MPI.Intracomm) -> list[int]:
    """Return the ranks of a communicator that are of another MPI world than this process."""
    return [rank for rank, known in enumerate(world_ranks(comm)) if known == FOREIGN]


# ---- shrinking ----
#
# After a failure the old communicator may have a collective pending, beside which it can neither
# be duplicated nor split; messages still go.  So each rank that stays sends a message to one of
# them, the lowest that is neither excluded nor dead.  That one waits for all, and sends them the
# plan: which ranks are in.  If it dies, the messages go to the next one.

_attempts = itertools.count(1)  # a plan counts only for the attempt that it answers
_PASS_ON = 0.03  # seconds that a plan may take to reach the ranks that wait for it


def shrink(
    comm: MPI.Intracomm, peers: Peers, excluded: Sequence[int], deadline: float
) -> MakesComm:
    """Make a communicator of the ranks that are neither excluded nor dead.

    Those alone call.  It takes messages and `Create_group`; or, if a rank has died and MPI's fault
    tolerance is on, `Revoke` and `Shrink`, since Open MPI can do no more there.
    """
    out = yield from _agree_on_shrinking(peers, excluded, deadline)
    if peers.dead and survives_deaths():
        alive = set(out) - set(peers.dead)
        if alive:
            raise UnsupportedError(
                f"shrink_group: ranks {sorted(peers.dead)} died, and ranks {sorted(alive)}, which "
                "live, are excluded: after a death all that live must stay. Have them call "
                "shrink_group too, then split the group"
            )
        return (yield from survivors(comm, deadline))
    return (yield from _of_some(comm, [r for r in range(peers.size) if r not in out], deadline))


def _of_some(comm: MPI.Intracomm, ranks: Sequence[int], deadline: float) -> MakesComm:
    """Make a communicator of some ranks, all of which have said that they come; they alone call."""
    everyone = comm.Get_group()
    members = everyone.Incl(list(ranks))
    made = yield from engine().outside(
        deadline, "MPI_Comm_create_group", lambda: comm.Create_group(members, shrink_tag())
    )
    everyone.Free()
    members.Free()
    assert isinstance(made, MPI.Intracomm)
    return made


def survivors(comm: MPI.Intracomm, deadline: float) -> Generator[int, None, MPI.Intracomm]:
    """Make a communicator of the ranks that live, all of which call.

    It takes MPI's fault tolerance.
    """
    comm.Revoke()
    made = yield from engine().outside(deadline, "MPIX_Comm_shrink", comm.Shrink)
    assert isinstance(made, MPI.Intracomm)
    return made


def all_succeeded(comm: MPI.Intracomm, fine: bool, deadline: float) -> Generator[int, None, bool]:
    """Return whether all ranks of a communicator live, and each has found what it made `fine`.

    The answer is the same on all that live.  It takes MPI's fault tolerance.
    """
    try:
        if not fine:
            comm.Revoke()  # or others would wait for this rank
        comm.Ack_failed()
        agreed = yield from engine().outside(
            deadline, "MPIX_Comm_agree", lambda: comm.Agree(int(fine))
        )
        return bool(agreed)
    except MPI.Exception:
        return False


def _agree_on_shrinking(
    peers: Peers, excluded: Sequence[int], deadline: float
) -> Generator[int, None, list[int]]:
    """Wait for all ranks that stay; return those that don't."""
    attempt, asked = next(_attempts), -1
    peers.plan = ""
    while True:
        try:
            peers.poll()
        except MPI.Exception:
            if comm_is_revoked(peers.comm):  # others have the plan, and go on
                return sorted({*excluded, *peers.dead})
            raise
        late = monotonic() - deadline
        decider = next(r for r in range(peers.size) if r not in {*excluded, *peers.dead})
        if decider == peers.rank:
            plan = _plan_shrinking(peers, excluded, late > 0)
            if plan is not None:
                for rank, join in _joined(peers).items():
                    peers.decide(rank, json.dumps({**plan, "to": join["attempt"]}))
                peers.joined.clear()
                return _follow(plan, excluded)
        elif decider != asked:
            peers.join(decider, json.dumps({"out": list(excluded), "attempt": attempt}))
            asked = decider
        elif peers.plan and json.loads(peers.plan)["to"] == attempt:
            return _follow(json.loads(peers.plan), excluded)
        elif late > _PASS_ON:
            peers.join(decider, "")
            return _follow({"missing": [decider]}, excluded)
        yield IDLE


def _joined(peers: Peers, what: str = "out") -> dict[int, dict[str, Any]]:
    """Return what was said by those who want to shrink the group, or to make a part of it."""
    said = {rank: json.loads(text) for rank, text in peers.joined.items() if text}
    return {rank: join for rank, join in said.items() if what in join}


def _plan_shrinking(peers: Peers, excluded: Sequence[int], late: bool) -> Plan | None:
    """Return what all ranks that have come shall do; None while that can't be decided."""
    joined = _joined(peers)
    wrong = {rank: join["out"] for rank, join in joined.items() if join["out"] != list(excluded)}
    if wrong:
        lists = {peers.rank: list(excluded), **wrong}
        listed = "; ".join(f"rank {rank} excludes {out}" for rank, out in sorted(lists.items()))
        return {"wrong": listed}
    out = {*excluded, *peers.dead}
    missing = [r for r in range(peers.size) if r not in {*out, *joined, peers.rank}]
    if missing:
        return {"missing": missing} if late else None
    return {"out": sorted(out)}


def _follow(plan: Plan, excluded: Sequence[int]) -> list[int]:
    """Return the ranks that are out, or raise the error that the plan holds instead."""
    if "wrong" in plan:
        raise CollectiveMismatchError(
            f"shrink_group: ranks_to_exclude must be the same on all ranks that stay, "
            f"but {plan['wrong']}. No group was made; call again"
        )
    if "missing" in plan:
        missing = plan["missing"]
        raise CollectiveTimeoutError(
            f"shrink_group: ranks {missing} have not called it in time. No group was made; "
            f"call again, or go on without them: ranks_to_exclude={[*excluded, *missing]}",
            op="shrink_group",
            missing=missing,
        )
    out: list[int] = plan["out"]
    return out


# ---- a part of a group, by its members alone ----
#
# They agree as in shrinking: each sends a message to the first of them, which waits for all, and
# answers.  A member makes one part at a time, so it has one message under way.

_SAID = 64  # ranks of a list that are named in a message


def part(comm: MPI.Intracomm, peers: Peers, ranks: Sequence[int], deadline: float) -> MakesComm:
    """Make a communicator of some ranks, in the order of the list.  They alone call."""
    yield from _agree_on_part(peers, ranks, deadline)
    return (yield from _of_some(comm, ranks, deadline))


def _agree_on_part(peers: Peers, ranks: Sequence[int], deadline: float) -> Steps:
    """Wait for all members, or raise the error that names those who have not come."""
    first, mark, attempt = ranks[0], digest(*ranks), next(_attempts)
    peers.plan = ""
    if peers.rank != first:
        wish = {"part": mark, "ranks": list(ranks[:_SAID]), "attempt": attempt}
        peers.join(first, json.dumps(wish))
    while True:
        peers.poll()
        late = monotonic() - deadline
        if peers.rank == first:
            others = [rank for rank in ranks if rank != first]
            joined = _joined(peers, "part")
            here = {r: joined[r] for r in others if r in joined and joined[r]["part"] == mark}
            missing = [rank for rank in others if rank not in here]
            if not missing or late > 0:
                elsewhere = {rank: joined[rank]["ranks"] for rank in missing if rank in joined}
                plan = {"missing": missing, "said": _making(elsewhere)}
                for rank, join in here.items():
                    del peers.joined[rank]
                    peers.decide(rank, json.dumps({**plan, "to": join["attempt"]}))
                return _raise_missing(plan)
        elif peers.plan and json.loads(peers.plan)["to"] == attempt:
            return _raise_missing(json.loads(peers.plan))
        elif late > _PASS_ON:
            peers.join(first, "")
            return _raise_missing({"missing": [first], "said": ""})
        yield IDLE


def _making(elsewhere: dict[int, list[int]]) -> str:
    """Say which members wait in a part of their own."""
    return "".join(f"; rank {r} makes one of ranks {of}" for r, of in sorted(elsewhere.items()))


def _raise_missing(plan: Plan) -> None:
    if plan["missing"]:
        raise CollectiveTimeoutError(
            f"subgroup: ranks {plan['missing']} have not called it in time with this list of ranks"
            f"{plan['said']}. No group was made, and this one is still usable: each member of the "
            "new group must call, with the same list, and members of several in one order",
            op="subgroup",
            missing=plan["missing"],
            breaks_group=False,
        )


def comm_is_revoked(comm: MPI.Comm) -> bool:
    """Return whether a member has revoked a communicator."""
    return survives_deaths() and comm.Is_revoked()
