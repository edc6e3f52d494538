"""Whole programs: the first script, buffers that nobody holds, no MPI at all, pretended nodes."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from tests.harness import PREAMBLE

# A script for torch.distributed._dist2, but for how it says who it is.
DIST2 = """
import time
from datetime import timedelta

import torch
import torch.distributed._dist2 as dist2

pg = dist2.new_group(backend="gloo", timeout=timedelta(seconds=20), device="cpu")
me, n = pg.rank(), pg.size()
if me == n - 1:
    time.sleep(0.3)
a = torch.full((3,), float(me + 1))
b = torch.arange(70_001, dtype=torch.float64) + me
c = torch.full((5, 2), me, dtype=torch.int32)
works = [
    pg.allreduce(a, op=dist2.ReduceOp.SUM, timeout=timedelta(seconds=10)),
    pg.allreduce(b, op=dist2.ReduceOp.MAX),
    pg.broadcast(c, root=n - 1, timeout=timedelta(seconds=10)),
]
for work in works:
    work.wait()
assert torch.equal(a, torch.full((3,), n * (n + 1) / 2)), a
assert torch.equal(b, torch.arange(70_001, dtype=torch.float64) + n - 1), b
assert torch.equal(c, torch.full((5, 2), n - 1, dtype=torch.int32)), c
with dist2.process_group(pg):
    assert dist2.current_process_group() is pg
pg.shutdown()
report(right=True)
"""


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_dist2_script_runs_after_changing_its_import_line(job, n):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed (extra: torch)")
    script = DIST2.replace("import torch.distributed._dist2 as dist2", "import mpicoll as dist2")
    ended = job(n, script)
    assert ended["right"] == [True] * n


@pytest.mark.parametrize("n", [2, 3])
def test_three_unequal_works_in_flight_with_one_rank_late(job, n):
    script = """
pg = mc.new_group(timeout=20)
n = pg.size()
if RANK == 1:
    time.sleep(0.3)
a, b, c = np.full(1, RANK + 1.0), np.full(300_000, RANK + 1), np.full(17, RANK, np.int8)
works = [pg.allreduce(a), pg.allreduce(b, mc.ReduceOp.PRODUCT), pg.broadcast(c, 1)]
for work in (works[2], works[0], works[1]):
    work.wait()
report(a=a.tolist(), b=sorted(set(b.tolist())), c=sorted(set(c.tolist())))
"""
    ended = job(n, script)
    assert ended["a"] == [[3.0], [6.0]][n - 2 : n - 1] * n
    assert ended["b"] == [[2], [6]][n - 2 : n - 1] * n
    assert ended["c"] == [[1]] * n


def test_buffers_that_nobody_holds_while_in_flight(job):
    """On bare mpi4py this is a segmentation fault; also after a timeout has abandoned the call."""
    script = """
pg, other = mc.new_group(timeout=20), mc.new_group(timeout=20)
for i in range(20):
    for size in (1, 5_000, 200_000):
        pg.allreduce(np.ones(size))
        pg.allgather([np.ones(size) for _ in range(pg.size())], np.ones(size))
        pg.reduce_scatter_single(np.ones(size), np.ones(size * pg.size()))
        pg.scan(np.ones(size))
    gc.collect()
    junk = [np.full(200_000, 7.0) for _ in range(8)]
pg.barrier().wait()
assert all((x == 7).all() for x in junk)
if RANK == 1:
    time.sleep(1)
try:
    other.allreduce(np.ones(200_000), timeout=0.3).wait()
except MpicollError as error:
    del error
gc.collect()
junk = [np.full(200_000, 7.0) for _ in range(20)]
for _ in range(100):
    pg.barrier().wait()
    time.sleep(0.005)
report(clean=all(bool((x == 7).all()) for x in junk))
pg.barrier().wait()
"""
    ended = job(2, script)  # both have left the call by then, so MPI has done with it
    assert ended["clean"] == [True, True]


def test_without_an_mpi_library_the_message_helps(job, tmp_path):
    """An environment that has mpi4py, but no MPI: its site-packages hide everything else."""
    script = f"""
import importlib.util, os, pathlib, sys
import numpy
for name in ("mpi4py", "numpy"):
    target = pathlib.Path(importlib.util.find_spec(name).origin).parent
    (pathlib.Path({str(tmp_path)!r}) / name).symlink_to(target)
"""
    job(0, script, preamble="")
    libs = next(path for path in sys.path if path.endswith("site-packages"))
    alone = f"""
import os, sys
sys.path = [p for p in sys.path if p != {libs!r}] + [{str(tmp_path)!r}]
sys.prefix = sys.exec_prefix = {str(tmp_path)!r}
import mpicoll as mc
try:
    mc.new_group()
except mc.errors.MpicollError as error:
    print("said:", error)
"""
    ended = job(0, alone, preamble="", env={"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    said = ended.output.partition("said:")[2]
    assert "pip install 'mpicoll[mpich]'" in said and "module" in said, ended.output


def test_one_rank_without_a_launcher(job):
    script = """
with mc.new_group(timeout=10) as pg:
    x = np.arange(5.0)
    pg.allreduce(x).wait()
    report(size=pg.size(), x=x.tolist(), objects=pg.allgather_object("a"))
"""
    ended = job(0, script)
    assert ended["size"] == [1] and ended["x"] == [[0, 1, 2, 3, 4]] and ended["objects"] == [["a"]]


def test_pretended_nodes(job):
    """Groups of nodes, and of one rank per node, none of which is shut down."""
    script = """
pg = mc.new_group(timeout=20)
local, across = pg.local_group(), pg.cross_node_group()
x = np.array([RANK])
local.allreduce(x).wait()
report(local=list(local.ranks), across=list(across.ranks), sum=int(x[0]))
"""
    ended = job(4, script, env={"MPICOLL_NODES": "2"})
    assert ended["local"] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert ended["across"] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert ended["sum"] == [1, 1, 5, 5]


def test_results_are_reported_in_full():
    """The harness itself: a rank that reports nothing is seen."""
    from tests.harness import launch

    ended = launch(2, "if RANK:\n    report(x=1)", preamble=PREAMBLE.replace("import mpicoll", "#"))
    assert ended.ranks[0] is None and ended.ranks[1]["x"] == 1
