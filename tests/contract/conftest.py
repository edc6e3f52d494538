"""One verdict per test, agreed by all ranks; groups that are made anew after a failure.

Every phase (set-up, call, tear-down) of a test ends with an exchange of outcomes on a
communicator of its own, nonblocking and under a limit.  A test passed if it passed on every
rank; rank 0 reports the failures of all.  A rank that is stuck dumps its stack and ends the job.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.transports import select
from mpicoll.transports.tuning import Tuning
from tests.contract.arrays import KINDS, Kind
from tests.contract.in_threads import RANKS, InThreads, World

if not RANKS:
    from mpi4py import MPI

# All backends on 2 and 3 ranks; what every user gets on any number, and over several nodes.
NODES = os.environ.get("MPICOLL_NODES", "")
BACKENDS = ("auto", "mpi") if (RANKS or MPI.COMM_WORLD.size) in (2, 3) and not NODES else ("auto",)
if NODES:  # the arrays of the tests are small: they are to cross between nodes in several pieces
    select.tuning = Tuning(nodes_from=1, nodes_piece=32 * 1024)
DEFAULT = select.tuning
GROUP_TIMEOUT = 20.0  # of every call that names no timeout of its own
LIMIT = 45.0  # seconds that one test may take; @pytest.mark.limit(seconds) says otherwise
OUTCOMES = ("passed", "skipped", "failed")


class Verdicts:
    """The exchange of outcomes.  `broken` counts failures: groups made before one are stale."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD.Dup()
        self.broken = 0

    def finish(self, request: MPI.Request) -> None:
        while not request.Test():
            time.sleep(2e-5)

    def agree(self, report: pytest.TestReport) -> None:
        """Make `report` the same on every rank, with the texts of all failures in it."""
        text = "" if report.passed else f"{time.time():.3f}\n{report.longreprtext}"
        payload = np.frombuffer(text.encode(), dtype=np.uint8).copy()
        code = OUTCOMES.index(report.outcome)
        where = zlib.crc32(f"{report.nodeid} {report.when}".encode())
        mine = np.array([code, where, len(payload)], dtype=np.int64)
        all_of = np.empty((self.comm.size, 3), dtype=np.int64)
        self.finish(self.comm.Iallgather(mine, all_of))
        codes, places, lengths = all_of.T
        assert (places == places[0]).all(), f"the ranks are in different tests; this: {report}"
        if (codes == codes[0]).all() and code < 2:
            return
        texts = np.empty(lengths.sum(), dtype=np.uint8)
        self.finish(self.comm.Iallgatherv(payload, (texts, lengths)))
        parts = [p.tobytes().decode() for p in np.split(texts, np.cumsum(lengths)[:-1])]
        by_text: dict[str, list[int]] = {}
        first: dict[str, str] = {}
        for rank, part in enumerate(parts):
            stamp, _, body = part.partition("\n")
            body = re.sub(r"0x[0-9a-f]+", "0x...", body or "passed")  # so that alike is alike
            if OUTCOMES[codes[rank]] == "skipped":
                body = f"skipped: {body}"
            by_text.setdefault(body, []).append(rank)
            first[body] = min(first.get(body, stamp or "z"), stamp or "z")
        report.outcome = "failed"
        report.longrepr = "\n".join(
            f"--- rank {', '.join(map(str, ranks))} of {len(parts)}:\n{body}"
            for body, ranks in sorted(by_text.items(), key=lambda item: first[item[0]])
        )
        self.broken += 1


if not RANKS:
    verdicts = Verdicts()
_log = os.environ.get("MPICOLL_TEST_LOG")  # stderr itself is captured by now
_stacks = open(f"{_log}.stack{MPI.COMM_WORLD.rank}", "w") if _log and not RANKS else sys.stderr  # noqa: SIM115


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANKS:
        config.addinivalue_line("markers", "mpi: runs on several ranks")
        config.pluginmanager.register(InThreads())
    elif MPI.COMM_WORLD.rank != 0:
        config.pluginmanager.unregister(name="terminalreporter")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    marker = item.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LIMIT
    faulthandler.dump_traceback_later(seconds, exit=True, file=_stacks)
    result = yield
    faulthandler.cancel_dump_traceback_later()
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if not RANKS:
        verdicts.agree(report)
    return report


def tuned(tuning: Tuning, **options: Any) -> mc.ProcessGroup:
    """Make a group of the whole world whose transport has its own tuning."""
    before, select.tuning = select.tuning, tuning
    if RANKS:  # all of them set the same
        return mc.new_group(timeout=GROUP_TIMEOUT, **options)
    try:
        return mc.new_group(timeout=GROUP_TIMEOUT, **options)
    finally:
        select.tuning = before


class Groups:
    """World groups, one per tuning and set of options, shared by tests until one fails."""

    def __init__(self) -> None:
        self.made: dict[tuple[Any, ...], tuple[int, mc.ProcessGroup]] = {}

    def __call__(self, tuning: Tuning = select.tuning, **options: Any) -> mc.ProcessGroup:
        if RANKS:
            return tuned(tuning, **options)
        key = tuning, *sorted(options.items())
        stamp, pg = self.made.get(key, (-1, None))
        if pg is None or stamp != verdicts.broken:
            if pg is not None:
                pg.abort()
            pg = tuned(tuning, **options)
            self.made[key] = verdicts.broken, pg
        return pg


_groups = Groups()


@pytest.fixture
def tuning() -> Tuning:
    """The tuning of the test's groups; a test that wants another one is parametrized with it."""
    return DEFAULT


@pytest.fixture(params=BACKENDS)
def pg(request: pytest.FixtureRequest, tuning: Tuning) -> mc.ProcessGroup:
    """A group of the whole world, over each backend in turn."""
    return _groups(tuning, backend=request.param)


@pytest.fixture
def fresh(tuning: Tuning) -> Iterator[mc.ProcessGroup]:
    """A group of the whole world for one test alone, which may close it."""
    pg = tuned(tuning)
    yield pg
    pg.shutdown()


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """An array library: how to make its arrays from NumPy's, and back."""
    request.param.require()
    return request.param


@pytest.fixture
def world() -> Any:
    """The test's own channel beside the library: bare mpi4py on a private communicator."""
    return World() if RANKS else verdicts.comm


@pytest.fixture
def folder(tmp_path: Path, world: Any) -> Path:
    """A new folder that all ranks share."""
    return world.bcast(tmp_path)
