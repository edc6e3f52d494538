"""Commands that can't do what they were asked for: one sentence of rank 0, and status 2."""

import sys

import pytest

from tests.harness import environment, mpiexec, run_bounded

ASKED = {
    "bench --kinds foo": "--kinds: must be of allreduce",
    "bench --device foo": "device must be 'cpu', 'cuda' or 'cuda:N', but got 'foo'",
    "bench --sizes 4 --plot /proc/none/x.png": "--plot: '/proc/none/x.png' can't be written",
    "run /no/such/program.py": "there is no file '/no/such/program.py' to run",
}
ONE_LACKS = """
import os, sys
from mpicoll import cli
from mpicoll.cli import asked

if "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
    asked.find_spec = lambda name: None
sys.exit(cli.main(["bench", "--sizes", "4", "--gloo"]))
"""


def said_once(ended, text):
    assert ended.code == 2 and not ended.timed_out, ended.output
    assert "Traceback" not in ended.output
    said = [line for line in ended.output.splitlines() if line.startswith("python -m mpicoll")]
    assert len(said) == 1 and text in said[0], ended.output


@pytest.mark.parametrize("line", ASKED)
def test_one_sentence_for_all_ranks(line):
    argv = [*mpiexec(3), sys.executable, "-m", "mpicoll", *line.split()]
    said_once(run_bounded(argv, 30, environment()), ASKED[line])


def test_what_one_rank_lacks_all_refuse(tmp_path):
    pytest.importorskip("torch", reason="else rank 0 lacks it, too")
    script = tmp_path / "one_lacks.py"
    script.write_text(ONE_LACKS)
    ended = run_bounded([*mpiexec(3), sys.executable, str(script)], 30, environment())
    said_once(ended, "rank 1: --gloo needs torch")


def test_trace_under_mpiexec_is_rank_0s(tmp_path):
    argv = [*mpiexec(2), sys.executable, "-m", "mpicoll", "trace", str(tmp_path / "none")]
    said_once(run_bounded(argv, 30, environment()), "is not a folder")
