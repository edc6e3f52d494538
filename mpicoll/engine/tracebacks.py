"""The tracebacks of ranks that end by an exception, as they come to the terminal.

All ranks write to one terminal, through a pipe each.  So each first tells the members of its
largest group what it is about to write, as a digest, and they take turns: causes before what only
follows a peer's failure, then lower ranks before higher ones.  What several say in the same words,
the first of them writes for all; what a cause has written, those that follow don't repeat.  Nobody
waits long for its turn: what a rank has to say is written in any case.

The library's own frames are left out, unless MPICOLL_DEBUG is 1 or the fault is the library's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import struct
import sys
import termios
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType

from ..errors import MpicollError
from ..runtime.digests import blake2b
from ..runtime.library import MPI
from ..runtime.processes import watch
from ..runtime.settings import debugging, grace, ranks_on_node
from .peers import Peers
from .progress import engine
from .recorder import COMMANDS, is_ours
from .rollcall import from_ranges, to_ranges
from .tasks import GroupState

TOLD = 2500  # characters of a traceback that the peers are told
HEARD = 0.005  # seconds from a notice to the next, where several have been sent
NEWS = 0.25  # seconds without news of the peers after which a rank writes
LONGEST = 1.0  # seconds until it writes, at most
READ = 0.05  # seconds in which the launcher takes what was written, if it is well

# Commands are as a user's program, but for what `mpicoll run` has around one.
_RUN = f"{COMMANDS}__init__.py", f"{COMMANDS}run.py", "<frozen runpy>"
_COMPILED = re.compile(r"mpicoll[/\\].*\.p(yx|xi)$")
_ELAPSED = re.compile(r"\bafter \d+\.\d+ s")  # differs between ranks that say the same


# ---- in words ----


def describe(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
    """Return a traceback as text, without the library's own frames."""
    told = traceback.TracebackException(kind, error, trace)
    if not debugging():
        _leave_out(told, error)
    return "".join(told.format())


def cause(kind: type[BaseException], error: BaseException) -> str:
    """Return what was raised, in a line."""
    lines: list[str] = []
    with contextlib.suppress(Exception):  # of somebody else's making
        lines = str(error).splitlines()
    return f"{kind.__name__}: {lines[0][:300]}" if lines else kind.__name__


def block(ranks: Sequence[int], text: str, where: str = "", hosts: Iterable[str] = ()) -> str:
    """Return a traceback under a heading that says whose it is."""
    found = sorted({*hosts} - {""})
    at = f" on {_listed(found)}" if found else ""
    return f"mpicoll: rank{'s' * (len(ranks) > 1)} {_named(ranks)}{at} raised{where}:\n{text}"


def write(text: str) -> None:
    """Write to standard error in one go, and see the launcher take it, before another rank does."""
    with contextlib.suppress(Exception):  # it may be closed, or anything
        sys.stderr.write(text)
        sys.stderr.flush()
        until = time.monotonic() + READ
        room = bytearray(4)
        while time.monotonic() < until:
            fcntl.ioctl(sys.stderr.fileno(), termios.FIONREAD, room)
            if struct.unpack("i", room) == (0,):
                break
            time.sleep(1e-3)


def _leave_out(told: traceback.TracebackException, error: BaseException) -> None:
    pairs: list[tuple[traceback.TracebackException | None, BaseException | None]]
    pairs = [(told, error)]  # to be done: there may be more than Python goes deep
    while pairs:
        inner, beneath = pairs.pop()
        if inner is None or beneath is None:
            continue
        stack = inner.stack
        if stack and (isinstance(beneath, MpicollError) or not _is_left_out(stack[-1].filename)):
            stack[:] = [frame for frame in stack if not _is_left_out(frame.filename)] or stack
        pairs += (inner.__cause__, beneath.__cause__), (inner.__context__, beneath.__context__)
        several = getattr(inner, "exceptions", None) or (), getattr(beneath, "exceptions", ())
        pairs += zip(*several, strict=False)  # an ExceptionGroup's


def _is_left_out(file: str) -> bool:
    return is_ours(file) or file in _RUN or _COMPILED.match(file) is not None


def _named(ranks: Iterable[int]) -> str:
    """Say ranks shortly: ``0, 2 and 3``, ``0-4 and 6``."""
    runs = []
    for run in to_ranges(ranks).split(","):
        first, _, last = run.partition("-")
        runs += [first, last] if last and int(last) == int(first) + 1 else [run]
    return _listed(runs)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


# ---- in turn ----


@dataclass
class Turn:
    """What this rank is about to write, and among whom.

    Attributes:
        rank: this one's in the world.
        host: this machine's name, if the job has others.
        names: the members' ranks in the world, by their ranks in the group; below 0 if they are
            of another.
    """

    text: str
    where: str
    follows: bool
    rank: int
    host: str
    state: GroupState | None
    names: Sequence[int]
    digest: str


def announce(text: str, where: str, *, follows: bool, rank: int, size: int) -> Turn:
    """Tell the peers what this rank is about to write; of a cause before they hear of that.

    Args:
        where: more of the heading.
        follows: whether it goes back to a peer's failure.
        rank, size: this rank's in the world, and the world's.
    """
    here = ranks_on_node()
    host = os.uname().nodename if here and here < size else ""
    state = None if MPI.Is_finalized() else _largest()
    digest = _digest(_ELAPSED.sub("", text) + where)
    names: list[int] = []
    if state is not None:
        peers = state.peers
        mine, world = peers.comm.Get_group(), MPI.COMM_WORLD.Get_group()
        names = list(mine.Translate_ranks(None, world))
        mine.Free()
        world.Free()
        said = json.dumps([follows, digest, host])
        engine().between_steps(lambda: peers.announce(said))
    return Turn(text, where, follows, rank, host, state, names, digest)


def show(turn: Turn, error: BaseException) -> None:
    """Write when it is this rank's turn, for all that say the same, unless one of them has."""
    if turn.state is None:
        write(block([turn.rank], turn.text, turn.where, [turn.host]))
        return
    peers, ranks = turn.state.peers, [turn.state.peers.rank]
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the program ends anyway
            ranks = _wait_for_turn(turn, peers)
    finally:
        if ranks:
            hosts = [turn.host, *(json.loads(peers.raised[rank])[2] for rank in ranks[1:])]
            text = _without(turn.text, error, peers)
            write(block([turn.names[rank] for rank in ranks], text, turn.where, hosts))
    if ranks:
        shown = json.dumps([to_ranges(ranks), turn.digest, _digest(tail(turn.text))])
        engine().between_steps(lambda: peers.show(shown))


def tail(text: str) -> str:
    """Return what the peers are told of a traceback."""
    return text.rstrip()[-TOLD:]


def _largest() -> GroupState | None:
    """Return the largest group with peers, which all of its members find to be that."""
    broken = engine().broken
    states = [s for s in engine().group_states() if s.mark or s in broken]
    states = [s for s in {*broken, *states} if s.peers.size > 1 and not s.peers.is_freed()]
    return max(states, key=lambda s: (s.peers.size, s.mark), default=None)


def _wait_for_turn(turn: Turn, peers: Peers) -> list[int]:
    """Return this rank and those for which it writes as well; none if another has written it."""
    start = time.monotonic()
    others = [r for r, name in enumerate(turn.names) if name >= 0 and r != peers.rank]
    since, news, patience = start, 0, min(NEWS, grace())

    def look() -> None:
        watch().look()
        with contextlib.suppress(MPI.Exception):
            peers.poll()

    while True:
        engine().between_steps(look)
        said = {r: json.loads(peers.raised[r]) for r in others if r in peers.raised}
        written = [json.loads(text) for text in peers.shown]
        shown = {(r, digest) for ranks, digest, _ in written for r in from_ranges(ranks)}
        if (peers.rank, turn.digest) in shown:
            return []
        to_come = {r: said[r] for r in said if (r, said[r][1]) not in shown}
        before = any((to_come[r][0], r) < (turn.follows, peers.rank) for r in to_come)
        known = {*peers.raised, *peers.gone, *peers.dead}
        if not turn.follows:
            known |= peers.aware  # those raise what follows, if anything
        now = time.monotonic()
        if news != (news := len(peers.aware) + len(known) + len(said) + len(shown)):
            since = now
        long = 2 * patience if before else patience  # those before have theirs to wait
        waited = now > min(since + long, start + LONGEST)
        clear = now > since + HEARD and not before and known.issuperset(others)
        if waited or clear or MPI.Is_finalized():
            return [peers.rank, *(r for r in to_come if to_come[r][1] == turn.digest)]
        time.sleep(1e-3)


def _without(text: str, error: BaseException | None, peers: Peers) -> str:
    """Leave out of a traceback those of other ranks and threads that have been written already."""
    written = {json.loads(said)[2] for said in peers.shown}
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, MpicollError):
            told = str(error).partition("\n")[2]
            if told and _digest(told) in written:
                text = text.replace(f"\n{told}", "")
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return text


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="replace"), 12).hex()
