"""What launchers leave in the environment, as the real ones were seen to do, and what it means."""

from __future__ import annotations

import math
import re

import pytest

from mpicoll.errors import InvalidCallError
from mpicoll.runtime import settings
from mpicoll.runtime.launcher import (
    abortive,
    apart,
    remedy,
    serves,
    singleton,
    spawnless,
    worldless,
)
from mpicoll.runtime.settings import Launcher, daemon, launchers, local_rank
from tests.harness import ROOT

HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "9", "MPI_LOCALNRANKS": "4"}
PRTE = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-h-1@1",
}
STEP = {
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
}
PMI2 = STEP | {"PMI_RANK": "1", "PMI_SIZE": "4", "PMI_FD": "9"}
PMIX = STEP | {"PMIX_RANK": "1", "PMIX_NAMESPACE": "slurm.pmix.9.0"}
BATCH = {"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
PROXIES = STEP | {"SLURM_STEP_NUM_TASKS": "2"}  # one task per node, each starts that node's ranks
PROXY = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
SHELL = PROXY | {"SLURM_STEP_ID": "4294967290"}  # of salloc, in the interactive step


@pytest.mark.parametrize(
    "environ, names, ranks",
    [
        ({}, [], []),
        ({"HOME": "/"}, [], []),
        (BATCH, [], []),
        (HYDRA, ["mpiexec (hydra)"], [4]),
        (PRTE, ["mpiexec (Open MPI)"], [4]),
        (STEP, ["srun without PMI"], [4]),
        (PMI2, ["srun --mpi=pmi2"], [4]),
        (PMIX, ["srun --mpi=pmix"], [4]),
        (BATCH | HYDRA, ["mpiexec (hydra)"], [4]),
        (PROXIES | HYDRA, ["mpiexec (hydra)"], [4]),
        (PROXIES | PRTE, ["mpiexec (Open MPI)"], [4]),
        (PROXY | HYDRA, ["mpiexec (hydra)"], [4]),
        (STEP | HYDRA, ["mpiexec (hydra)", "srun without PMI"], [4, 4]),
        (SHELL, [], []),
        (SHELL | PRTE, ["mpiexec (Open MPI)"], [4]),
        ({"PMI_SIZE": "many", "PMI_RANK": "0"}, [], []),
        (TORCHRUN, ["torchrun"], [2]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}, [], []),
        (HYDRA | TORCHRUN, ["mpiexec (hydra)", "torchrun"], [4, 2]),
        (TORCHRUN | HYDRA | {"MPICOLL_WORLD": "torchrun"}, ["torchrun"], [4]),
        (STEP | HYDRA | {"MPICOLL_WORLD": "join_world"}, ["join_world"], [4]),
    ],
)
def test_who_started_this(environ, names, ranks):
    found = launchers(environ)
    assert [launcher.name for launcher in found] == names
    assert [launcher.ranks for launcher in found] == ranks
    assert all(launcher.rank == 1 for launcher in found)


@pytest.mark.parametrize(
    "environ, vendor, world, refused",
    [
        (HYDRA, "MPICH", 4, False),
        (HYDRA, "Open MPI", 1, True),
        (HYDRA | {"PMI_SIZE": "1"}, "Open MPI", 1, False),
        (STEP, "MPICH", 1, True),
        (PMI2, "Open MPI", 1, True),
        (PMIX, "Open MPI", 4, False),
        (BATCH, "Open MPI", 1, False),
        ({}, "MPICH", 1, False),
        # mpiexec -n 1 in an allocation of two nodes, by way of srun.
        (PROXIES | HYDRA | {"PMI_SIZE": "1"}, "MPICH", 1, False),
        (PROXIES | HYDRA, "Open MPI", 1, True),
        (PROXY | HYDRA, "Open MPI", 1, True),  # in an allocation of one node
        (SHELL, "MPICH", 1, False),
        # srun starts tasks of which each is a job of its own.
        (STEP | HYDRA | {"PMI_SIZE": "1"}, "MPICH", 1, False),
    ],
)
def test_a_world_of_one_that_was_not_meant(environ, vendor, world, refused):
    why = singleton(world, vendor, launchers(environ))
    assert bool(why) == refused
    if refused:
        assert vendor in why and "4 ranks" in why


@pytest.mark.parametrize("environ", [PRTE, PMIX])
def test_only_mpich_ends_the_job_under_what_speaks_pmix(environ):
    assert "MPICH can't be initialized" in abortive("MPICH", launchers(environ))
    assert not abortive("Open MPI", launchers(environ))
    assert not abortive("MPICH", launchers(HYDRA)) and not abortive("MPICH", ())


def test_the_remedy_names_the_mpiexec_beside_the_library(tmp_path):
    file, beside = tmp_path / "lib" / "libmpi.so.12", tmp_path / "bin" / "mpiexec"
    assert str(beside) not in remedy("MPICH", str(file))
    beside.parent.mkdir()
    beside.touch()
    assert str(beside) in remedy("MPICH", str(file)) and "pmi2" in remedy("MPICH", str(file))
    assert "pmix" in remedy("Open MPI", "")


def test_hydra_serves_mpichs_kin():
    hydra = Launcher("mpiexec (hydra)", "MPICH", 0, 2)
    assert serves(hydra, "Intel MPI") and serves(hydra, "MPICH") and not serves(hydra, "Open MPI")


@pytest.mark.parametrize(
    "environ, name",
    [
        (PRTE, "prterun-h-1"),
        (PRTE | {"PMIX_NAMESPACE": "prterun-h-1@2"}, "prterun-h-1"),
        (PRTE | {"PMIX_NAMESPACE": "prterun-h-1"}, ""),
        (PMIX, ""),
        (HYDRA, ""),
    ],
)
def test_the_daemon_of_open_mpis_launcher(environ, name):
    assert daemon(environ) == name


@pytest.mark.parametrize(
    "libraries, daemons, words",
    [
        (["MPICH 5.0.2", "MPICH 5.0.2"], ["", ""], ""),
        (["MPICH 5.0.2", "MPICH 4.3.0"], ["", ""], "differ (MPICH 4.3.0, MPICH 5.0.2)"),
        (["MPICH 5.0.2", "Open MPI 5.0.11"], ["", "prterun-h-1"], "differ"),
        (["Open MPI 5.0.11"] * 2, ["prterun-h-1", "prterun-h-1"], ""),
        (["Open MPI 5.0.11"] * 2, ["prterun-h-1", "prterun-h-2"], "from 2 launchers"),
        (["Open MPI 5.0.11"] * 2, ["", ""], "pg.spawn"),  # two steps of srun
        (["Intel MPI 2021.18.0"] * 2, ["", ""], "Intel MPI 2021.18.0 is not known"),
    ],
)
def test_which_jobs_can_be_connected(libraries, daemons, words):
    why = apart(libraries, daemons)
    assert words in why and bool(why) == bool(words)


@pytest.mark.parametrize(
    "environ, vendor, words",
    [
        (HYDRA, "MPICH", ""),
        (PROXIES | HYDRA, "MPICH", ""),
        (PRTE, "Open MPI", ""),
        (PROXIES | PRTE, "Open MPI", ""),
        (PMI2, "MPICH", "srun --mpi=pmi2 starts no more ranks"),
        (PMIX, "Open MPI", "srun --mpi=pmix starts no more ranks"),
        (BATCH, "MPICH", "no launcher"),
        ({}, "Open MPI", "no launcher"),
        (HYDRA, "Intel MPI", "not known"),
    ],
)
def test_where_more_ranks_can_be_started(environ, vendor, words):
    why = spawnless(vendor, launchers(environ), spawned=False)
    assert words in why and bool(why) == bool(words)


@pytest.mark.parametrize(
    "environ, rank",
    [({}, None), ({"MPI_LOCALRANKID": "3"}, 3), (STEP, 1), (BATCH, None), (SHELL, None)],
)
def test_the_number_on_the_node(environ, rank):
    assert local_rank(environ) == rank


@pytest.mark.parametrize(
    "environ, ranks",
    [
        ({"MPI_LOCALNRANKS": "4", "SLURM_GTIDS": "0", "SLURM_STEP_NUM_TASKS": "2"}, 4),
        ({"SLURM_GTIDS": "4,5,6", "SLURM_STEP_NUM_TASKS": "7"}, 3),
        ({"SLURM_GTIDS": "0"}, None),  # a batch script, and what it starts without srun
    ],
)
def test_the_ranks_on_the_node(monkeypatch, environ, ranks):
    for name in ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert settings.ranks_on_node() == ranks


@pytest.mark.parametrize("text, meant", [("1", True), ("0", False), ("", False)])
def test_single(monkeypatch, text, meant):
    monkeypatch.setenv("MPICOLL_SINGLE", text)
    assert settings.single() is meant
    monkeypatch.setenv("MPICOLL_SINGLE", "yes")
    with pytest.raises(InvalidCallError, match="MPICOLL_SINGLE must be 0 or 1, but is 'yes'"):
        settings.single()


@pytest.mark.parametrize("text, meant", [("1", True), ("0", False), (None, True)])
def test_native(monkeypatch, text, meant):
    if text is not None:
        monkeypatch.setenv("MPICOLL_NATIVE", text)
    assert settings.native_wanted() is meant
    monkeypatch.setenv("MPICOLL_NATIVE", "")
    with pytest.raises(InvalidCallError, match="MPICOLL_NATIVE must be 0 or 1, but is ''"):
        settings.native_wanted()


@pytest.mark.parametrize("text, seconds", [(None, 60), ("0.5", 0.5), ("0", math.inf)])
def test_warn_after(monkeypatch, text, seconds):
    if text is not None:
        monkeypatch.setenv("MPICOLL_WARN_AFTER", text)
    assert settings.warn_after() == seconds
    monkeypatch.setenv("MPICOLL_WARN_AFTER", "-1")
    with pytest.raises(InvalidCallError, match="MPICOLL_WARN_AFTER must be a number of seconds"):
        settings.warn_after()


def test_every_variable_that_is_read_is_known():
    read = set(
        re.findall(
            r'environ[^\n]*"(MPICOLL_\w+)"', (ROOT / "mpicoll/runtime/settings.py").read_text()
        )
    )
    assert read == set(settings.SETTINGS)


def test_every_variable_stands_in_the_table():
    rows = re.findall(r"^\| `(MPICOLL_\w+)` \|", (ROOT / "docs/api/settings.md").read_text(), re.M)
    assert rows == sorted(settings.SETTINGS)


def test_under_torchrun_alone_nothing_can_be_spawned():
    why = spawnless("MPICH", launchers(TORCHRUN), spawned=False)
    assert why.startswith("no launcher started this program")
    assert not spawnless("MPICH", launchers(HYDRA | TORCHRUN), spawned=False)
    assert "srun" in spawnless("MPICH", launchers(STEP), spawned=False)


def test_who_can_form_a_world_without_a_launcher():
    assert not worldless("MPICH", "torchrun", 4) and not worldless("Intel MPI", "torchrun", 4)
    why = worldless("Open MPI", "torchrun", 4)
    assert why.startswith("torchrun started 4 ranks, and Open MPI knows only those of its own")
    assert "mpiexec -n 4 python -m mpicoll run PROGRAM" in why


def test_a_place_is_written_over_one_that_was_inherited(monkeypatch):
    for name, value in (PMI2 | PRTE | {"PMI_PORT": "a:1", "OMPI_MCA_btl": "self"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MPICOLL_WORLD", "")  # so that it is put back
    settings.take_place("torchrun", 3, 8, 77, (1, 4))
    found = settings.environment()
    assert [found[name] for name in ("PMI_RANK", "PMI_SIZE", "PMI_FD")] == ["3", "8", "77"]
    assert not {"PMI_PORT", "PMIX_RANK", "OMPI_COMM_WORLD_RANK"} & found.keys()
    assert found["OMPI_MCA_btl"] == "self" and found["SLURM_JOB_ID"] == "9"
    assert launchers(found) == (Launcher("torchrun", "MPICH", 3, 8),)
    assert settings.local_rank(found) == 1 and settings.ranks_on_node() == 4
    for name in ("PMI_RANK", "PMI_SIZE", "PMI_FD", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"):
        monkeypatch.delenv(name)


def test_a_child_has_no_place(monkeypatch):
    place = TORCHRUN | {"MASTER_ADDR": "n1", "MASTER_PORT": "1", "GROUP_RANK": "0"}
    for name, value in (place | {"MPICOLL_WORLD": "torchrun", "CUDA_VISIBLE_DEVICES": "1"}).items():
        monkeypatch.setenv(name, value)
    found = settings.child_environment()
    assert not found.keys() & {*place, "MPICOLL_WORLD"} and found["CUDA_VISIBLE_DEVICES"] == "1"
