"""How a group grows by ranks that it starts: `MPI_Comm_spawn`, and a merge with the started ranks.

The started program may call `parent_group` late, or never.  So, before both sides enter MPI's
merge, which blocks, rank 0 of each side sends messages over MPI's intercommunicator:

    READY   "all of us are in parent_group"    the children
    HELLO   "then merge", and how              the parents
    COMING  "we do"                            the children
    LEFT    "there will be no merge"           a side that gives up
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from functools import partial
from typing import Any

from ..engine import checks, kinds
from ..engine.call import Call, Program, digest
from ..engine.communicators import MakesComm
from ..engine.progress import engine
from ..errors import InvalidCallError, UnsupportedError
from ..runtime import launcher
from ..runtime.agreement import Decides, decision
from ..runtime.library import MPI, greeting_tag, pause, pending
from ..runtime.process import monotonic
from ..runtime.settings import environment, launchers
from ..transports.select import GroupOptions
from .caller import SLACK, Caller
from .merge import greet

READY, HELLO, COMING, LEFT = "ready", "hello", "coming", "left"

STARTED = 0.5  # seconds that started ranks get after MPI is initialized, even past the deadline
_ANSWER = 0.05  # seconds past the deadline that an answer may take to come
_LOOK = 0.002  # seconds between looks for it

_kept: list[bytes] = []  # messages that MPI may still read

Hello = dict[str, Any]
"""What the parents write about the new group, as JSON can hold it: its name and its options."""


def spawn(parents: Caller, argv: Sequence[str], n: object, timeout: object) -> Caller:
    """Start `n` ranks, and make the group of the parents and of those, which come last."""

    def check(rank: int, size: int) -> Call:
        count, words = checks.int32(n, "n"), list(argv)
        if count < 1:
            raise InvalidCallError(f"n must be at least 1, but got {count}")
        if isinstance(argv, str) or not words or not all(isinstance(w, str) for w in words):
            raise InvalidCallError(f"argv must be a list of str, but got {argv!r}")
        spawned = MPI.Comm.Get_parent() != MPI.COMM_NULL
        vendor, _ = MPI.get_vendor()
        why = launcher.spawnless(vendor, launchers(environment()), spawned=spawned)
        if why:
            raise UnsupportedError(f"spawn: {why}")

        import shutil  # which few programs need

        if rank == 0 and shutil.which(words[0]) is None:  # MPICH would wait for it for ever
            raise InvalidCallError(f"argv must begin with a program, but got {words[0]!r}")
        text = "\0".join(words).encode("utf-8", "surrogateescape")
        return Call(kinds.SPAWN, count=count, digest=digest(*text), payload=Program(words))

    def make(call: Call, deadline: float) -> MakesComm:
        hello = {"name": name, "options": parents.options.as_json()}
        assert isinstance(call.payload, Program)
        return _start(parents.comm, call.payload.argv, call.count, hello, deadline)

    name = f"{parents.group_state.name}:spawn"
    made, _ = parents.make_comm(kinds.SPAWN, timeout, check, make, slack=SLACK, parts=False)
    assert made is not None
    return parents.successor(made, name, None, timeout)


def join_parents(own: Caller, parents: MPI.Intercomm, timeout: object) -> Caller:
    """Make the group of the parents, which started this world, and of this world's ranks."""

    def make(call: Call, deadline: float) -> MakesComm:
        made, hello = yield from _join(own.comm, parents, deadline)
        call.payload = hello
        own.options = GroupOptions.from_json(hello["options"])  # as the parents have it
        return made

    made, call = own.make_comm(
        kinds.PARENT_GROUP,
        timeout,
        lambda rank, size: Call(kinds.PARENT_GROUP),
        make,
        slack=SLACK,
        parts=False,
    )
    assert made is not None and isinstance(call.payload, dict)
    return own.successor(made, call.payload["name"], None, timeout)


def _start(
    comm: MPI.Intracomm, argv: Sequence[str], n: int, hello: Hello, deadline: float
) -> MakesComm:
    """Start `n` ranks and merge with them; they come last.  All parents have arrived.

    Raises:
        UnsupportedError: MPI or the launcher could not start them.
        CollectiveTimeoutError: they have not come to `parent_group` in time.
    """
    what = f"MPI_Comm_spawn of {argv[0]}, which must initialize MPI,"
    try:
        inter = yield from engine().outside(
            deadline, what, lambda: comm.Spawn(argv[0], list(argv[1:]), n, MPI.INFO_NULL, 0)
        )
    except MPI.Exception as error:
        raise UnsupportedError(f"spawn: {_why(comm, n, error)}") from error
    deadline = max(deadline, monotonic() + STARTED)
    meet = partial(_meet_children, inter, hello, deadline)
    yield from decision(comm, meet, deadline, "spawn")
    return (yield from _merge(inter, deadline, joins=False))


def _join(
    comm: MPI.Intracomm, parents: MPI.Intercomm, deadline: float
) -> Generator[int, None, tuple[MPI.Intracomm, Hello]]:
    """Merge with those who started this world, all of whose ranks have arrived."""
    meet = partial(_meet_parents, parents, deadline)
    agreed = yield from decision(comm, meet, deadline, "parent_group")
    made = yield from _merge(parents, deadline, joins=True)
    assert made is not None
    return made, agreed["hello"]


def _merge(inter: MPI.Intercomm, deadline: float, *, joins: bool) -> MakesComm:

    def merge() -> MPI.Intracomm:
        made = inter.Merge(joins)
        inter.Free()
        return made

    made = yield from engine().outside(deadline, "MPI_Intercomm_merge", merge)
    yield from greet(made, deadline, "spawn" if not joins else "parent_group")
    return made


def _why(comm: MPI.Intracomm, n: int, error: MPI.Exception) -> str:
    """Return why ranks could not be started, as far as that shows."""
    slots = comm.Get_attr(MPI.UNIVERSE_SIZE)
    world = MPI.COMM_WORLD.Get_size()
    text = f"MPI could not start {n} more ranks: {error}"
    if slots is not None and slots < world + n:
        text += (
            f". The launcher was given {slots} slots, and {world} ranks run already: start it with "
            "--oversubscribe, or with more slots (--host name:slots)"
        )
    return text + ". The launcher may say more above. The group is still usable"


def _meet_children(inter: MPI.Intercomm, hello: Hello, deadline: float) -> Decides:
    word = yield from _hear(inter, deadline)
    if word is None:
        # A message that the children may never read would keep MPI from being finalized.
        engine().add_poller(partial(_turn_away, inter))
        return "the started ranks have not all called parent_group in time"
    if word == LEFT:
        return "the started ranks gave up in parent_group"
    _say(inter, HELLO, hello)
    word = yield from _hear(inter, deadline + _ANSWER)
    if word != COMING:
        _say(inter, LEFT)
        return "the started ranks gave up in parent_group"
    return {}


def _turn_away(inter: MPI.Intercomm) -> bool:
    """Answer children that came too late; return whether they have come."""
    word = _read(inter)
    if word == READY:
        _say(inter, LEFT)
    return word is not None


def _meet_parents(inter: MPI.Intercomm, deadline: float) -> Decides:
    _say(inter, READY)
    word = yield from _hear(inter, deadline)
    if word is None:
        _say(inter, LEFT)
        return "the ranks that started this one have not merged with it in time"
    if word == LEFT:
        return "the ranks that started this one gave up in spawn"
    _say(inter, COMING)
    return {"hello": word}


def _say(inter: MPI.Intercomm, word: str, more: Hello | None = None) -> None:
    """Send a message to the other side's rank 0, without waiting for it."""
    message = json.dumps(more if more is not None else word).encode()
    _kept.append(message)
    pending().append(inter.Isend([message, MPI.BYTE], 0, greeting_tag()))


def _hear(inter: MPI.Intercomm, deadline: float) -> Generator[int, None, Any]:
    """Wait for a message of the other side's rank 0; return None if none comes in time."""
    while (word := _read(inter)) is None:
        if monotonic() > deadline:
            return None
        yield from pause(_LOOK)
    return word


def _read(inter: MPI.Intercomm) -> Any:
    """Return a message of the other side's rank 0 that has come; None if there is none."""
    status = MPI.Status()
    if not inter.Iprobe(0, greeting_tag(), status):
        return None
    room = bytearray(status.Get_count(MPI.BYTE))
    inter.Recv([room, MPI.BYTE], 0, greeting_tag())
    return json.loads(room)
