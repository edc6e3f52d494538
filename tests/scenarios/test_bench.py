"""The benchmark: its results are right, and people and machines can read them.

Speed is not asserted.
"""

import json
import sys

import pytest

from tests.harness import environment, mpiexec, run_bounded


def bench(ranks, *options):
    argv = [*mpiexec(ranks), sys.executable, "-m", "mpicoll", "bench", "--budget", "0.02"]
    return run_bounded([*argv, *options], 60, environment({}))


@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_for_machines(ranks):
    ended = bench(ranks, "--json", "--sizes", "4,4000,3000000")
    assert ended.code == 0, ended.output
    rows = json.loads(ended.output.splitlines()[-1])
    assert len({row["kind"] for row in rows}) == 10 and len(rows) == 3 * 9 + 1
    assert all(row["min_us"] <= row["median_us"] <= row["p99_us"] for row in rows)
    assert all(0 < row["ratio_low"] <= row["ratio_high"] for row in rows)
    assert {row["too_noisy"] for row in rows} <= {True, False}


@pytest.mark.parametrize("ranks", [2, 3])
def test_messages_and_objects(ranks):
    kinds = ["pingpong", "exchange", "bandwidth", "broadcast_object", "allgather_object"]
    ended = bench(ranks, "--json", "--kinds", ",".join(kinds), "--sizes", "4,4000,3000000")
    assert ended.code == 0, ended.output
    rows = json.loads(ended.output.splitlines()[-1])
    assert [row["kind"] for row in rows] == [kind for kind in kinds for _ in range(3)]
    assert all(row["min_us"] <= row["median_us"] <= row["p99_us"] for row in rows)
    assert all(row["mpi4py_median_us"] > 0 for row in rows)


def test_messages_need_two_ranks():
    ended = bench(1, "--kinds", "pingpong")
    assert ended.code != 0 and "need two ranks" in ended.output


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes(dtype):
    ended = bench(2, "--json", "--dtype", dtype, "--sizes", "4000", "--kinds", "allreduce,scatter")
    assert ended.code == 0, ended.output
    assert [row["dtype"] for row in json.loads(ended.output.splitlines()[-1])] == [dtype] * 2


def test_table_picture_and_gloo(tmp_path):
    pytest.importorskip("torch")
    path = tmp_path / "curves.png"
    options = ("--sizes", "4,4096", "--kinds", "allreduce,broadcast", "--gloo", "--plot", str(path))
    ended = bench(2, *options)
    assert ended.code == 0, ended.output
    assert "gloo" in ended.output and "4 KiB" in ended.output
    assert path.read_bytes().startswith(b"\x89PNG")
