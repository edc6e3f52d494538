"""Hosts with names, addresses and shared memory of their own, and what becomes of a cut link.

Every collective is right across them, the nodes are found, and a host that can't be reached any
more, or crashes, is an error on both sides and the end of all processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import PREAMBLE, RESULT, installed_mpi
from tests.hosts import NAMES, Hosts

THREE = (*NAMES, "gamma")
ENDS = 6.0  # seconds from the last error until all ranks have ended, at most
GRACE = 0.5  # seconds that those who failed give those who don't know of it

START = """
import faulthandler
faulthandler.dump_traceback_later(12, exit=True)
from mpi4py import MPI
faulthandler.cancel_dump_traceback_later()
report(up=True)
"""


class Job:
    """A script on several hosts, and what its ranks report.

    Args:
        ranks: of each host.
    """

    def __init__(self, hosts, folder, ranks, script):
        self.hosts, self.folder, self.ranks, self.script = hosts, folder, ranks, script

    def run(self, meanwhile=lambda: None):
        """Run it, with `meanwhile` beside it; it must end by itself and leave nothing behind."""
        path = self.folder / "script.py"
        path.write_text(PREAMBLE + START + textwrap.dedent(self.script))
        env = {RESULT: str(self.folder), "MPICOLL_GRACE": str(GRACE)}
        with ThreadPoolExecutor(1) as pool:
            beside = pool.submit(meanwhile)
            # On several hosts all ranks of MPICH have been seen to hang in MPI_Init: one more try.
            for _ in range(2):
                ended = self.hosts.run(self.ranks, [sys.executable, str(path)], 60, env)
                if any(self.told("up")):
                    break
                print(f"no rank has got through MPI_Init:\n{ended.output}")
            error = beside.exception()
        assert error is None, f"{error}\n{ended.output}"
        assert not ended.timed_out and not ended.leftovers, ended.output
        for name in self.hosts.names:
            assert not self.hosts.processes(name), ended.output
            left = [f for f in self.hosts.shared_memory(name) if f.startswith("mpicoll-")]
            assert not left, f"{left} left on {name}"
        return ended

    def told(self, key):
        """Return what each rank has reported under a key; None, if it hasn't."""
        files = [self.folder / f"{rank}.json" for rank in range(sum(self.ranks))]
        return [json.loads(f.read_text()).get(key) if f.exists() else None for f in files]

    def wait(self, key, ranks=None):
        """Wait until these ranks, or all, have reported something under a key; return it."""
        until = time.monotonic() + 30
        while time.monotonic() < until:
            told = self.told(key)
            if None not in (told if ranks is None else [told[rank] for rank in ranks]):
                return told
            time.sleep(0.02)
        raise AssertionError(f"no rank's {key!r} in 30 s, but {told}")

    def wait_for_ends(self):
        """Wait until no rank's process is there any more."""
        until = time.monotonic() + ENDS
        pids = self.told("pid")
        while there := [rank for rank, pid in enumerate(pids) if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < until, f"ranks {there} still run {ENDS} s after their errors"
            time.sleep(0.02)


@pytest.fixture
def make(tmp_path):
    """Make a job on the first hosts, as many as there are numbers of ranks."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces takes root")
    with contextlib.ExitStack() as stack:

        def on(ranks, script):
            try:
                hosts = stack.enter_context(Hosts(tmp_path, THREE[: len(ranks)]))
            except OSError as error:
                pytest.skip(f"{len(ranks)} hosts can't be made: {error}")
            return Job(hosts, tmp_path, ranks, script)

        yield on


# ----------------------------------------------------------------------------- all is well

COLLECTIVES = """
import socket
from mpicoll.cli.trials import disagreeing
wrong, names = [], []
for checks in ("full", "node"):
    with mc.new_group(timeout=30, checks=checks) as pg:
        names.append(pg.name())
        for count in COUNTS if checks == "full" else COUNTS[:2]:
            wrong += [[checks, name, count] for name in disagreeing(pg, count)]
        crossed = pg.split_group([0, 2, 1, 3])
        names.append(crossed.name())
        x = np.full(100_003, RANK + 1.0)
        crossed.allreduce(x).wait()
        if (x != 10).any():
            wrong.append("an allreduce of ranks that alternate between the hosts")
        crossed.shutdown()
        local, across = pg.local_group(), pg.cross_node_group()
        report(local=local.ranks, across=across.ranks, transport=local.name())
        local.shutdown()
        across.shutdown()
report(wrong=wrong, names=names, host=socket.gethostname())
"""


@pytest.mark.parametrize(
    "ranks, counts",
    [([2, 2], (5, 40_000, 700_001)), ([2, 1, 1], (5, 40_000))],
    ids=["two hosts", "three hosts"],
)
def test_collectives(make, ranks, counts):
    job = make(ranks, COLLECTIVES.replace("COUNTS", repr(counts)))
    ended = job.run()
    assert ended.code == 0, ended.output
    assert job.told("host") == [name for name, n in zip(THREE, ranks) for _ in range(n)]
    assert job.told("wrong") == [[]] * 4
    assert all(set(names) == {"hierarchical"} for names in job.told("names"))
    two = len(ranks) == 2
    assert job.told("local") == [[0, 1], [0, 1], *([[2, 3], [2, 3]] if two else [[2], [3]])]
    stripes = [[0, 2], [1, 3]] if two else [[0, 2, 3], [1]]
    assert job.told("across") == [stripes[0], stripes[1], stripes[0], stripes[two]]
    assert job.told("transport") == ["shm"] * 4


def test_merged_groups(make, tmp_path):
    """Of groups on one host each, and of groups that span both."""
    script = f"""
    with mc.new_group(timeout=30) as world:
        for turn, lists in enumerate(([[0, 1], [2, 3]], [[0, 2], [1, 3]])):
            side = world.split_group(next(ranks for ranks in lists if RANK in ranks))
            store = mc.FileStore(f"{tmp_path}/store-{{turn}}")
            merged = side.merge_remote_group(store, 4, timeout=20)
            assert merged.ranks == sum(lists, [])
            assert merged.name() == "hierarchical"
            x = np.full(100_003, RANK + 1.0)
            merged.allreduce(x).wait()
            assert (x == 10).all()
            local, across = merged.local_group(), merged.cross_node_group()
            mpis = merged.comm.Split_type(MPI.COMM_TYPE_SHARED)
            report(**{{f"nodes{{turn}}": [local.ranks, across.ranks], "mpis": mpis.size}})
            mpis.Free()
            for group in (local, across, merged, side):
                group.shutdown()
    """
    job = make([2, 2], script)
    ended = job.run()
    assert ended.code == 0, ended.output
    for turn in range(2):
        local, across = zip(*job.told(f"nodes{turn}"))
        assert local == ([0, 1], [0, 1], [2, 3], [2, 3])
        assert across == ([0, 2], [1, 3], [0, 2], [1, 3])


def test_one_host_without_room_for_shared_memory(make):
    """All ranks go by MPI, those of the other host too."""
    script = """
    with mc.new_group(timeout=30) as pg:
        assert pg.name() == "hierarchical"
        if RANK == 2:
            room = os.statvfs("/dev/shm")
            with open("/dev/shm/filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_bsize - 500_000)
        pg.barrier().wait()
        with mc.new_group(timeout=30) as full:
            report(name=full.name())
            for group in (pg, full):
                x = np.full(100_003, RANK + 1.0)
                group.allreduce(x).wait()
                assert (x == 10).all()
    """
    job = make([2, 2], script)
    ended = job.run()
    assert ended.code == 0, ended.output
    assert job.told("name") == ["mpi"] * 4


# ----------------------------------------------------------------------------- a link is cut


def _forgets():
    """Whether the launcher may give 0 though ranks have failed, if it has lost a host as well."""
    return installed_mpi() == "openmpi"


CUT = """
pg = mc.new_group(timeout=20)
x = np.ones({count})
pg.barrier().wait()
report(pid=os.getpid())
try:
    while True:
        pg.allreduce(x, op=mc.ReduceOp.AVG, timeout=1).wait()
except MpicollError as error:
    report(first=[type(error).__name__, getattr(error, "missing", ()), str(error)])
    try:
        mc.new_group(timeout=0.5)
    except MpicollError as second:
        report(second=[type(second).__name__, getattr(second, "missing", ()), str(second)])
    raise
"""


def names_the_others(errors, there):
    """Check the errors of one side of the cut: who was late there is told by who was not."""
    timeouts = 0
    for kind, missing, text in errors:
        if kind == "RemoteRankError":
            assert "have not arrived" in text
        else:
            assert kind == "CollectiveTimeoutError" and there <= set(missing), text
            timeouts += 1
    assert timeouts


@pytest.mark.parametrize(
    "ranks, cut, count",
    [([2, 1], "beta", 1_000_000), ([2, 2], "beta", 5), ([1, 2, 1], "alpha", 5)],
    ids=["large", "small", "the launcher's host"],
)
def test_cut_for_good(make, ranks, cut, count):
    """All ranks end by themselves; where the launcher can't, it does when TCP has given up."""
    job = make(ranks, CUT.format(count=count))

    def meanwhile():
        job.wait("pid")
        time.sleep(0.2)
        job.hosts.cut(cut)
        job.wait("second")
        job.wait_for_ends()
        job.hosts.give_up()

    ended = job.run(meanwhile)
    hosts = [name for name, n in zip(THREE, ranks) for _ in range(n)]
    apart = {rank for rank, name in enumerate(hosts) if name == cut}
    for here in (apart, set(range(len(hosts))) - apart):
        there = set(range(len(hosts))) - here
        for which in ("first", "second"):
            errors = job.told(which)
            names_the_others([errors[rank] for rank in here], there)
    assert ended.code != 0 or _forgets(), ended.output


def test_cut_and_healed(make, tmp_path):
    """Inside the timeout: nothing but a call that takes longer."""
    script = f"""
    longest, stop = 0, np.zeros(1)
    with mc.new_group(timeout=30) as pg:
        pg.barrier().wait()
        report(pid=os.getpid())
        while not stop[0]:
            start = time.monotonic()
            for count in (5, 300_000):
                x = np.arange(count) * (RANK + 1.0)
                pg.allreduce(x).wait()
                assert (x == np.arange(count) * 6).all()
            stop[0] = os.path.exists("{tmp_path}/healed")
            pg.allreduce(stop, op=mc.ReduceOp.MAX).wait()
            longest = max(longest, time.monotonic() - start)
    report(longest=longest)
    """
    job = make([2, 1], script)

    def meanwhile():
        job.wait("pid")
        time.sleep(0.2)
        job.hosts.cut("beta")
        time.sleep(0.7)
        job.hosts.heal("beta")
        (tmp_path / "healed").touch()

    ended = job.run(meanwhile)
    assert ended.code == 0, ended.output
    assert min(job.told("longest")) > 0.6, "the link was not cut in the middle of a call"


def test_a_host_that_crashes(make):
    """What runs there is gone in a moment, and nobody is told."""
    script = """
    pg = mc.new_group(timeout=20)
    pg.barrier().wait()
    report(pid=os.getpid())
    if RANK == 3:
        time.sleep(60)
    try:
        pg.allreduce(np.ones(5), timeout=1).wait()
    except CollectiveTimeoutError as error:
        report(missing=error.missing)
        raise
    """
    job = make([2, 1, 1], script)

    def meanwhile():
        job.wait("pid")
        job.hosts.crash("gamma")
        job.wait("missing", range(3))
        job.wait_for_ends()
        job.hosts.give_up()

    ended = job.run(meanwhile)
    assert ended.code != 0 or _forgets(), ended.output
    assert job.told("missing") == [[3], [3], [3], None]
