"""The benchmark: its results are right, and machines can read them.  Speed is not asserted."""

import json
import sys

import pytest

from tests.harness import environment, mpiexec, run_bounded


@pytest.mark.parametrize("ranks", [2, 3])
def test_bench(ranks):
    argv = [*mpiexec(ranks), sys.executable, "-m", "mpicoll", "bench", "--json"]
    ended = run_bounded([*argv, "--sizes", "4,4000,3000000"], 60, environment({}))
    assert ended.code == 0, ended.output
    rows = json.loads(ended.output.splitlines()[-1])
    assert len({row["kind"] for row in rows}) == 6 and len(rows) == 18
    assert all(row["min_us"] <= row["median_us"] <= row["p99_us"] for row in rows)
