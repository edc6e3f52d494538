"""Groups over several nodes, which MPICOLL_NODES pretends; without it there is nothing to test."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

import mpicoll as mc
from mpicoll.cli.trials import TRIALS
from mpicoll.errors import CollectiveMismatchError, InvalidCallError
from tests.contract.arrays import NUMPY, data, reduced
from tests.contract.conftest import NODES

pytestmark = pytest.mark.mpi(min_size=3)
across_nodes = pytest.mark.skipif(not NODES, reason="MPICOLL_NODES pretends no nodes")
CHECKS = pytest.mark.parametrize("checks", ["full", "node"])


@pytest.fixture
def set_nodes(monkeypatch):
    return lambda text: monkeypatch.setenv("MPICOLL_NODES", text)


@across_nodes
@CHECKS
@pytest.mark.parametrize("count", [1, 5, 1000, 30_001])
def test_every_collective_with_either_checks(checks, count):
    with mc.new_group(timeout=20, checks=checks) as pg:
        assert pg.name() == "hierarchical"
        for name, make in TRIALS.items():
            trial = make(pg, count)
            trial.call()
            assert trial.agrees(), name


@CHECKS
@pytest.mark.parametrize("sizes", ["1,rest", "rest,1"])
def test_ranks_that_alternate_between_uneven_nodes(set_nodes, checks, sizes, world):
    set_nodes(sizes.replace("rest", str(world.size - 1)))
    order = sorted(range(world.size), key=lambda rank: (rank % 2, -rank))
    with mc.new_group(timeout=20, checks=checks) as pg, pg.split_group(order) as mixed:
        assert mixed.name() == "hierarchical"
        for count in (7, 20_003):
            for name, make in TRIALS.items():
                trial = make(mixed, count)
                trial.call()
                assert trial.agrees(), name


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8", "complex64"])
def test_all_ranks_get_the_same_bits(set_nodes, dtype, world):
    set_nodes("2")
    with mc.new_group(timeout=20) as pg:
        rng = np.random.default_rng(pg.rank())
        for count in (100, 300_001):
            x = (100 * rng.standard_normal(count)).astype(dtype)
            pg.allreduce(x).wait()
            first = world.bcast(x.tobytes())
            assert x.tobytes() == first


def test_half_precision_is_rounded_once(set_nodes):
    """2048 + 1 + 1 (+ 1): in float16 each single step would stay at 2048."""
    set_nodes("2")
    with mc.new_group(timeout=20) as pg:
        x = np.full(100_001, 2048 if pg.rank() == 0 else 1, np.float16)
        expected = np.float16(2048 + pg.size() - 1)
        pg.allreduce(x).wait()
        assert (x == expected).all()


def test_one_rank_per_node_goes_by_mpi(set_nodes, world):
    set_nodes(str(world.size))
    with mc.new_group(timeout=20) as pg:
        assert pg.name() == "mpi"
    set_nodes("1")
    with mc.new_group(timeout=20) as pg:
        assert pg.name() == "shm"


@pytest.mark.parametrize("odd", [0, -1])
def test_different_values_are_an_error_on_all_ranks(set_nodes, world, odd):
    set_nodes("2" if world.rank == range(world.size)[odd] else "1")
    with pytest.raises(CollectiveMismatchError, match="MPICOLL_NODES"):
        mc.new_group(timeout=20)


@pytest.mark.parametrize("text", ["many", "0", "-1", "99", "1,1", "1,,2", "2,0,1"])
def test_values_that_mean_nothing(set_nodes, world, text):
    if world.size == 4 and text == "1,1":
        text = "1,1,1"
    set_nodes(text if world.rank == 1 else "2")
    error = InvalidCallError if world.rank == 1 else CollectiveMismatchError
    with pytest.raises(error, match="MPICOLL_NODES"):
        mc.new_group(timeout=20)


def test_checks_of_another_kind_are_refused(world):
    for checks in ("none", "", None, 1):
        with pytest.raises(InvalidCallError, match="checks must be 'full'.*'node'.* or 'first'"):
            mc.new_group(timeout=20, checks=checks)
    with pytest.raises(InvalidCallError, match="checks='first' is for groups on GPU memory"):
        mc.new_group(timeout=20, checks="first")
    with pytest.raises(CollectiveMismatchError, match="checks='node'"):
        mc.new_group(timeout=20, checks="node" if world.rank == 0 else "full")


@across_nodes
@CHECKS
def test_a_barrier_is_a_barrier(checks, world):
    with mc.new_group(timeout=20, checks=checks) as pg:
        for late in range(pg.size()):
            if pg.rank() == late:
                time.sleep(0.1)
            came = time.monotonic()  # one clock for all: the nodes are of this machine
            pg.barrier().wait()
            assert time.monotonic() >= max(world.allgather(came))


@across_nodes
def test_a_call_that_all_refuse_leaves_the_group_usable_with_checks_on_the_node():
    with mc.new_group(timeout=20, checks="node") as pg:
        for _ in range(3):
            with pytest.raises(InvalidCallError):
                pg.allreduce(None)
            parts = [data(r, 100) for r in range(pg.size())]
            x = parts[pg.rank()].copy()
            pg.allreduce(x).wait()
            assert NUMPY.same(x, reduced("SUM", parts))


@across_nodes
def test_children_inherit_the_nodes(set_nodes):
    with mc.new_group(timeout=20, checks="node") as pg:
        set_nodes("1")
        with pg.split(0) as child:
            assert child.name() == "hierarchical"
            assert child._caller.options == pg._caller.options
    set_nodes(os.environ["MPICOLL_NODES"])
