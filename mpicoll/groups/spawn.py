"""How a group grows by ranks that it starts: `MPI_Comm_spawn`, and a merge with what came of it.

The started program gets to `parent_group` when it likes, or never.  So, before both sides enter
MPI's merge, which blocks, rank 0 of each says over MPI's intercommunicator:

    READY   "all of us are in parent_group"    the children
    HELLO   "then merge", and how              the parents
    COMING  "we do"                            the children
    LEFT    "there will be no merge"           whoever gives up
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from ..engine.communicators import MakesComm
from ..engine.progress import engine
from ..errors import UnsupportedError
from ..runtime.library import MPI, greeting_tag, pause, pending
from .merge import greet, tell, too_late

READY, HELLO, COMING, LEFT = "ready", "hello", "coming", "left"

STARTED = 0.5  # seconds that ranks get when they have initialized MPI, even if the time is over
_ANSWER = 0.05  # seconds past the deadline that an answer may take to come
_LOOK = 0.002  # seconds between looks for it

_kept: list[bytes] = []  # messages that MPI may still read

Hello = dict[str, Any]
"""What the parents say of the group that is to be, as JSON can hold it."""


def spawn(
    comm: MPI.Intracomm, argv: Sequence[str], n: int, hello: Hello, deadline: float
) -> MakesComm:
    """Start `n` ranks and merge with them; they come last.  All ranks have arrived.

    Raises:
        UnsupportedError: MPI or the launcher could not start them.
        CollectiveTimeoutError: they have not come to `parent_group` in time.
    """
    what = f"MPI_Comm_spawn of {argv[0]}, which must initialize MPI,"
    try:
        inter = yield from engine.outside(
            deadline, what, lambda: comm.Spawn(argv[0], list(argv[1:]), n, MPI.INFO_NULL, 0)
        )
    except MPI.Exception as error:
        raise UnsupportedError(f"spawn: {_why(comm, n, error)}") from error
    deadline = max(deadline, time.monotonic() + STARTED)
    said: dict[str, Any] = {}
    if comm.Get_rank() == 0:
        said = yield from _meet_children(inter, hello, deadline)
    said = yield from tell(comm, said, deadline, "spawn")
    if "failed" in said:
        raise too_late(said["failed"], "spawn")
    return (yield from _merge(inter, deadline, joins=False))


def join_parents(
    comm: MPI.Intracomm, parents: MPI.Intercomm, deadline: float
) -> Generator[int, None, tuple[MPI.Intracomm, Hello]]:
    """Merge with those who started this world, all of whose ranks have arrived."""
    said: dict[str, Any] = {}
    if comm.Get_rank() == 0:
        said = yield from _meet_parents(parents, deadline)
    said = yield from tell(comm, said, deadline, "parent_group")
    if "failed" in said:
        raise too_late(said["failed"], "parent_group")
    made = yield from _merge(parents, deadline, joins=True)
    assert made is not None
    return made, said["hello"]


def _merge(inter: MPI.Intercomm, deadline: float, *, joins: bool) -> MakesComm:

    def merge() -> MPI.Intracomm:
        made = inter.Merge(joins)
        inter.Free()
        return made

    made = yield from engine.outside(deadline, "MPI_Intercomm_merge", merge)
    yield from greet(made, deadline, "spawn" if not joins else "parent_group")
    return made


def _why(comm: MPI.Intracomm, n: int, error: MPI.Exception) -> str:
    """Say why ranks could not be started, as far as can be told."""
    slots = comm.Get_attr(MPI.UNIVERSE_SIZE)
    world = MPI.COMM_WORLD.Get_size()
    text = f"MPI could not start {n} more ranks: {error}"
    if slots is not None and slots < world + n:
        text += (
            f". The launcher was given {slots} slots, and {world} ranks run already: start it with "
            "--oversubscribe, or with more slots (--host name:slots)"
        )
    return text + ". The launcher may say more above. The group is still usable"


def _meet_children(inter: MPI.Intercomm, hello: Hello, deadline: float) -> _Says:
    word = yield from _hear(inter, deadline)
    if word is None:
        # Not a word to those who may never read it: MPI could not be finalized here or there.
        engine.add_poller(partial(_turn_away, inter))
        return {"failed": "the started ranks have not all called parent_group in time"}
    if word == LEFT:
        return {"failed": "the started ranks gave up in parent_group"}
    _say(inter, HELLO, hello)
    word = yield from _hear(inter, deadline + _ANSWER)
    if word != COMING:
        _say(inter, LEFT)
        return {"failed": "the started ranks gave up in parent_group"}
    return {}


def _turn_away(inter: MPI.Intercomm) -> bool:
    """Answer what came too late; return whether it has come."""
    word = _read(inter)
    if word == READY:
        _say(inter, LEFT)
    return word is not None


def _meet_parents(inter: MPI.Intercomm, deadline: float) -> _Says:
    _say(inter, READY)
    word = yield from _hear(inter, deadline)
    if word is None:
        _say(inter, LEFT)
        return {"failed": "the ranks that started this one have not merged with it in time"}
    if word == LEFT:
        return {"failed": "the ranks that started this one gave up in spawn"}
    _say(inter, COMING)
    return {"hello": word}


_Says = Generator[int, None, dict[str, Any]]


def _say(inter: MPI.Intercomm, word: str, more: Hello | None = None) -> None:
    """Send a word to the other side's rank 0, without waiting for it."""
    message = json.dumps(more if more is not None else word).encode()
    _kept.append(message)
    pending.append(inter.Isend([message, MPI.BYTE], 0, greeting_tag()))


def _hear(inter: MPI.Intercomm, deadline: float) -> Generator[int, None, Any]:
    """Wait for a word of the other side's rank 0; None if none comes in time."""
    while (word := _read(inter)) is None:
        if time.monotonic() > deadline:
            return None
        yield from pause(_LOOK)
    return word


def _read(inter: MPI.Intercomm) -> Any:
    """Return a word of the other side's rank 0 that has come; None if there is none."""
    status = MPI.Status()
    if not inter.Iprobe(0, greeting_tag(), status):
        return None
    room = bytearray(status.Get_count(MPI.BYTE))
    inter.Recv([room, MPI.BYTE], 0, greeting_tag())
    return json.loads(room)
