"""Read what the ranks of a job recorded: who was where, who was late, and a trace to look at.

Run a job with MPICOLL_TRACE_DIR set, and every rank leaves its flight recorder in that folder:

    MPICOLL_TRACE_DIR=out/flight mpiexec -n 4 python train.py
    python -m mpicoll trace out/flight
    python -m mpicoll trace out/flight --json
    python -m mpicoll trace out/flight --perfetto train.json

The command needs no MPI.  It aligns the ranks' clocks by their calls and prints how far they were
apart; of each group the last call that all ranks finished, and who was in which call after it; and
how long the others waited for each rank.  The trace goes to trace.json in the folder and opens in
https://ui.perfetto.dev.  The exit status is 2 where there is nothing to read.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import clocks, perfetto, recordings
from .asked import Refusal, is_rank_0
from .clocks import Offset
from .demo import in_words
from .recordings import Recordings, Unreadable, in_ranges
from .stragglers import Stragglers, stragglers
from .whereabouts import ABSENT, Account, CallAt, Row, accounts

ERRORS = 3  # errors that are shown of ranks in the same call
WIDTH = 400  # characters of an error that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="what MPICOLL_TRACE_DIR named")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--perfetto",
        type=Path,
        metavar="FILE",
        help="where the trace for ui.perfetto.dev goes (default: DIR/trace.json)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if not is_rank_0():  # it needs no MPI, but was started under it
        return 0
    try:
        found = recordings.read(args.folder)
    except Unreadable as error:
        raise Refusal(error) from error
    offsets = clocks.align(found)
    told, late = accounts(found), stragglers(found, offsets)
    trace = args.perfetto or args.folder / "trace.json"
    unwritten = ""
    try:
        events = perfetto.events(found, offsets)
        trace.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns"}))
    except OSError as error:
        unwritten = str(error)
    if args.json:
        print(
            json.dumps(_for_machines(found, offsets, told, late, "" if unwritten else str(trace)))
        )
    else:
        _say_files(found)
        _say_clocks(offsets)
        _say_accounts(told)
        _say_stragglers(late)
        if not unwritten:
            print(f"\nThe trace is in {trace}: open it in https://ui.perfetto.dev")
    if unwritten:
        raise Refusal(f"the trace could not be written: {unwritten}")
    return 0


# ---- for people ----


def _say_files(found: Recordings) -> None:
    hosts: dict[str, list[int]] = {}
    for rank, process in found.processes.items():
        hosts.setdefault(process.host, []).append(rank)
    print("Recorded by " + "; ".join(f"{in_ranges(r)} on {host}" for host, r in hosts.items()))
    if found.absent:
        print(f"No file from {in_ranges(found.absent)}: killed, stopped, or still running")
    for note in found.notes:
        print(f"Note: {note}")


def _say_clocks(offsets: dict[int, Offset | None]) -> None:
    if len(offsets) == 1:
        return
    print(f"\nClocks, beside that of rank {min(offsets)}\n")
    for rank, offset in sorted(offsets.items()):
        if offset is None:
            print(f"  rank {rank}: no finished call in common; its times are left as they are")
        elif rank != min(offsets):
            ahead, give = offset.seconds * 1e6, offset.uncertainty * 1e6
            print(f"  rank {rank}: {ahead:+,.1f} us, give or take {give:,.1f} us")


def _say_accounts(told: list[Account]) -> None:
    print("\nWho was where at the end (ranks of the world)")
    for account in told:
        print(f"\n  group {account.key}")
        for call in account.failed:
            _say_call(call, "failed, and the group went on")
        if account.done is not None:
            _say_call(account.done, "the last that all finished")
        for call in account.unfinished:
            _say_call(call, "not finished by all")
        if account.more:
            print(f"    and {account.more} more calls behind that")
        if account.messages:
            print("    sends and receives that did not finish")
            for row in account.messages:
                _say_row(row)


def _say_call(call: CallAt, how: str) -> None:
    print(f"    call #{call.seq}, {how}")
    for row in call.rows:
        _say_row(row)


def _say_row(row: Row) -> None:
    state = {"called": "waiting", ABSENT: "left no file"}.get(row.state, row.state)
    line = f"      {in_ranges(row.ranks):<12} {state:<13}"
    if row.call:
        line += f" {row.call}"
    if row.place:
        line += f"  {row.place}"
    if row.last:
        line += f"; last: {row.last}"
    print(line.rstrip())
    errors = list(row.errors.items())
    for rank, error in errors[:ERRORS]:
        text = error if len(error) <= WIDTH else error[:WIDTH] + " ..."
        print(f"        rank {rank}: " + text.strip().replace("\n", "\n          "))
    if len(errors) > ERRORS:
        print(f"        and {len(errors) - ERRORS} more errors, see --json")


def _say_stragglers(late: Stragglers) -> None:
    print(
        f"\nWho was waited for, in the {late.compared} collectives that all ranks of a group "
        f"called\n({late.close} of them too close to tell who came last)\n"
    )
    print(f"  {'rank':>6}{'came last':>11}{'waited, all':>13}{'at most':>11}  where at most")
    for straggler in late.ranks:
        line = f"  {straggler.rank:>6}{straggler.last:>11}{in_words(straggler.total):>13}"
        if straggler.worst is not None and straggler.group is not None:
            worst = straggler.worst
            line += f"{in_words(straggler.longest):>11}  {worst.describe()} #{worst.seq}"
            line += f" of {straggler.group.name!r}  {worst.place}".rstrip()
        print(line)


# ---- for machines ----


def _for_machines(
    found: Recordings,
    offsets: dict[int, Offset | None],
    told: list[Account],
    late: Stragglers,
    trace: str,
) -> dict[str, Any]:
    return {
        "processes": [asdict(process) for process in found.processes.values()],
        "absent": found.absent,
        "notes": found.notes,
        "clocks": {rank: offset and offset._asdict() for rank, offset in offsets.items()},
        "groups": [
            {**asdict(account), "key": account.key._asdict(), "well": account.well}
            for account in told
        ],
        "collectives": {"compared": late.compared, "close": late.close},
        "stragglers": [{**asdict(s), "group": s.group and s.group._asdict()} for s in late.ranks],
        "trace": trace,
    }
