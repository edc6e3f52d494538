"""Run PyTorch's own tests of its backends (`distributed_test.py` in the wheel) over one of them.

    python scripts/torch_suite.py --backend mpicoll -n 2 [-k WORD] [--write FILE]
    python scripts/torch_suite.py --compare FILE FILE ...     the table of docs/pytorch.md

The suite decides by the backend's name which tests it runs, and what some of them do.  To it the
one under test is equal to "gloo", so that every test of gloo's is run; PyTorch is told its name.
All tests run one after the other in one job of `-n` ranks; if one hangs or ends the job, the next
job goes on behind it.  It needs what the suite does: `pip install expecttest`.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 90.0  # seconds that one test may take


def ranks(options: argparse.Namespace) -> None:
    """Run the tests on the ranks of this job, and write each outcome as it is known."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD.Dup()
    # Hydra's and PRTE's ranks would all write.
    log = open(options.write, "a", buffering=1) if world.rank == 0 else None  # noqa: SIM115
    os.environ |= {"BACKEND": "gloo", "WORLD_SIZE": str(world.size), "MASTER_ADDR": "127.0.0.1"}
    os.environ.pop("RANK", None)
    import torch.distributed as dist
    from torch.testing._internal import common_distributed, common_utils
    from torch.testing._internal.distributed import distributed_test as suite

    import mpicoll.torch  # noqa: F401

    suite.BACKEND = Named(options.backend)
    if world.size >= 3:
        os.environ["BACKEND"] = "mpi"  # 23 tests want 8 ranks, but for this name 3 are enough
    codes = {skip.exit_code: skip.message for skip in common_distributed.TEST_SKIPS.values()}

    class Tests(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        pass

    names = unittest.defaultTestLoader.getTestCaseNames(Tests)
    names = [name for name in names if options.keyword in name]
    for name in names[names.index(options.after) + 1 if options.after else 0 :]:
        if log:
            log.write(json.dumps({"test": name, "outcome": "started"}) + "\n")
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        outcome, why = "passed", ""
        started = time.monotonic()
        folder = tempfile.mkdtemp() if world.rank == 0 else ""
        folder = world.bcast(folder)
        for part in ("barrier", "test_dir", "init_dir"):
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{folder}/{part}")
        os.environ["TEMP_DIR"] = folder
        method = getattr(Tests, name)
        if getattr(method, "__unittest_skip__", False):
            outcome, why = "skipped", method.__unittest_skip_why__
        else:
            here = (Tests(name), name, world.rank, world.size, codes)
            outcome, why = run(common_utils, suite, dist, *here)
        if dist.is_initialized():
            with contextlib.suppress(Exception):
                (dist.destroy_process_group if outcome == "passed" else abort)()
        everyone = world.allgather((outcome, why))
        faulthandler.cancel_dump_traceback_later()
        for word in ("failed", "skipped", "passed"):
            found = [(rank, w) for rank, (o, w) in enumerate(everyone) if o == word]
            if found and log:
                text = "\n".join(f"rank {rank}: {w}" if w else "" for rank, w in found)
                row = {
                    "test": name,
                    "outcome": word,
                    "why": text if word == "failed" else found[0][1],
                }
                log.write(json.dumps({**row, "seconds": time.monotonic() - started}) + "\n")
                break


class Named(str):
    """A backend's name that the suite takes for gloo's."""

    def __eq__(self, other: object) -> bool:
        return other == "gloo" or str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")


def abort() -> None:
    import torch.distributed as dist

    dist.distributed_c10d._abort_process_group()


def run(
    common_utils: Any,
    suite: Any,
    dist: Any,
    test: Any,
    name: str,
    rank: int,
    size: int,
    codes: dict[int, str],
) -> tuple[str, str]:
    """Run one test on this rank, as the suite's own processes do."""
    test.rank = rank
    limit = suite.CUSTOM_PG_TIMEOUT.get(name, suite.default_pg_timeout)
    suite.Barrier.init()
    common_utils.set_rng_seed()
    try:
        dist.init_process_group(
            suite.BACKEND.lower(),
            init_method=f"file://{os.environ['TEMP_DIR']}/init",
            world_size=size,
            rank=rank,
            timeout=timedelta(seconds=limit),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            test._barrier()
            getattr(test, name)()
            test._barrier()
    except unittest.SkipTest as skip:
        return "skipped", str(skip)
    except SystemExit as end:
        if end.code in codes:
            return "skipped", codes[end.code]
        return ("passed", "") if not end.code else ("failed", f"exit code {end.code}")
    except BaseException:
        return "failed", traceback.format_exc()
    return "passed", ""


def drive(options: argparse.Namespace) -> None:
    """Start jobs until all tests have been run."""
    path = Path(options.write or tempfile.mkstemp(suffix=".jsonl")[1])
    path.write_text("")
    launcher = [str(Path(sys.prefix) / "bin" / "mpiexec"), *options.launcher.split()]
    after = ""
    while True:
        argv = [*launcher, "-n", str(options.n), sys.executable, "-W", "ignore", __file__]
        argv += ["--backend", options.backend, "-k", options.keyword, "--write", str(path)]
        argv += ["--ranks", "--after", after]
        path_of = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {**os.environ, "PYTHONPATH": path_of, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(
            argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        last = outcomes(path)
        hung = [name for name, row in last.items() if row["outcome"] == "started"]
        if not hung:
            if ended.returncode or not last:
                print(ended.stdout[-3000:])
            break
        after = hung[-1]
        row = {"test": after, "outcome": "failed", "why": f"ended the job:\n{ended.stdout[-4000:]}"}
        with path.open("a") as log:
            log.write(json.dumps(row) + "\n")
    last = outcomes(path)
    for name, row in last.items():
        if row["outcome"] == "failed":
            print(f"==== {name}: failed\n{row['why']}")
    count = collections.Counter(row["outcome"] for row in last.values())
    print(f"{options.backend}, {options.n} ranks: {dict(count)} in {path}")


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    """Return the last that was written of each test."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["test"]] = row
    return found


REASONS = (  # what a skip says, as the table says it
    (r"(?i)cuda|nccl|gpu|xpu|accelerator|backends? .*\{'nccl'", "needs GPUs, or is of NCCL alone"),
    (r"world size|world_size", "needs another number of ranks"),
    (r"(?i)mpi\b", "is of the MPI backend alone"),
)


def reason(why: str) -> str:
    for pattern, words in REASONS:
        if re.search(pattern, why):
            return words
    return why.splitlines()[0] if why else "?"


def compare(paths: list[str]) -> None:
    """Print the table of several runs, and why tests were skipped."""
    print("| run | passed | failed | skipped |\n|---|---|---|---|")
    for path in paths:
        count = collections.Counter(row["outcome"] for row in outcomes(Path(path)).values())
        print(f"| {Path(path).stem} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    for path in paths:
        why = collections.Counter(
            reason(row["why"])
            for row in outcomes(Path(path)).values()
            if row["outcome"] == "skipped"
        )
        print(f"\n{Path(path).stem} skipped:")
        for words, n in why.most_common():
            print(f"- {n}: {words}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="mpicoll")
    parser.add_argument("-n", type=int, default=2, help="ranks")
    parser.add_argument("-k", dest="keyword", default="", help="part of the tests' names")
    parser.add_argument("--write", default="", help="a file for the outcomes, as lines of JSON")
    parser.add_argument("--launcher", default="", help="options for mpiexec")
    parser.add_argument("--compare", nargs="+", help="files that --write has made")
    parser.add_argument("--ranks", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--after", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compare:
        compare(options.compare)
    elif options.ranks:
        ranks(options)
    else:
        drive(options)


if __name__ == "__main__":
    main()
