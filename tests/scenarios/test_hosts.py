"""Two hosts with names, addresses and shared memory of their own: every collective is right."""

from __future__ import annotations

import json
import os
import sys
import textwrap

import pytest

from tests.harness import PREAMBLE, RESULT
from tests.hosts import NAMES, Hosts

SCRIPT = """
import socket
from mpicoll.cli.trials import TRIALS
wrong, names = [], []
for checks in ("full", "node"):
    with mc.new_group(timeout=30, checks=checks) as pg:
        names.append(pg.name())
        for count in (5, 40_000, 700_001):
            for name, make in TRIALS.items():
                trial = make(pg, count)
                trial.call()
                if not trial.agrees():
                    wrong.append([checks, name, count])
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


@pytest.fixture
def hosts(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("making network namespaces takes root")
    try:
        with Hosts(tmp_path) as made:
            yield made
    except OSError as error:
        pytest.skip(f"two hosts can't be made: {error}")


def test_two_hosts_of_two_ranks(hosts, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(PREAMBLE + textwrap.dedent(SCRIPT))
    ended = hosts.run([2, 2], [sys.executable, str(path)], 60, {RESULT: str(tmp_path)})
    assert ended.code == 0 and not ended.timed_out and not ended.leftovers, ended.output
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [rank["host"] for rank in told] == [NAMES[0]] * 2 + [NAMES[1]] * 2
    assert all(rank["wrong"] == [] for rank in told), told
    assert all(set(rank["names"]) == {"hierarchical"} for rank in told), told
    assert [rank["local"] for rank in told] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [rank["across"] for rank in told] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(rank["transport"] == "shm" for rank in told)
    for name in NAMES:
        assert not [f for f in hosts.shared_memory(name) if f.startswith("mpicoll-")]
