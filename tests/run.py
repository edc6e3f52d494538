"""Run every test and count: `python -m tests.run --mpi mpich|openmpi [--soak] [-k EXPR] ...`.

A stage is one program under a hard time limit.  One that hangs, is killed, leaves processes
behind or ends non-zero without a failed test to show for it counts as a failure.  Stages that
leave much of two cores idle run two at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from tests.harness import (
    ROOT,
    SHARED,
    Ended,
    clear_shared,
    environment,
    installed_mpi,
    marked,
    mpiexec,
    run_bounded,
)
from tests.soak import SOAK

NO_TESTS_COLLECTED = 5  # pytest's exit status, as with -k


@dataclass
class Stage:
    name: str
    ranks: int  # 0: plain pytest
    paths: list[str]
    limit: float  # seconds
    nodes: str = ""  # MPICOLL_NODES
    native: str = ""  # MPICOLL_NATIVE
    threads: str = ""  # MPICOLL_TEST_THREADS: so many ranks are threads of one process
    leaves_out: Sequence[str] = ()
    half: bool = False  # it leaves much of two cores idle

    def argv(self, keyword: str, without: Sequence[str]) -> list[str]:
        options = ["-q", "--no-header", "-p", "no:cacheprovider", "-rN", "--tb=short"]
        options += ["--color=no"]
        if self.ranks:
            options += ["--with-mpi", "--no-summary", "-p", "mpicoll.testing.plugin"]
        if self.threads:
            options += ["-p", "no:pytest_mpi"]
        if keyword:
            options += ["-k", keyword]
        options += [f"--ignore-glob=*/{name}.py" for name in self.leaves_out]
        options += [f"--ignore-glob=*{word}*" for word in without if word.startswith("test_")]
        launcher = mpiexec(self.ranks) if self.ranks else []
        return [*launcher, sys.executable, "-m", "pytest", *options, *self.paths]


def _contract(*names: str) -> list[str]:
    return [f"tests/contract/test_{name}.py" for name in names]


ACROSS_NODES = {  # ranks: what runs with MPICOLL_NODES
    3: _contract("bad_input", "collectives", "delays", "groups", "mismatch", "nodes", "property"),
    4: _contract("collectives", "delays", "dtypes", "mismatch", "missing", "nodes", "unmatched"),
}


# What is refused is shown by 1 and 2 ranks, what stands in for GPUs by 1 and 3.
REFUSED, STAND_INS = ("test_bad_input", "test_remedies"), ("test_aware", "test_nccl", "test_staged")
ENDLESS = ("test_load",)  # many calls, the slower the more ranks share a core: by 1 and 2
TORCH = ("test_torch_backend",)  # loads much of PyTorch on every rank: by 1, 2 and 3
PAIRS = ("test_rings", "test_in_place")  # the same with more than 3
PROGRAMS = ("test_property",)  # by 1, 2, 3 and 5
LEFT_OUT = {  # by ranks
    2: STAND_INS,
    3: (*REFUSED, *ENDLESS),
    4: (*REFUSED, *STAND_INS, *ENDLESS, *TORCH, *PAIRS, *PROGRAMS),
}
# Scenarios that look closely at clocks: one after the other, beside those that don't.
CLOCKS = {
    *("test_endings", "test_jobs", "test_patience", "test_rings", "test_survivors"),
    *("test_timeouts", "test_torchrun", "test_trace"),
}
IN_PYTHON = _contract(
    *("collectives", "delays", "dtypes", "in_place", "mismatch", "objects", "p2p", "unmatched"),
    "work",
)
IN_THREADS = _contract("groups", "merge", "mismatch", "objects", "p2p", "unmatched", "work")


def stages(soak: bool) -> list[Stage]:
    slower = 10 if soak else 1
    scenarios = {path.stem for path in (ROOT / "tests" / "scenarios").glob("test_*.py")}
    return [
        Stage("unit", 0, ["tests/unit"], 150, half=True),
        Stage("contract, 1 rank", 1, ["tests/contract"], 150 * slower, half=True),
        Stage("3 ranks in threads", 0, IN_THREADS, 150 * slower, threads="3", half=True),
        *(
            Stage(
                f"contract, {n} ranks",
                n,
                ["tests/contract"],
                300 * slower,
                leaves_out=LEFT_OUT[n],
            )
            for n in (2, 3, 4)
        ),
        Stage("without the compiled core, 2 ranks", 2, IN_PYTHON, 150 * slower, native="0"),
        *(Stage(f"on 2 nodes, {n} ranks", n, ACROSS_NODES[n], 300 * slower, "2") for n in (3, 4)),
        Stage("properties, 5 ranks", 5, ["tests/contract/test_property.py"], 150 * slower),
        *(
            Stage(
                f"scenarios {what}",
                0,
                ["tests/scenarios"],
                600 * slower,
                leaves_out=sorted(left_out),
                half=True,
            )
            for what, left_out in (("with clocks", scenarios - CLOCKS), ("without clocks", CLOCKS))
        ),
    ]


def in_order(
    stages: Sequence[Stage], run: Callable[[Stage], Ended], stop: Callable[[], None]
) -> Iterator[tuple[Stage, Ended]]:
    """Run stages one by one, halves two at a time; say how each ended.  `stop` ends what runs."""
    for half, row in groupby(stages, key=lambda stage: stage.half):
        these = list(row)
        with ThreadPoolExecutor(2 if half else 1) as pool:
            try:
                yield from zip(these, pool.map(run, these))
            except BaseException:  # Ctrl-C reaches this process alone
                stop()
                raise


def outcomes(log: Path, ended: Ended) -> tuple[Counter[str], list[tuple[str, str]]]:
    """Count a stage's tests; return its failures as (title, text) too."""
    worst: dict[str, str] = {}
    failures: list[tuple[str, str]] = []
    rank = {"passed": 0, "skipped": 1, "failed": 2}
    running = ""
    for line in log.read_text().splitlines() if log.exists() else []:
        event = json.loads(line)
        test, outcome = event["test"], event["event"]
        if outcome == "start":
            running = test
            continue
        running = ""
        worst[test] = max(worst.get(test, "passed"), outcome, key=rank.__getitem__)
        if outcome == "failed":
            failures.append((f"{test} ({event['when']})", event["text"]))
    count = Counter(worst.values())

    trouble = ""
    if ended.timed_out:
        trouble = f"killed at its limit, after {ended.seconds:.0f} s"
    elif running:
        trouble = f"died with exit code {ended.code}"
    elif ended.code not in (0, NO_TESTS_COLLECTED) and not failures:
        trouble = f"exit code {ended.code}, though no test failed"
    if ended.leftovers and not ended.timed_out:
        trouble += f" left processes {ended.leftovers} behind"
    if trouble:
        count["failed"] += 1
        where = f" in {running}" if running else ""
        failures.append((f"the stage itself{where}: {trouble}", ended.output[-6000:]))
    return count, failures


def sweep(before: set[str]) -> Counter[str]:
    """Clear shared memory of what the run left there: nothing of ours may be among it."""
    ours, theirs = clear_shared(before)
    print(f"in {SHARED}: {len(theirs)} files of the MPI library removed, {len(ours)} of ours")
    for name in theirs + ours:
        print(f"    {name}")
    return Counter(failed=len(ours), passed=not ours)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.run", description=__doc__)
    parser.add_argument("--mpi", choices=("mpich", "openmpi"), default=installed_mpi())
    parser.add_argument("--soak", action="store_true", help="also the large counts (slow)")
    parser.add_argument("-k", dest="keyword", default="", help="as in pytest")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="WORDS",
        help="leave out stages with these words in their names, or files test_WORDS*.py",
    )
    options = parser.parse_args()
    if options.mpi != installed_mpi():
        parser.error(f"--mpi {options.mpi}, but {sys.prefix} holds {installed_mpi()}")

    total: Counter[str] = Counter()
    before = set(os.listdir(SHARED))
    chosen = [
        stage
        for stage in stages(options.soak)
        if not any(words in stage.name for words in options.without)
    ]
    with tempfile.TemporaryDirectory(prefix="mpicoll-tests-") as folder:

        def log(stage: Stage) -> Path:
            return Path(folder) / f"{stage.name}.jsonl"

        def run(stage: Stage) -> Ended:
            extra = {"MPICOLL_TEST_LOG": str(log(stage))}
            if options.soak or SOAK:
                extra["MPICOLL_SOAK"] = "1"
            if stage.nodes:
                extra["MPICOLL_NODES"] = stage.nodes
            if stage.native:
                extra["MPICOLL_NATIVE"] = stage.native
            if stage.threads:
                extra["MPICOLL_TEST_THREADS"] = stage.threads
            argv = stage.argv(options.keyword, options.without)
            return run_bounded(argv, stage.limit, environment(extra))

        def stop() -> None:
            for pid in marked(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

        for stage, ended in in_order(chosen, run, stop):
            count, failures = outcomes(log(stage), ended)
            for title, text in failures:
                print(f"\n{'=' * 8} [{stage.name}] {title}\n{text.rstrip()}\n")
            print(
                f"{options.mpi}: {stage.name}: {count['passed']} passed, "
                f"{count['failed']} failed, {count['skipped']} skipped in {ended.seconds:.0f} s",
                flush=True,
            )
            total += count
    total += sweep(before)
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped")
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
