"""Look whether this place is fit for mpicoll, and say what to do where it isn't.

    python -m mpicoll doctor
    mpiexec -n 4 python -m mpicoll doctor
    mpiexec -n 4 python -m mpicoll doctor --folder /scratch/me/store

Start it as you start your program: what it finds holds for that launcher, those nodes and that
environment.  Rank 0 prints one table for all ranks and points out what differs between them.  Each
line is ok, a warning, or wrong, with a remedy.  With --folder it looks, too, whether all ranks
share that folder, as a FileStore needs.  The exit status is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from .. import __version__
from ..runtime.library import MPI
from ..runtime.settings import environment, local_rank
from .asked import duration
from .facts import SHM, Facts, Sight, before_mpi, look_at, tokens_left, with_mpi
from .findings import OK, WARNING, WRONG, Finding, Job, examine, shared_memory

TIMEOUT = 30.0
SPARE = 15.0  # seconds past the time limit, until a call that never returns ends the process
WIDTH = 100
_TAG = 77


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--folder", default="", metavar="DIR", help="should be shared by all ranks")
    parser.add_argument(
        "--timeout",
        type=duration,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for the other ranks (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Examine the job and return the exit status."""
    # MPI's initialization, and a file system, may block where no clock of ours is looked at.
    faulthandler.dump_traceback_later(args.timeout + SPARE, exit=True)
    mine: Facts | None = None
    try:
        mine = before_mpi((args.folder,) if args.folder else ())
        _foretell(mine)
        mine = with_mpi(mine)
        if mine.world == 1:
            alone = Job([mine], folder=args.folder)
            # Ranks that a wrong launcher started all believe to be the only one.  The first to fail
            # is the end of all under some, so the status is left to the one that speaks.
            return _tell(alone, args) if mine.rank == 0 else 0
        return _together(mine, args)
    except Exception:
        if mine is None or mine.world == 1:
            raise
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(2)
        raise
    finally:
        faulthandler.cancel_dump_traceback_later()


def _foretell(mine: Facts) -> None:
    """Say what is wrong with shared memory, on each node: not every MPI survives that."""
    if not local_rank(environment()):
        for finding in shared_memory(Job([mine])):
            if finding.verdict == WRONG:
                said = f"{finding.topic} on {mine.host}: {finding.said}\n-> {finding.remedy}"
                print(f"mpicoll doctor: {said}", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------- among all ranks


class _Late(Exception):
    """Not all ranks came: of `missing` nothing was heard, from others what `came` says."""

    def __init__(self, missing: Sequence[int], came: dict[int, Any]) -> None:
        self.missing, self.came = tuple(missing), came


class _Mail:
    """Messages between rank 0 and the others, under one deadline.

    No collectives: where a rank doesn't come, rank 0 still learns of all others.
    """

    def __init__(self, comm: MPI.Intracomm, seconds: float) -> None:
        self._comm = comm
        self._deadline = time.monotonic() + seconds
        self._sent: dict[int, MPI.Request] = {}

    def to_first(self, value: Any) -> list[Any]:
        """Give a value to rank 0, which gets all ranks'; others get nothing."""
        if self._comm.rank:
            self._send(value, 0)
            return []
        got = self._receive({0: value}, range(self._comm.size))
        return [got[rank] for rank in range(self._comm.size)]

    def from_first(self, values: Sequence[Any]) -> Any:
        """Get rank 0's value for this rank."""
        if self._comm.rank:
            return self._receive({}, (0,))[0]
        for rank in range(1, self._comm.size):
            self._send(values[rank], rank)
        return values[0]

    def _send(self, value: Any, to: int) -> None:
        self.deliver()
        self._sent[to] = self._comm.isend(value, to, _TAG)

    def deliver(self) -> None:
        """Wait until what was sent has left."""
        while self._sent:
            self._sent = {to: sent for to, sent in self._sent.items() if not sent.Test()}
            self._pause(list(self._sent), {})

    def _receive(self, got: dict[int, Any], ranks: Sequence[int]) -> dict[int, Any]:
        status = MPI.Status()
        while missing := [rank for rank in ranks if rank not in got]:
            message = self._comm.improbe(MPI.ANY_SOURCE, _TAG, status)
            if message is not None:
                got[status.source] = message.recv()
            else:
                self._pause(missing, got)
        return got

    def _pause(self, missing: Sequence[int], came: dict[int, Any]) -> None:
        if missing and time.monotonic() > self._deadline:
            raise _Late(missing, came)
        time.sleep(0.001)


def _together(mine: Facts, args: argparse.Namespace) -> int:
    comm = MPI.COMM_WORLD
    # Rank 0's time is up first: it can say most.
    limit = args.timeout + (SPARE / 2 if comm.rank else 0)
    mail = _Mail(comm, limit)
    job, status = Job([mine], waited=args.timeout, folder=args.folder), 1
    try:
        job = _seen_by_all(mail, mine, args.folder)
        status = _tell(job, args) if comm.rank == 0 else 0
        status = int(mail.from_first([status] * comm.size))
        mail.deliver()
    except _Late as late:
        if comm.rank:
            said = f"mpicoll doctor: rank {comm.rank} on {mine.host}: no word from rank 0"
            print(f"{said} in {limit:g} s", file=sys.stderr, flush=True)
        elif not job.sights:
            came = [late.came[rank] for rank in sorted(late.came)]
            ranks = [said for said in came if isinstance(said, Facts)] or [mine]
            _tell(replace(job, ranks=ranks, missing=late.missing), args)
        comm.Abort(1)  # MPI_Finalize would wait for whoever is missing
    return status


def _seen_by_all(mail: _Mail, mine: Facts, folder: str) -> Job:
    """Return what all ranks know, and have seen of one another; on rank 0, of itself elsewhere."""
    mail.to_first(mine)
    mail.from_first([None] * mine.world)  # all are there: nobody will have to give up
    with tokens_left(mine) as mine:
        ranks = mail.to_first(mine)
        others = [*ranks[1:], *ranks[:1]]
        near, far = mail.from_first(list(zip(_next_on_node(ranks), others, strict=True)))
        sights = mail.to_first(_sight(mine, near, far, folder))
        mail.from_first([None] * mine.world)  # all have looked
    return Job(ranks or [mine], dict(enumerate(sights)), folder=folder)


def _next_on_node(ranks: Sequence[Facts]) -> list[Facts]:
    """Return for each rank the next one on its node: itself where it is alone there."""
    nodes: dict[str, list[Facts]] = {}
    for facts in ranks:
        nodes.setdefault(facts.host, []).append(facts)
    after = {}
    for members in nodes.values():
        for facts, neighbour in zip(members, [*members[1:], *members[:1]], strict=True):
            after[facts.rank] = neighbour
    return [after[facts.rank] for facts in ranks]


def _sight(mine: Facts, near: Facts, far: Facts, folder: str) -> Sight:
    """Look at the next rank of this node, and at the next of all."""
    seen = Sight() if near.rank == mine.rank else look_at(near, on_node=True, folders=(SHM,))
    if not folder:
        return seen
    hidden = look_at(far, on_node=False, folders=(folder,)).hidden
    return Sight(seen.reads, {**seen.hidden, **hidden})


# ------------------------------------------------------------------------------------ the report


def _tell(job: Job, args: argparse.Namespace) -> int:
    """Print what was found and return the exit status."""
    findings = examine(job)
    if args.json:
        verdicts = [finding.verdict for finding in findings]
        worst = next(v for v in (WRONG, WARNING, OK) if v in verdicts)
        print(
            json.dumps(
                {
                    "mpicoll": __version__,
                    "verdict": worst,
                    "findings": [asdict(finding) for finding in findings],
                    "ranks": [_for_machines(facts) for facts in job.ranks],
                }
            ),
            flush=True,
        )
    else:
        print("\n".join(_table(job, findings)), flush=True)
    return int(any(finding.verdict == WRONG for finding in findings))


def _for_machines(facts: Facts) -> dict[str, Any]:
    said = asdict(facts)
    for name in ("tokens", "word_at", "slurm"):
        del said[name]
    return said


def _table(job: Job, findings: Sequence[Finding]) -> list[str]:
    width = max(len(finding.topic) for finding in findings)
    lines = [f"mpicoll {__version__} doctor, {len(job.ranks)} rank{'s' * (len(job.ranks) > 1)}", ""]
    for finding in findings:
        head = f"  {finding.verdict:<8} {finding.topic:<{width}}  "
        rest = " " * len(head)
        lines += _wrapped(finding.said, head, rest)
        if finding.remedy:
            lines += _wrapped(finding.remedy, f"{rest}-> ", f"{rest}   ")
    wrong = sum(finding.verdict == WRONG for finding in findings)
    warnings = sum(finding.verdict == WARNING for finding in findings)
    lines += ["", f"{wrong} wrong, {warnings} warning{'s' * (warnings != 1)}"]
    return lines


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,  # paths and options are there to be copied
        break_long_words=False,
    )
