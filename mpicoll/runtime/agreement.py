"""The exchanges by which the ranks of a communicator agree on what they set up together.

Each is a generator: it yields while it waits for other ranks, so the engine keeps the deadline of
the call that takes it.  All ranks of the communicator take the same exchanges in the same order,
and all of them leave one with the same result.

A rank that can't do its part does not raise before an exchange, since its peers would wait for it:
it takes part, and gives the reason as text.

These exchanges are not here, as they need something of their own:

    arrival.Exchange    the hot path: one buffer that is used again, and meetings that are counted,
                        so that a rank that ends can begin those in which others still wait
    arrival.Gathering   counted in the same way
    peers, rollcall     notices between two ranks, at any time, whatever the others do
    communicators       `shrink` sends messages, as a collective may be pending on the communicator
    spawn               its two sides have no communicator in common yet
    rendezvous.members  a gather, since rank 0 alone needs the result
    a merge's plan      may be of any length, so it goes by the group's own `broadcast_object`
    doctor              must work where collectives don't, and where a rank never comes
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from ..errors import CollectiveTimeoutError
from .library import IDLE, MPI, Abandoned, Steps, pending, until
from .process import monotonic

Array = np.ndarray[Any, Any]
Numbers = Generator[int, None, Array]
"""Steps that end in numbers, the same on all ranks."""

Decides = Generator[int, None, "dict[str, Any] | str"]
"""Steps that end in what one rank decides for all, or in a text: why it can't."""

_REASON = 400  # bytes of a reason that reach the other ranks
_DECISION = 2048  # bytes of a decision, as JSON
_LAST_WORD = 0.5  # seconds past the deadline that a decision may take to reach all ranks


# ---- every rank has numbers ----


def rows(comm: MPI.Comm, *numbers: int) -> Numbers:
    """Return the numbers of every rank, a row for each."""
    mine = np.array(numbers, dtype=np.int64)
    table = np.empty((comm.Get_size(), mine.size), dtype=np.int64)
    yield from until(comm.Iallgather([mine, MPI.INT64_T], [table, MPI.INT64_T]))
    return table


def reduced(comm: MPI.Comm, numbers: Sequence[int] | Array, op: MPI.Op) -> Numbers:
    """Return the numbers of all ranks reduced by an operator, each with its counterparts."""
    total = np.array(numbers, dtype=np.int64)
    yield from until(comm.Iallreduce(MPI.IN_PLACE, [total, MPI.INT64_T], op))
    return total


def unanimous(comm: MPI.Comm, *votes: bool) -> Generator[int, None, list[bool]]:
    """Return for each vote whether it is true on all ranks."""
    common = np.array(votes, dtype=np.uint8)
    yield from until(comm.Iallreduce(MPI.IN_PLACE, [common, MPI.UINT8_T], MPI.MIN))
    agreed: list[bool] = common.astype(bool).tolist()
    return agreed


def exchanged(comm: MPI.Comm, numbers: Sequence[int] | Array) -> Numbers:
    """Give each rank its number; return the number that each rank has given to this one.

    This result alone differs between the ranks.
    """
    given, got = np.array(numbers, dtype=np.int64), np.empty(comm.Get_size(), dtype=np.int64)
    yield from until(comm.Ialltoall([given, MPI.INT64_T], [got, MPI.INT64_T]))
    return got


# ---- one rank has something for all ----


def bytes_of(
    comm: MPI.Comm,
    own: bytes,
    room: int,
    root: int = 0,
    wait: Callable[[MPI.Request], Steps] = until,
) -> Generator[int, None, bytes]:
    """Return `root`'s bytes on all ranks, filled up with zeros to `room` bytes.

    What the other ranks give as their `own` is ignored.
    """
    buffer = np.zeros(room, dtype=np.uint8)
    if comm.Get_rank() == root:
        buffer[: len(own)] = np.frombuffer(own, dtype=np.uint8)
    yield from wait(comm.Ibcast([buffer, MPI.BYTE], root))
    return buffer.tobytes()


def first_reason(comm: MPI.Comm, why: str) -> Generator[int, None, tuple[int, str]]:
    """Return the lowest rank that gives a reason, and its reason; "" if none gives one."""
    size = comm.Get_size()
    lowest = yield from reduced(comm, [comm.Get_rank() if why else size], MPI.MIN)
    rank = int(lowest[0])
    if rank == size:
        return size, ""
    text = yield from bytes_of(comm, why.encode()[:_REASON], _REASON, rank)
    return rank, text.rstrip(b"\0").decode(errors="replace")


def decision(
    comm: MPI.Comm, decide: Callable[[], Decides], deadline: float, op: str
) -> Generator[int, None, dict[str, Any]]:
    """Let rank 0 take the steps of `decide`; return what it has decided on all ranks.

    It keeps the deadline itself: rank 0 may use all the time there is, and its decision must
    still reach the others.

    Raises:
        CollectiveTimeoutError: rank 0 can't decide, and says why; or its decision doesn't come.
    """
    text = ""
    if comm.Get_rank() == 0:
        decided = yield from decide()
        text = json.dumps(decided)
        if len(text) > _DECISION:  # with the text of an error in it, or a group's name
            text = json.dumps(str(decided)[: _DECISION // 12])  # JSON may take 6 bytes a letter
    told = yield from bytes_of(
        comm, text.encode(), _DECISION, wait=lambda request: before(request, deadline, IDLE, op)
    )
    found: dict[str, Any] | str = json.loads(told.rstrip(b"\0"))
    if isinstance(found, str):
        raise too_late(found, op)
    return found


def before(request: MPI.Request, deadline: float, mood: int, op: str) -> Steps:
    """Wait for a request; raise if the deadline passes, as where a process of the peers' died."""
    try:
        while not request.Test():
            if monotonic() > deadline + _LAST_WORD:
                raise too_late("some that were there have not gone on in time", op)
            yield mood
    except (Abandoned, CollectiveTimeoutError):
        pending().append(request)
        raise


def too_late(why: str, op: str) -> CollectiveTimeoutError:
    """Return the error of a call that makes a group, to which not all ranks came in time."""
    return CollectiveTimeoutError(
        f"{op}: {why}. The group is still usable", op=op, breaks_group=False
    )
