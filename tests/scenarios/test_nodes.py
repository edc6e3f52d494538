"""Pretended nodes, where a group breaks."""

import pytest

from tests.harness import installed_mpi, launch
from tests.soak import soak

SCRIPT = """
pg = mc.new_group(timeout=20, checks="node")
pg.barrier().wait()
try:
    for _ in range(3):
        op = mc.ReduceOp.MAX if RANK == 3 else mc.ReduceOp.SUM
        pg.allreduce(np.ones(1000), op).wait()
except MpicollError as error:
    report(kind=type(error).__name__, text=str(error))
"""


def test_a_mismatch_inside_a_node_is_heard_on_the_other_with_checks_on_the_node():
    """The node that differs knows who differed; the other one learns that it left the group."""
    job = launch(4, SCRIPT, env={"MPICOLL_NODES": "2"})
    # (It may end well or not: the other node may have begun the next call in MPI, or not yet.)
    assert not job.timed_out and not job.leftovers, job.output
    assert job["kind"] == ["RemoteRankError"] * 2 + ["CollectiveMismatchError"] * 2
    assert all("rank 2" in text or "rank 3" in text for text in job["text"]), job["text"]


NETWORKS = ["ucx", "ofi"] if installed_mpi() == "mpich" else [""]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("at_once", [1, 3])
def test_messages_that_came_before_a_receive_from_any_source_are_there(network, at_once):
    """MPICH itself loses them where some ranks share memory and others don't."""
    script = f"""
pg = mc.new_group(timeout=10)
got = []
for step in range(5):
    sends = [pg.send(np.full(3, RANK + 10 * step), dst) for dst in range(4) if dst != RANK]
    time.sleep(0.05)
    for _ in range(3 // {at_once}):
        arrays = [np.empty(3, dtype=int) for _ in range({at_once})]
        works = [pg.recv(x) for x in arrays]
        mc.wait_all(works)
        got += [int(x[0]) == w.source_rank() + 10 * step for x, w in zip(arrays, works)]
    mc.wait_all(sends)
    pg.barrier().wait()
report(got=got)
"""
    hosts = ["-launcher", "fork", "-hosts", "a:2,b:2"] if network else []
    job = launch(4, script, options=hosts, env={"MPIR_CVAR_CH4_NETMOD": network})
    assert job.code == 0 and not job.timed_out and not job.leftovers, job.output
    assert job["got"] == [[True] * 15] * 4


@pytest.mark.parametrize("absent", [0, 5])
@pytest.mark.parametrize("turn", range(soak(5, 1)))
def test_all_ranks_of_many_name_the_one_that_did_not_come(absent, turn):
    """With far more ranks than cores: who answers late is not missing."""
    ranks, nodes = soak((64, 16), (12, 4))
    script = f"""
pg = mc.new_group(timeout=200)
pg.barrier().wait()
if RANK == {absent}:
    time.sleep({soak(10, 4)})
    sys.exit()
try:
    pg.allreduce(np.ones(3), timeout=1).wait()
except CollectiveTimeoutError as error:
    report(missing=error.missing, text=str(error))
time.sleep({soak(8, 2)})
"""
    job = launch(ranks, script, soak(120, 40), env={"MPICOLL_NODES": str(nodes)})
    assert not job.timed_out and not job.leftovers, job.output
    told = [rank for rank in job.ranks if rank is not None]
    assert [rank["missing"] for rank in told] == [[absent]] * (ranks - 1), job.output
    assert all(f"ranks [{absent}] have not arrived" in rank["text"] for rank in told)


def test_of_many_that_are_missing_a_few_are_described():
    script = """
pg = mc.new_group(timeout=200)
pg.barrier().wait()
if RANK:
    time.sleep(4)
    sys.exit()
try:
    pg.allreduce(np.ones(3), timeout=1).wait()
except CollectiveTimeoutError as error:
    report(missing=error.missing, text=str(error))
"""
    job = launch(12, script, 40, env={"MPICOLL_NODES": "4"})
    told = job.ranks[0]
    assert told and told["missing"] == list(range(1, 12)), (told, job.output)
    assert "ranks [1, 2, 3, 4, 5, 6, 7, 8] and 3 more have not arrived" in told["text"]
    assert told["text"].count("gave no answer") == 8
