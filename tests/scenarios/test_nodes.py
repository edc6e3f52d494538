"""Pretended nodes, where a group breaks."""

import pytest

from tests.harness import installed_mpi, launch

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
