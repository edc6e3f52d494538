"""Processes that are no ranks, whatever their environment says; MPI that nobody initialized."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.harness import environment

CHILD = (
    "import mpicoll as mc; pg = mc.new_group(timeout=20); print(f'size {pg.size()}'); pg.shutdown()"
)


@pytest.mark.parametrize("with_remedy", [False, True], ids=["as it is", "with the remedy"])
def test_a_child_of_a_rank_is_told_whose_place_it_has(job, with_remedy):
    """MPICH would end it while it is initialized, and Open MPI would hang."""
    env = "mc.child_environment()" if with_remedy else "None"
    ended = job(
        2,
        f"""
import subprocess
pg = mc.new_group(timeout=20)
child = subprocess.run(
    [sys.executable, "-c", {CHILD!r}], env={env}, capture_output=True, text=True, timeout=40
)
report(code=child.returncode, said=child.stdout + child.stderr)
pg.barrier().wait()
pg.shutdown()
""",
    )
    for code, said in zip(ended["code"], ended["said"]):
        if with_remedy:
            assert code == 0 and "size 1" in said
        else:
            assert code == 1 and "env=mpicoll.child_environment()" in said


def test_ranks_that_a_rank_starts_with_mpiexec_are_ranks(job):
    """Their place in a job is their own: the new launcher gave it to them."""
    from tests.harness import mpiexec

    ended = job(
        1,
        f"""
import subprocess
pg = mc.new_group(timeout=20)
child = subprocess.run(
    {[*mpiexec(2), sys.executable, "-c", CHILD]!r},
    env=mc.child_environment() | {{"MPICOLL_RANK": os.environ["MPICOLL_RANK"]}},
    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=25,
)
report(code=child.returncode, said=child.stdout + child.stderr)
pg.shutdown()
""",
    )
    assert ended["code"] == [0] and ended["said"][0].count("size 2") == 2


def run(program: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=environment(extra),
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_torchrun_with_no_place_to_meet_makes_no_world():
    """As of a process that has inherited a part of its variables; torch may be missing, too."""
    said = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    ended = run(CHILD, **said)
    assert ended.returncode == 1
    assert "torchrun started 2 ranks" in ended.stderr and "mpiexec" in ended.stderr
    assert run(CHILD, **said, MPICOLL_SINGLE="1").stdout.strip() == "size 1"


def test_where_initializing_mpi_is_left_to_the_program():
    program = "import mpi4py; mpi4py.rc.initialize = False\n"
    ended = run(program + CHILD)
    assert ended.returncode == 1 and "MPI.Init_thread()" in ended.stderr
    ended = run(program + "from mpi4py import MPI; MPI.Init_thread()\n" + CHILD)
    assert ended.returncode == 0 and "size 1" in ended.stdout, ended.stderr
