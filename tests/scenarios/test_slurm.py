"""Under a real SLURM of two nodes: launchers right and wrong, failures, and the batch scripts.

What is said of SLURM elsewhere, in `docs/slurm.md` and `docs/clusters.md`, is held here too.
"""

from __future__ import annotations

import ast
import contextlib
import glob
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import ROOT, SHARED, installed_mpi, left_in_shared
from tests.slurm import NODES, PMI, PMIX, PMIX_PLUGIN, Slurm

VENDOR = {"mpich": "MPICH", "openmpi": "Open MPI"}
SCRIPTS = ROOT / "scripts" / "slurm"
SOON = 12.0  # seconds in which a job that fails must have ended

PROGRAM = """
import os, socket, sys, time
import numpy as np
import mpicoll as mc

try:
    pg = mc.new_group(timeout=20)
except mc.TransportError as error:
    print("refused:", error, flush=True)
    sys.exit(3)
x = np.full(70_001, pg.rank() + 1.0)
pg.allreduce(x).wait()
assert (x == pg.size() * (pg.size() + 1) / 2).all()
rank = np.array([pg.rank()])
if pg.rank():
    pg.send(rank, 0).wait()
else:
    sources = [pg.recv_anysource(np.empty_like(rank), timeout=10) for _ in range(1, pg.size())]
    mc.wait_all(sources)
    assert sorted(work.source_rank() for work in sources) == [*range(1, pg.size())]
with pg.local_group() as local:
    seen = pg.gather_object((socket.gethostname(), local.ranks), 0)
if pg.rank() == 0:
    print("seen:", seen, flush=True)
"""
FAILS = (
    PROGRAM
    + """
pg.barrier().wait()  # what rank 3 owes the others of the calls before, it does in here
if pg.rank() == 3:
    if sys.argv[1] == "raise":
        raise ValueError("rank 3 can't go on")
    if sys.argv[1] == "kill":
        time.sleep(0.5)  # until srun has what rank 0 printed
        os.kill(os.getpid(), 9)
    time.sleep(60)
pg.allreduce(x, timeout=2 if sys.argv[1] == "late" else 20).wait()
"""
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if installed_mpi() == "openmpi":
        need_pmix()
    before = set(os.listdir(SHARED))
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(Slurm())
        except OSError as error:
            pytest.skip(f"there is no SLURM: {error}")
        yield made
        assert not [name for name in made.shared_memory() if name.startswith("mpicoll-")]
    assert not made.leftovers()
    assert not made.folder.exists() and str(made.folder) not in Path("/proc/mounts").read_text()
    assert not [name for name in left_in_shared(before) if name.startswith("mpicoll-")]


def need_pmix() -> None:
    for file in (PMIX_PLUGIN, PMIX):
        if not glob.glob(file):
            pytest.skip(f"srun --mpi=pmix needs {file}")


@pytest.fixture
def program(tmp_path) -> list[str]:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return [sys.executable, str(path)]


def well(ended):
    assert not ended.timed_out and not ended.leftovers, ended.output
    assert ended.code == 0, ended.output
    return ended.output


def badly(ended):
    assert not ended.timed_out and not ended.leftovers, ended.output
    assert ended.code != 0 and ended.seconds < SOON, (ended.code, ended.seconds, ended.output)
    return ended.output


def seen(output):
    """What the ranks of the program say of where they are: (host, ranks on it), by rank."""
    lines = [line for line in output.splitlines() if line.startswith("seen: ")]
    assert len(lines) == 1, output
    (line,) = lines
    return ast.literal_eval(line.removeprefix("seen: "))


TWO_BY_TWO = [("n1", [0, 1]), ("n1", [0, 1]), ("n2", [2, 3]), ("n2", [2, 3])]


# ----------------------------------------------------------------------------- who starts the ranks


def test_srun(slurm, program):
    assert seen(well(slurm.srun(program))) == TWO_BY_TWO


def test_mpiexec_in_an_allocation(slurm, program):
    assert seen(well(slurm.mpiexec(program))) == TWO_BY_TWO


def test_nodes_of_different_sizes(slurm, program):
    ended = slurm.srun(program, each=2, options=["--ntasks=3", "--distribution=block"])
    hosts = [host for host, _ in seen(well(ended))]
    assert sorted(map(hosts.count, NODES)) == [1, 2]


WRONG = {"mpich": ["none", "pmix"], "openmpi": ["none", "pmi2"]}[installed_mpi()]


@pytest.mark.parametrize("mpi", WRONG)
def test_the_wrong_mpi_of_srun(slurm, program, tmp_path, mpi):
    """It is refused with the remedy, unless single ranks are meant; MPICH can't be, under PMIx."""
    if mpi == "pmix":
        need_pmix()
    name = "srun without PMI" if mpi == "none" else f"srun --mpi={mpi}"
    remedy = f"srun --mpi={PMI[installed_mpi()]}"
    said = badly(slurm.srun(program, each=1, mpi=mpi))
    if mpi == "pmix":
        assert f"MPICH can't be initialized under {name}" in said
    else:
        assert f"{name} started 2 ranks" in said and "2 worlds of one rank" in said
        meant = slurm.srun(program, each=1, mpi=mpi, env={"MPICOLL_SINGLE": "1"})
        assert sorted(re.findall("seen: (.*)", well(meant))) == ["[('n1', [0])]", "[('n2', [0])]"]
    assert remedy in said
    examined(slurm, tmp_path, each=1, mpi=mpi).has("wrong", "launcher", name, remedy)


def test_the_other_mpis_mpiexec(slurm, program):
    """On one node too, where hydra's only proxy is a step of one task."""
    other = Path(sys.prefix).parent / ".venv" / "bin" / "mpiexec"
    if installed_mpi() == "mpich" or not other.exists():
        pytest.skip("only Open MPI's ranks can be initialized under the other's mpiexec, if there")
    for nodes in (1, 2):
        said = badly(slurm.mpiexec(program, launcher=other, nodes=nodes))
        assert f"mpiexec (hydra) started {2 * nodes} ranks" in said


def test_one_task(slurm, program):
    """It is meant to be one: under any --mpi, in a batch script, in the shell of `salloc`."""
    one = [("n1", [0])]
    assert seen(well(slurm.srun(program, nodes=1, each=1, mpi="none"))) == one
    assert seen(well(slurm.srun(program, nodes=1, each=1))) == one
    shell = ["salloc", "-Q", "--nodes=2", "srun", "--interactive"]  # as many sites have it
    assert seen(well(slurm.run([*shell, *program]))) == one
    script = batch(slurm, "one", f"#SBATCH --nodes=2 --ntasks-per-node=2\n{shlex.join(program)}")
    ended = slurm.ended(slurm.submit(script))
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert seen(ended.output) == one


def batch(slurm, name, text):
    path = slurm.folder / f"{name}.sbatch"
    path.write_text(f"#!/bin/bash\n{text}\n")
    return path


# --------------------------------------------------------------------- several jobs, and more ranks

JOINS = """
import sys
import numpy as np
import mpicoll as mc

name, folder = sys.argv[1:]
with mc.new_group(timeout=20, group_name=name) as pg:
    try:
        merged = pg.merge_remote_group(mc.FileStore(folder), 3, timeout=15)
    except mc.UnsupportedError as error:
        sys.exit(f"refused: {error}")
    x = np.full(70_001, merged.rank() + 1.0)
    merged.allreduce(x).wait()
    assert (x == 6).all()
    with merged.local_group() as local:
        seen = merged.gather_object((name, [*range(local.size())]), 0)
    if merged.rank() == 0:
        print("seen:", seen, flush=True)
    merged.shutdown()
"""


def test_two_steps_of_one_allocation(slurm, tmp_path):
    """They merge by way of a folder; Open MPI's are refused, with what works."""
    path = tmp_path / "joins.py"
    path.write_text(JOINS)
    steps = [
        f"srun -Q --mpi={PMI[installed_mpi()]} --nodes=1 --ntasks={tasks} --nodelist={node} "
        f"--exact {sys.executable} {path} {name} {tmp_path}/store & {name}=$!"
        for name, node, tasks in [("b", "n1", 2), ("a", "n2", 1)]
    ]
    both = "\n".join([*steps, "wait $a && wait $b"])
    size = ["--nodes=2", "--ntasks-per-node=2"]
    ended = slurm.run(["salloc", "-Q", *size, "bash", "-c", both], 40)
    if installed_mpi() == "openmpi":
        said = badly(ended)
        assert said.count("refused: merge_remote_group: these jobs can't be connected") == 3
        assert "pg.spawn" in said and "use MPICH" in said
    else:
        assert seen(well(ended)) == [("a", [0]), ("b", [0, 1]), ("b", [0, 1])]


SPAWNS = """
import sys
import numpy as np
import mpicoll as mc

with mc.new_group(timeout=20) as pg:
    try:
        grown = pg.spawn([sys.executable, sys.argv[1]], 1, timeout=20)
    except mc.UnsupportedError as error:
        sys.exit(f"refused: {error}")
    assert grown.broadcast_object("welcome", 0)
    grown.shutdown()
"""
SPAWNED = """
import mpicoll as mc
with mc.parent_group(timeout=20) as grown:
    print(grown.broadcast_object(None, 0), "on rank", grown.rank(), flush=True)
"""


def test_more_ranks(slurm, tmp_path):
    """They are started under mpiexec in an allocation; srun starts none, which is said at once."""
    spawns, spawned = tmp_path / "spawns.py", tmp_path / "spawned.py"
    spawns.write_text(SPAWNS)
    spawned.write_text(SPAWNED)
    program = [sys.executable, str(spawns), str(spawned)]
    said = badly(slurm.srun(program, each=1))
    assert (
        said.count(f"refused: spawn: srun --mpi={PMI[installed_mpi()]} starts no more ranks") == 2
    )
    # One rank less than the allocation has room for.
    assert "welcome on rank 3" in well(slurm.mpiexec(program, ranks=3))


# --------------------------------------------------------------------------------------- the doctor

DOCTOR = [sys.executable, "-m", "mpicoll", "doctor", "--json"]


class Report:
    """What doctor printed as JSON."""

    def __init__(self, output):
        (line,) = [line for line in output.splitlines() if line.startswith('{"mpicoll"')]
        self.findings = json.loads(line)["findings"]

    def has(self, verdict, topic, words, remedy=""):
        assert any(
            (found["verdict"], found["topic"]) == (verdict, topic)
            and words in found["said"]
            and remedy in found["remedy"]
            for found in self.findings
        ), f"no {verdict}, {topic}, {words!r}, {remedy!r} in {self.findings}"


def examined(slurm, folder, **options):
    """Run doctor under srun; into files, since srun puts words of its own inside long lines."""
    files = {name: folder / f"doctor.{name}" for name in ("output", "error")}
    to = [f"--{name}={file}" for name, file in files.items()]
    ended = slurm.srun(DOCTOR, options=to, **options)
    assert not ended.timed_out and not ended.leftovers, ended.output
    report = Report(files["output"].read_text())
    wrong = any(found["verdict"] == "wrong" for found in report.findings)
    assert ended.code == int(wrong), ended.output
    return report


def test_doctor_under_srun(slurm, tmp_path):
    report = examined(slurm, tmp_path)
    report.has("ok", "launcher", f"srun --mpi={PMI[installed_mpi()]}, 4 ranks")
    report.has("ok", "ranks", "4 of 4: 2 on n1, 2 on n2")
    report.has("ok", "SLURM", "on 2 nodes, step 0")


def test_doctor_in_a_batch_script(slurm):
    """Without srun it says what to put before the command; under mpiexec there all is well."""
    lines = ["#SBATCH --nodes=2 --ntasks-per-node=2", shlex.join(DOCTOR)]
    ended = slurm.ended(slurm.submit(batch(slurm, "doctor", "\n".join(lines))))
    assert ended.code == 0, ended.output
    report = Report(ended.output)
    report.has("warning", "launcher", "one process in an allocation of 4 tasks", "srun -n 4 --mpi=")
    report.has("ok", "SLURM", "on 2 nodes")
    script = SCRIPTS / "mpiexec.sbatch"
    ended = slurm.ended(slurm.submit(script, "-m", "mpicoll", "doctor", "--json"))
    assert ended.code == 0, ended.output
    report = Report(ended.output)
    name = {"mpich": "hydra", "openmpi": "Open MPI"}[installed_mpi()]
    report.has("ok", "launcher", f"mpiexec ({name}), 4 ranks")
    report.has("ok", "ranks", "4 of 4: 2 on n1, 2 on n2")


# ----------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("how", ["raise", "late"])
def test_a_rank_that_fails(slurm, tmp_path, how):
    """Under plain srun, where bare mpi4py hangs, the step ends in seconds."""
    path = tmp_path / "fails.py"
    path.write_text(FAILS)
    env = {"MPICOLL_GRACE": "0.5"} if how == "late" else {}
    said = badly(slurm.srun([sys.executable, str(path), how], env=env))
    assert seen(said) == TWO_BY_TWO
    if how == "raise":
        assert "ValueError: rank 3 can't go on" in said and "fails.py" in said
        assert "RemoteRankError: rank 3 raised" in said
    else:
        assert "CollectiveTimeoutError" in said and "ranks [3] have not arrived" in said


# -------------------------------------------------------------------------------------- the scripts


def test_script_of_which_a_task_is_killed(slurm, tmp_path):
    """By -K the step ends at once, and the job has failed."""
    path = tmp_path / "fails.py"
    path.write_text(FAILS)
    start = time.monotonic()
    ended = slurm.ended(slurm.submit(SCRIPTS / "srun.sbatch", str(path), "kill"))
    assert time.monotonic() - start < SOON
    assert ended.state == "FAILED" and ended.code != 0, ended
    assert seen(ended.output) == TWO_BY_TWO


@pytest.mark.parametrize("name, gpus", [("gpu-one-task-per-gpu", "0,1"), ("gpu-shared", "0")])
def test_script_for_gpus(slurm, tmp_path, name, gpus):
    """The devices are stand-ins: what each task may see is tested, and that all ranks meet."""
    path = tmp_path / "program.py"
    path.write_text(PROGRAM + "print('GPUs', os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n")
    ended = slurm.ended(slurm.submit(SCRIPTS / f"{name}.sbatch", str(path)))
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert seen(ended.output) == TWO_BY_TWO
    assert re.findall("GPUs (.*)", ended.output) == [gpus] * 4


def test_script_for_torch(slurm, tmp_path):
    """Its example, over two nodes; and each rank of a program uses the cores of its task."""
    for name in ("torch", "sklearn"):
        pytest.importorskip(name, reason=f"{name} is not installed (extra: torch)")
    one = ["--cpus-per-task=1"]  # the nodes are one machine, with few cores
    ended = slurm.ended(slurm.submit(SCRIPTS / "torch.sbatch", options=one), 60)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert "2 ranks: " in ended.output and "correct: True" in ended.output
    path = tmp_path / "threads.py"
    path.write_text(THREADS)
    ended = slurm.ended(slurm.submit(SCRIPTS / "torch.sbatch", str(path)), 60)
    assert (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    found = sorted(re.findall("rank . of . on n. with . threads", ended.output))
    assert found == [f"rank {k} of 2 on n{k + 1} with 2 threads" for k in range(2)], ended.output


THREADS = """
import socket
import torch
import torch.distributed as dist
import mpicoll.torch

dist.init_process_group("mpicoll")
x = torch.ones(70_001)
dist.all_reduce(x)
assert (x == dist.get_world_size()).all()
rank, size, host = dist.get_rank(), dist.get_world_size(), socket.gethostname()
print(f"rank {rank} of {size} on {host} with {torch.get_num_threads()} threads", flush=True)
dist.destroy_process_group()
"""


def test_script_that_requeues(slurm, tmp_path):
    """Stopped in the middle, as at its time limit, the job goes on and gets the same result."""
    checkpoint = tmp_path / "resume.npz"
    program = ["examples/resume.py", f"--checkpoint={checkpoint}", "--pause=0.02"]
    job = slurm.submit(SCRIPTS / "requeue.sbatch", *program)
    end = time.monotonic() + 20
    while not checkpoint.exists():
        assert time.monotonic() < end, slurm.output(job)
        time.sleep(0.02)
    slurm.signal_script(job, "USR1")
    slurm.hasten(job)
    ended = slurm.ended(job)
    assert (ended.state, ended.code, ended.restarts) == ("COMPLETED", 0, 1), ended.output
    assert f"start 1 of job {job}\n" in ended.output and f"start 2 of job {job}\n" in ended.output
    assert re.search(r"going on after step (20|40|60)\n", ended.output), ended.output
    assert "correct: one process alone" in ended.output


def test_the_five_commands(slurm, tmp_path):
    """The docs' last two, as they stand, in an environment such as the first three make."""
    text = (ROOT / "docs" / "clusters.md").read_text().partition("```shell\n")[2]
    load, venv, install, doctor, submit = text.partition("```")[0].splitlines()
    assert load.startswith("module load") and "activate" in venv and install == "pip install ."
    if installed_mpi() == "mpich":  # as the text says
        doctor = doctor.replace("--mpi=pmix", "--mpi=pmi2")
    command, *words = shlex.split(doctor)
    said = well(slurm.run([command, *words]))
    assert "4 of 4: 2 on n1, 2 on n2" in said and "0 wrong" in said
    command, script = shlex.split(submit)
    ended = slurm.ended(slurm.submit(ROOT / script))
    assert command == "sbatch" and (ended.state, ended.code) == ("COMPLETED", 0), ended.output
    assert ended.output.count("correct: ") == 1
