"""Every example, as a user starts it; each checks its own result and says so from rank 0."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, Ended, environment, mpiexec, run_bounded

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
NEEDS = {
    "ddp.py": ("torch", "sklearn"),
    "dist2_script.py": ("torch",),
    "fsdp.py": ("torch",),
    "kmeans.py": ("sklearn",),
}


def need(name: str) -> None:
    for module in NEEDS.get(name, ()):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{name} needs {module}, which is not installed")


def check(ended: Ended) -> None:
    assert ended.code == 0 and not ended.timed_out, ended.output
    assert not ended.leftovers
    verdicts = [line for line in ended.output.splitlines() if "correct:" in line.lower()]
    assert len(verdicts) == 1, f"rank 0, and no other, says that it is correct:\n{ended.output}"


def kept(name: str) -> str:
    """What a page shows of a program's output, below the command."""
    return (ROOT / "docs" / "examples" / f"{name}.txt").read_text().partition("\n")[2]


def steady(output: str) -> str:
    """An output without what rounding makes of it."""
    return re.sub(r"\d[\d.]*e[+-]\d+", "rounding", output)


RUNS = [(name, ranks) for name in EXAMPLES for ranks in (2, 3)]
SLOW = [
    ("ddp.py", 3),
    ("dist2_script.py", 3),
    ("fsdp.py", 3),
]  # PyTorch takes seconds to load


@pytest.mark.parametrize("name, ranks", [run for run in RUNS if run not in SLOW])
def test_example(name: str, ranks: int) -> None:
    need(name)
    ended = run_bounded([*mpiexec(ranks), sys.executable, f"examples/{name}"], 60, environment())
    check(ended)
    if ranks == 2:
        shown = kept(Path(name).stem)
        assert steady(ended.output) == steady(shown), "python -m scripts.examples writes it anew"


def test_dist2_script_is_one(tmp_path: Path) -> None:
    """With its original import line the script runs under torchrun: nothing else was changed."""
    need("dist2_script.py")
    ours = (ROOT / "examples" / "dist2_script.py").read_text()
    line = "import mpicoll as dist2\n"
    assert ours.count("mpicoll as") == ours.count("\n" + line) == 1
    original = ours.replace(line, "import torch.distributed._dist2 as dist2\n")
    script = tmp_path / "original.py"
    script.write_text(original)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    check(run_bounded([*torchrun, str(script)], 90, environment()))
