"""Measure what failures do, and write the tables of docs/reliability.md.

python -m scripts.failures measure [-k PHRASES]         one JSON object per line
python -m scripts.failures table FILES [--json | --write PAGE]

Start it by scripts/reliability, which measures with each MPI library in turn.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from tests.harness import SHARED, clear_shared, installed_mpi, launch

from . import tables
from .contenders import BARE, CONTENDERS, OURS, Contender
from .scenario import Scenario
from .scenarios import SCENARIOS
from .verdicts import judge


def measure(phrases: str) -> None:
    """Run each scenario under each contender, and print what became of it."""
    # A crash is an answer here, and need not leave its memory on disk.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # As an exception, so that the job under way is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    wanted = [phrase.strip() for phrase in phrases.split(",")]
    chosen = [s for s in SCENARIOS if any(w in f"{s.group}: {s.name}" for w in wanted)]
    if not chosen:
        sys.exit(f"no scenario has one of {wanted} in its name")
    # gloo needs a launcher, but no MPI library: once is enough.
    with_gloo = installed_mpi() == "mpich" and importlib.util.find_spec("torch")
    contenders = CONTENDERS if with_gloo else (OURS, BARE)
    jobs = [(scenario, contender) for scenario in chosen for contender in contenders]
    before = set(os.listdir(SHARED))
    for number, (scenario, contender) in enumerate(jobs, 1):
        _show(f"{installed_mpi()}, {number} of {len(jobs)}: {scenario.name} ({contender.key})")
        print(json.dumps(trial(scenario, contender, before)), flush=True)
    _show("")


def trial(scenario: Scenario, contender: Contender, before: set[str]) -> dict[str, Any]:
    """Run one scenario under one contender in a job of its own, and clear up behind it.

    `before` is what was in shared memory before the first.
    """
    try:
        ended = launch(
            scenario.ranks,
            contender.script(scenario.body(contender.key)),
            contender.limit,
            preamble=contender.preamble(),
            options=scenario.launcher.get(installed_mpi(), ()),
        )
    finally:
        ours, theirs = clear_shared(before)
    verdict = judge(scenario, ended, contender.limit)
    return {
        "group": scenario.group,
        "scenario": scenario.name,
        "contender": contender.key,
        "mpi": installed_mpi(),
        "class": verdict.kind,
        "words": verdict.words,
        "code": verdict.code,
        "seconds": verdict.seconds,
        "ranks": ended.ranks,
        "left": {"processes": len(ended.leftovers), "mpicoll": len(ours), "mpi": len(theirs)},
        "output": ended.output[-2000:],
    }


def _show(line: str) -> None:
    if sys.stderr.isatty():
        end = "" if line else "\r"
        print(f"\r\x1b[K{line}", end=end, file=sys.stderr, flush=True)


def write(page: Path, found: list[dict[str, Any]]) -> None:
    """Put the tables between their marks in the page."""
    text = page.read_text()
    for name, lines in (("failures", tables.failures(found)), ("endings", tables.endings(found))):
        place = re.search(rf"<!-- {name}: .*? -->\n(.*?)<!-- {name} end -->", text, re.S)
        if not place:
            sys.exit(f"{page} holds no place for {name!r}")
        text = f"{text[: place.start(1)]}\n{lines}\n\n{text[place.end(1) :]}"
    page.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.failures")
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("-k", dest="phrases", default="")
    showing = commands.add_parser("table")
    showing.add_argument("files", nargs="+", type=Path)
    showing.add_argument("--json", action="store_true")
    showing.add_argument("--write", type=Path, metavar="PAGE")
    options = parser.parse_args()
    if options.command == "measure":
        measure(options.phrases)
        return
    found = [json.loads(line) for path in options.files for line in path.read_text().splitlines()]
    if options.write:
        write(options.write, found)
    elif options.json:
        print(json.dumps(found, indent=1))
    else:
        print(tables.failures(found))
        if endings := tables.endings(found):
            print(f"\n## What a launcher reports\n\n{endings}")


if __name__ == "__main__":
    main()
