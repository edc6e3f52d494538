"""What the trial of CUDA-aware MPI is started with, and how its end is read."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

from mpicoll.runtime.settings import child_environment
from mpicoll.transports.cuda import probe
from mpicoll.transports.cuda.probe import Trial, reading


def test_an_end_without_error_is_a_yes():
    assert reading(0, "") == ""


def test_a_crash_is_a_no():
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    code = subprocess.run([sys.executable, "-c", crash]).returncode
    assert "died of SIGSEGV" in reading(code, "== backtrace ==\n  0 memcpy\n")
    assert "died of SIGABRT" in reading(128 + signal.SIGABRT, "")


def test_the_last_line_says_why():
    assert reading(1, "Traceback ...\nImportError: no CuPy\n") == "ImportError: no CuPy"
    assert reading(3, "") == "the trial ended with exit code 3"


def test_a_gpu_that_another_process_has_for_itself():
    said = reading(
        1, "...\nCUDARuntimeError: cudaErrorDevicesUnavailable: CUDA-capable device(s) is"
    )
    assert "nvidia-smi -c DEFAULT" in said and "died" not in said


def test_a_trial_that_dies_leaves_no_core(monkeypatch, tmp_path):
    """The limit is set before anything that may die."""
    monkeypatch.chdir(tmp_path)
    program = probe._PROGRAM.partition("import cupy")[0]
    program += "print(resource.getrlimit(resource.RLIMIT_CORE))"
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said.strip() == "(0, 0)"


def test_a_real_trial_where_nothing_can_be_tried(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    trial, end = Trial(0), time.monotonic() + 30
    while (said := trial.outcome()) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert said and ("cupy" in said or "cuda" in said), said  # none is installed, or finds no GPU


CUPY = """
from numpy import arange, zeros

class Device:
    def __init__(self, number):
        self.number = number

    def use(self):
        print("uses", self.number)

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        print("uses", 0)

class cuda:
    Device = Device
"""


def test_a_trial_makes_no_context_on_another_gpu(tmp_path):
    """A device that is given back, as at the end of a with-block, would be GPU 0."""
    (tmp_path / "cupy.py").write_text(CUPY)
    environ = child_environment() | {"PYTHONPATH": str(tmp_path)}
    program = [sys.executable, "-c", probe._PROGRAM, "3"]
    said = subprocess.check_output(program, env=environ, text=True)
    assert said.split() == ["uses", "3"]


def test_a_trial_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(probe, "_PROGRAM", "import time; time.sleep(100)")
    monkeypatch.setattr(probe, "LIMIT", 0.2)
    trial, end = Trial(0), time.monotonic() + 10
    while (said := trial.outcome()) is None and time.monotonic() < end:
        time.sleep(0.01)
    assert said == "sending an array from GPU memory took more than 0.2 s"
    assert trial._child.poll() is not None


def test_its_process_is_no_rank(monkeypatch):
    marks = ("PMI_RANK", "PMIX_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    for name in (*marks, "OMPI_MCA_ess"):
        monkeypatch.setenv(name, "1")
    meant = {"OMPI_MCA_pml": "ob1", "OMPI_MCA_accelerator": "cuda", "OMPI_MCA_btl_base": "7"}
    for name, value in meant.items():
        monkeypatch.setenv(name, value)
    kept = child_environment()
    assert not {*marks, "OMPI_MCA_ess"} & {*kept} and meant.items() <= kept.items()
