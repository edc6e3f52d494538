"""`python -m mpicoll demo`, as `scripts/demo` starts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.harness import environment, mpiexec, run_bounded

pytest.importorskip("sklearn", reason="the demo needs scikit-learn")
pytest.importorskip("matplotlib", reason="the demo needs matplotlib")

DEMO = [sys.executable, "-m", "mpicoll", "demo"]


def test_demo(tmp_path: Path) -> None:
    picture = tmp_path / "new" / "demo.png"
    ended = run_bounded([*mpiexec(3), *DEMO, "--out", str(picture)], 90, environment())
    assert ended.code == 0 and not ended.timed_out, ended.output
    assert "agree with NumPy on all 3 ranks" in ended.output
    assert "WRONG" not in ended.output
    assert "time    of a call in which each rank hands in so many bytes" in ended.output
    assert "  The same: the losses differ by" in ended.output
    assert str(picture) in ended.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "\r" not in ended.output, "no progress bar where there is no terminal"


WRONG_SUM = """
import sys

import mpicoll
from mpicoll import cli

real = mpicoll.ProcessGroup.allreduce

def wrong(self, tensor, *args, **kwargs):
    if self.rank() == 1 and tensor.size > 100:  # spares the demo's own bookkeeping
        tensor[0] += 1  # in the gradient: the weight of a pixel that is always white
    return real(self, tensor, *args, **kwargs)

mpicoll.ProcessGroup.allreduce = wrong
sys.exit(cli.main(["demo", "--progress", "always", "--out", sys.argv[1]]))
"""


def test_demo_notices_wrong_results(tmp_path: Path) -> None:
    """A demo that can't fail shows nothing: spoil one element on one rank."""
    script = tmp_path / "wrong.py"
    script.write_text(WRONG_SUM)
    argv = [*mpiexec(2), sys.executable, str(script), str(tmp_path / "demo.png")]
    ended = run_bounded(argv, 90, environment())
    assert ended.code != 0 and not ended.timed_out, ended.output
    assert "WRONG" in ended.output
    assert "NOT THE SAME" in ended.output
    assert ended.output.count("] epoch 7 of 40") == 1, "the progress bar is rank 0's alone"


def test_help_needs_no_mpi() -> None:
    env = environment({"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    for argv in (["--help"], ["demo", "--help"], ["--version"]):
        ended = run_bounded([sys.executable, "-m", "mpicoll", *argv], 30, env)
        assert ended.code == 0, ended.output
