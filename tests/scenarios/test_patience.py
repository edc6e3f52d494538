"""The line that says for whom a call waits, long before its deadline."""

from __future__ import annotations

import re
from itertools import pairwise

LATE = """
from mpi4py import MPI
pg = mc.new_group(timeout=20)
pair = pg.split(RANK // 2)  # on one node, and with the compiled core
by_mpi = mc.new_group("mpi", timeout=20, group_name="plain")
def late(seconds, ranks):
    MPI.COMM_WORLD.Barrier()
    if RANK in ranks:
        time.sleep(seconds)
late(1, [1])
pair.allreduce(np.ones(3)).wait()
late(0.5, [0, 1])
pg.allreduce(np.ones(70_001)).wait()
late(0.5, [2])
by_mpi.barrier().wait()
works = [pg.recv(np.ones(1), 0, tag=k) for k in range(9)] if RANK == 2 else []
late(0.5, [0])
for k in range(9 if RANK == 0 else 0):
    pg.send(np.ones(1), 2, tag=k).wait()
for work in works:
    work.wait()
late(0.5, [0])
if RANK < 2:
    pg.subgroup([0, 1])
late(0.5, [2])
pg.barrier(timeout=float("inf")).wait()
"""
LINE = re.compile(
    r"mpicoll: rank (\d) has waited (\S+) s in (.*) of group '(\S+)' \((.*):\d+\): (.*)"
)
SILENT = "gave no answer: it is busy outside mpicoll, stopped or dead"


def test_the_lowest_rank_that_waits_says_for_whom(job):
    """Again when it has waited for twice as long; never where somebody waits for ever."""
    ended = job(3, LATE, env={"MPICOLL_WARN_AFTER": "0.2", "MPICOLL_NODES": "2,1"})
    said = [LINE.fullmatch(line) for line in ended.output.splitlines()]
    assert all(said), ended.output
    found = {}
    for rank, waited, call, group, place, text in (line.groups() for line in said):
        found.setdefault((int(rank), f"{call} of {group}"), []).append((float(waited), text))
        assert place.endswith("script.py")
    # (On a busy machine others may have waited long enough, too.)
    small, large, plain, message, members = (
        found[who, call]
        for who, call in (
            (0, "allreduce(float64[3], op=SUM) (call #1) of world:split:0"),
            (2, "allreduce(float64[70001], op=SUM) (call #2) of world"),
            (0, "barrier() (call #1) of plain"),
            (2, "recv(float64[1], src=0, tag=0) of world"),
            (1, "subgroup() of world"),
        )
    )
    assert not [call for _, call in found if re.fullmatch(r"barrier\(\) .* of world", call)]
    times = [waited for waited, _ in small]
    assert 0.2 <= times[0] < 0.4 and len(times) >= 2
    assert all(1.8 * a <= b for a, b in pairwise(times)), times
    assert f"ranks [1] have not arrived; rank 1 {SILENT}" in small[0][1]
    assert f"ranks [0, 1] have not arrived; rank 0 {SILENT}" in large[0][1]
    assert f"ranks [2] have not arrived; rank 2 {SILENT}" in plain[0][1]
    assert message[0][1].startswith("no matching message has come; rank 0 has not answered")
    assert message[0][1].endswith("(and so 8 more messages)")
    assert members[0][1].startswith("not all members of the group that it makes have called it")
