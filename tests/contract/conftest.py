"""What the tests of the contract are given: groups over each transport, arrays of each library.

mpicoll's own plugin has the ranks run them together; groups are made anew after a failure.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


_beside = None if RANKS else MPI.COMM_WORLD.Dup()


def pytest_configure(config: pytest.Config) -> None:
    if RANKS:
        config.addinivalue_line("markers", "mpi: runs on several ranks")
        config.pluginmanager.register(InThreads())


def finish(request: MPI.Request) -> None:
    """Wait for MPI, but so that the test's limit can end it."""
    while not request.Test():
        time.sleep(2e-5)


def meet(world: Any) -> None:
    """Wait for all ranks, but so that the test's limit can end it: one may have failed."""
    finish(world.Ibarrier())


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
        self.made: dict[tuple[Any, ...], mc.ProcessGroup] = {}

    def __call__(self, tuning: Tuning = select.tuning, **options: Any) -> mc.ProcessGroup:
        if RANKS:
            return tuned(tuning, **options)
        key = tuning, *sorted(options.items())
        pg = self.made.get(key)
        if pg is None or pg.is_broken or pg.is_closed:
            if pg is not None:
                pg.abort()
            pg = self.made[key] = tuned(tuning, **options)
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
    return World() if RANKS else _beside


@pytest.fixture
def folder(tmp_path: Path, world: Any) -> Path:
    """A new folder that all ranks share."""
    return world.bcast(tmp_path)
