"""Groups across separately launched jobs, and groups that grow: real launchers, real deaths."""

from __future__ import annotations

import json
import signal
import socket
import sys
from pathlib import Path

import pytest

from tests.harness import (
    PREAMBLE,
    Job,
    Launched,
    environment,
    installed_mpi,
    launch_together,
    mpiexec,
    run_bounded,
)
from tests.soak import soak

connects = pytest.mark.skipif(
    installed_mpi() == "openmpi", reason="Open MPI connects no separate runs: it is refused"
)

# What every job begins with: JOB, SIZE, FOLDER; `merge` merges, and `works` tries the outcome.
HEAD = """
from mpicoll.cli.trials import disagreeing
pg = mc.new_group(timeout=20, group_name=JOB)
def store():
    return mc.FileStore(FOLDER)
def merge(group=None, **options):
    return (group or pg).merge_remote_group(store(), SIZE, **{"timeout": 15, **options})
def works(group):
    total = np.full(3, 1.0)
    group.allreduce(total).wait()
    return bool((total == group.size()).all())
def fails(call):
    start = time.monotonic()
    try:
        call()
    except MpicollError as error:
        report(error=type(error).__name__, text=str(error), took=time.monotonic() - start)
    else:
        report(error="none")
"""


def program(name: str, size: int, folder: Path, script: str) -> str:
    return f"JOB, SIZE, FOLDER = {name!r}, {size}, {str(folder)!r}\n" + HEAD + script


def launched(name: str, n: int, size: int, folder: Path, script: str, after: float = 0.0) -> Job:
    return Job(n, program(name, size, folder, script), after, {"MPICOLL_GRACE": "0.5"})


def run(*jobs: Job, timeout: float = 30.0, fail: str = "") -> list[Launched]:
    """Run jobs together; those with a 1 in `fail` must fail, the others end well; none may hang."""
    together = launch_together(jobs, timeout)
    for place, ended in enumerate(together):
        assert not ended.timed_out, f"job {place} hung:\n{ended.output}"
        assert not ended.leftovers, f"job {place} left {ended.leftovers} behind:\n{ended.output}"
        assert (ended.code != 0) == (fail[place : place + 1] == "1"), (
            f"job {place} ended with {ended.code}:\n{ended.output}"
        )
    return together


def everyone(together: list[Launched], key: str) -> list[object]:
    return [value for ended in together for value in ended[key]]


ALL = """
merged = merge()
bad = disagreeing(merged, 1000)
order = merged.allgather_object((JOB, pg.rank()))
report(bad=bad, order=order, rank=merged.rank(), ranks=merged.ranks, transport=merged.name())
halves = merged.split(merged.rank() % 2)
again = merge(halves)  # of groups that have members of several jobs
fine = works(halves) and works(again)
for group in (again, halves, merged):
    group.shutdown()
more = merge()
report(fine=fine and works(more))
more.shutdown()
report(own=works(pg))
"""


@connects
@pytest.mark.parametrize("late", [0, 1])
def test_two_jobs_share_a_folder(tmp_path, late):
    """Every collective; split, merged and shut down again; whoever comes first."""
    jobs = [("a", 1), ("b", 2)]
    ended = run(
        *(
            launched(name, n, 3, tmp_path / "s", ALL, after=0.4 * (place == late))
            for place, (name, n) in enumerate(jobs)
        )
    )
    assert everyone(ended, "bad") == [[], [], []]
    assert everyone(ended, "order") == [[["a", 0], ["b", 0], ["b", 1]]] * 3
    assert everyone(ended, "ranks") == [[0, -1, -1], [-1, 0, 1], [-1, 0, 1]]
    assert everyone(ended, "transport") == ["shm"] * 3
    assert everyone(ended, "fine") == everyone(ended, "own") == [True] * 3


@connects
@pytest.mark.parametrize(
    "after", soak([(0, 0.3, 0.6), (0.6, 0, 0.3), (0.3, 0.6, 0)], [(0.4, 0.2, 0)])
)
def test_three_jobs_come_in_any_order(tmp_path, after):
    jobs = [("a", 2), ("b", 1), ("c", 1)]
    ended = run(
        *(
            launched(name, n, 4, tmp_path / "s", ALL, after=wait)
            for (name, n), wait in zip(jobs, after, strict=True)
        )
    )
    assert everyone(ended, "bad") == [[]] * 4
    assert everyone(ended, "order") == [[["a", 0], ["a", 1], ["b", 0], ["c", 0]]] * 4
    assert everyone(ended, "fine") == everyone(ended, "own") == [True] * 4


@connects
def test_two_jobs_share_an_address(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    script = f"""
def store():
    if pg.rank() == 0:
        return mc.TCPStore("127.0.0.1", {port}, 2, JOB == "b", timeout=15, secret="open sesame")
there = store()
merged = pg.merge_remote_group(there, SIZE, timeout=15)
report(order=merged.allgather_object(JOB), fine=works(merged) and works(pg))
merged.shutdown()
"""
    ended = run(
        launched("a", 2, 3, tmp_path, script), launched("b", 1, 3, tmp_path, script, after=0.3)
    )
    assert everyone(ended, "order") == [["a", "a", "b"]] * 3
    assert everyone(ended, "fine") == [True] * 3


@connects
def test_one_job_brings_two_groups_and_another_one(tmp_path):
    """Those of one job stay together, by lowest rank; the name of a job's first group counts."""
    two = "merged = merge(pg.split_group([0, 2] if pg.rank() != 1 else [1], group_name='x'))\n"
    tell = "report(order=merged.allgather_object((JOB, pg.rank())), fine=works(merged))\n"
    ended = run(
        launched("a", 3, 4, tmp_path / "s", two + tell),
        launched("m", 1, 4, tmp_path / "s", "merged = merge()\n" + tell),
    )
    assert everyone(ended, "order") == [[["m", 0], ["a", 0], ["a", 2], ["a", 1]]] * 4
    assert everyone(ended, "fine") == [True] * 4


@connects
def test_a_job_ends_while_the_other_goes_on(tmp_path):
    """Splits, which block inside MPI, are no worse off for the end of processes elsewhere."""
    script = """
merged = merge()
merged.barrier().wait()
merged.shutdown()
if JOB == "b":
    until = time.monotonic() + 1.5
    while pg.broadcast_object(time.monotonic() < until, 0):
        pg.split(0).shutdown()
    report(fine=works(pg))
"""
    first, second = run(*(launched(name, 2, 4, tmp_path / "s", script) for name in "ab"))
    assert second["fine"] == [True, True] and second.at - first.at > 1


def test_jobs_that_one_job_has_started_merge_on_every_library(job, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        leave = "from mpi4py import MPI; MPI.Comm.Get_parent().Disconnect()\n"
        reporting = (
            f"{leave}import os; os.environ['MPICOLL_TEST_RESULT'] = {str(tmp_path / name)!r}\n"
        )
        script = reporting + PREAMBLE + program(name, 3, tmp_path / "s", ALL)
        (tmp_path / f"{name}.py").write_text(script)
    job(
        1,
        f"""
from mpi4py import MPI
for name, n in (("a", 1), ("b", 2)):
    MPI.COMM_SELF.Spawn(sys.executable, [f"{tmp_path}/{{name}}.py"], n).Disconnect()
""",
        preamble="import sys\n",
    )
    for file in ("a/0.json", "b/0.json", "b/1.json"):
        told = json.loads((tmp_path / file).read_text())
        assert told["bad"] == [] and told["order"] == [["a", 0], ["b", 0], ["b", 1]]
        assert told["fine"] and told["own"] and told["transport"] == "shm"


# ---- what goes wrong ----


def test_a_job_that_never_comes_is_a_timeout(tmp_path):
    script = "fails(lambda: merge(timeout=1))\nreport(own=works(pg))"
    (ended,) = run(launched("a", 2, 3, tmp_path / "s", script))
    assert ended["error"] == ["CollectiveTimeoutError"] * 2 and ended["own"] == [True, True]
    assert all("not all of 3 ranks" in text and "'a' of 2" in text for text in ended["text"])
    assert all(1 <= took < 1.5 for took in ended["took"])


WRONG = {
    "sizes": ("SIZE += JOB == 'b'", "'b' of 1 (size=3)"),
    "backends": (
        "pg = mc.new_group('mpi' if JOB == 'b' else 'auto', timeout=20)",
        "backend='mpi'",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_groups_that_do_not_go_together_are_refused(tmp_path, what):
    change, words = WRONG[what]
    script = f"{change}\nfails(merge)\nreport(own=works(pg))"
    ended = run(*(launched(name, 1, 2, tmp_path / "s", script) for name in "ab"))
    assert everyone(ended, "error") == ["InvalidCallError"] * 2
    assert all(words in text for text in everyone(ended, "text"))
    assert everyone(ended, "own") == [True] * 2


@pytest.mark.skipif(installed_mpi() == "mpich", reason="MPICH connects separate runs")
def test_separate_runs_under_open_mpi_are_refused_at_once(tmp_path):
    script = "fails(lambda: merge(timeout=10))\nreport(own=works(pg))"
    ended = run(
        launched("a", 1, 3, tmp_path / "s", script), launched("b", 2, 3, tmp_path / "s", script)
    )
    assert everyone(ended, "error") == ["UnsupportedError"] * 3
    assert max(map(float, everyone(ended, "took"))) < 3
    for text in everyone(ended, "text"):
        assert all(way in text for way in ("one job", "pg.spawn", "MPICH")), text
    assert everyone(ended, "own") == [True] * 3


# Where a job is killed: when it says this, or before it makes this call of MPI's.
STAGES = {
    "b, when the groups have met": ("b", "__init__", ""),
    "a, with its port published": ("a", "_say", "1/offer"),
    "b, about to connect": ("b", "_say", "1/coming"),
    "a, when the groups have met": ("a", "__init__", ""),
    "a, about to accept": ("a", "_say", "1/accepting"),
    "b, connecting": ("b", "Connect", ""),
}
KILLED = """
from mpicoll.groups import merge as merging
def die(*arguments, **options):
    report(died=time.monotonic())
    os.kill(os.getpid(), 9)
def killed_in(stage, key):
    if stage == "Connect":
        merging._take_in = die
        return
    real = getattr(merging._Talk, stage)
    def until_then(talk, *arguments):
        real(talk, *arguments)
        if not key or arguments[0] == key:
            die()
    setattr(merging._Talk, stage, until_then)
"""


@connects
@pytest.mark.parametrize("stage", soak([*STAGES], [*STAGES][3:]))
def test_a_job_that_dies_is_a_timeout_that_names_it_and_leaves_nothing_in_the_way(tmp_path, stage):
    """The next run finds what the dead one left in the folder, and merges all the same."""
    who, what, key = STAGES[stage]
    again = "merged = merge()\nreport(fine=works(merged))\nmerged.shutdown()\n"
    script = f"""
if JOB == {who!r}:
    killed_in({what!r}, {key!r})
fails(lambda: merge(timeout=2))
report(own=works(pg))
{again}"""
    jobs = [
        launched(name, n, 3, tmp_path / "s", KILLED + script) for name, n in (("a", 1), ("b", 2))
    ]
    jobs.append(launched(who, 1 + (who == "b"), 3, tmp_path / "s", again, after=1.2))
    ended = run(*jobs, fail="10" if who == "a" else "01")
    survivor = ended[who == "a"]
    assert set(survivor["error"]) == {"CollectiveTimeoutError"}, survivor.output
    assert all(f"group {who!r}" in text for text in survivor["text"]), survivor["text"]
    assert all(took < 3.5 for took in survivor["took"]), survivor["took"]
    assert all(survivor["own"]) and all(survivor["fine"])


ENDS = {
    "raises": ("raise ValueError('boom')", "RemoteRankError", "boom"),
    "is killed": (f"os.kill(os.getpid(), {signal.SIGKILL})", "RankFailedError", "rank"),
}


@connects
@pytest.mark.parametrize("end", ENDS)
def test_a_rank_of_the_other_job_that_fails_is_an_error_here(tmp_path, end):
    """The job of which it was ends; the other hears of it in its next call, and has its own."""
    program, error, words = ENDS[end]
    script = f"""
merged = merge()
merged.barrier().wait()
if JOB == "b":
    if pg.rank() == 1:
        time.sleep(0.3)
        {program}
    time.sleep(60)
fails(lambda: merged.barrier().wait())
shrunk = merged.shrink_group([2, 3], timeout=5)
report(shrunk=works(shrunk) and shrunk.ranks)
shrunk.shutdown()
for _ in range(3):
    own = works(pg)
    pg.split(0).shutdown()
    time.sleep(0.3)
report(own=own)
"""
    first, _ = run(*(launched(name, 2, 4, tmp_path / "s", script) for name in "ab"), fail="11")
    assert set(first["error"]) <= {error, "RankFailedError"}, first.output
    assert any(words in text for text in first["text"]) and all(t < 2 for t in first["took"])
    assert first["shrunk"] == [[0, 1]] * 2 and first["own"] == [True, True]


# ---- growing ----

WORKER = """
import sys, time
import mpicoll as mc
from mpicoll.cli.trials import disagreeing
pg = mc.parent_group(timeout=15)
bad = disagreeing(pg, 1000)
own = mc.new_group(timeout=15)
total = own.allgather_object(own.rank())
try:
    mc.parent_group()
    again = "no error"
except mc.InvalidCallError as error:
    again = str(error)
pg.gather_object({"bad": bad, "own": total, "again": again, "ranks": pg.ranks}, 0)
pg.shutdown()
"""


def worker(folder: Path, script: str) -> str:
    """Return the argv, as Python, of a program of this script."""
    path = folder / "worker.py"
    path.write_text(script)
    return f"[sys.executable, {str(path)!r}]"


def test_a_group_grows(job, tmp_path):
    script = f"""
from mpicoll.cli.trials import disagreeing
pg = mc.new_group(timeout=20)
merged = pg.spawn({worker(tmp_path, WORKER)}, 2)
bad = disagreeing(merged, 1000)
told = merged.gather_object({{"bad": bad}}, 0)
merged.shutdown()
x = np.ones(3)
pg.allreduce(x).wait()
report(told=told, ranks=merged.ranks, name=merged.name(), total=x[0])
"""
    ended = job(2, script)
    assert ended["ranks"] == [[0, 1, -1, -1]] * 2 and ended["name"] == ["shm"] * 2
    assert ended["total"] == [2.0, 2.0]
    told = ended["told"][0]
    assert [rank["bad"] for rank in told] == [[]] * 4
    for rank in told[2:]:
        assert rank["own"] == [0, 1] and rank["ranks"] == [-1, -1, 0, 1]
        assert "called before" in rank["again"]


SPAWN = """
pg = mc.new_group(timeout=20)
start = time.monotonic()
try:
    pg.spawn(ARGV, N, timeout=2)
except MpicollError as error:
    report(error=type(error).__name__, text=str(error), took=time.monotonic() - start)
x = np.ones(3)
pg.allreduce(x).wait()
report(total=x[0])
"""


@pytest.mark.parametrize("comes", ["never", "too late"])
def test_ranks_that_are_started_and_do_not_come_in_time(job, tmp_path, comes):
    """They end by themselves, whether or not they look for a group that gave them up."""
    given_up, said = tmp_path / "given up", [tmp_path / "0", tmp_path / "1"]
    late = f"""
import os, time
import mpicoll as mc
own = mc.new_group(timeout=15)
while not os.path.exists({str(given_up)!r}):
    time.sleep(0.05)
if {comes == "too late"}:
    try:
        mc.parent_group(timeout=10)
    except mc.CollectiveTimeoutError as error:
        with open({str(tmp_path)!r} + f"/{{own.rank()}}", "w") as file:
            file.write(str(error))
"""
    rest = f"""
open({str(given_up)!r}, "w").close()
until = time.monotonic() + 15
def wanting():
    told = all(map(os.path.exists, {[*map(str, said)]}))
    return {comes == "too late"} and not told and time.monotonic() < until
while pg.broadcast_object(wanting(), 0):
    time.sleep(0.05)
"""
    ended = job(2, f"ARGV, N = {worker(tmp_path, late)}, 2\n{SPAWN}{rest}")
    assert ended["error"] == ["CollectiveTimeoutError"] * 2 and ended["total"] == [2.0, 2.0]
    assert all("parent_group in time" in text for text in ended["text"])
    assert all(2 <= took < 8 for took in ended["took"]), ended["took"]
    if comes == "too late":
        assert all("gave up in spawn" in path.read_text() for path in said)


def test_a_program_that_never_initializes_mpi_ends_the_job(job, tmp_path):
    """MPI's call does not return, and nothing can be known of the program."""
    ended = job(2, f"ARGV, N = {worker(tmp_path, 'pass')}, 1\n{SPAWN}", fails=True)
    assert "must initialize MPI, never returned" in ended.output
    assert ended.seconds < 10


REFUSED = {
    "no such program": ("['/no/such/program'], 1", "InvalidCallError", "'/no/such/program'"),
    "no argv": ("[], 1", "InvalidCallError", "argv must be a list of str"),
    "a string": ("'worker.py', 1", "InvalidCallError", "argv must be a list of str"),
    "none to start": ("[sys.executable], 0", "InvalidCallError", "n must be at least 1"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_spawns_that_can_not_be_are_refused_before(job, what):
    given, error, words = REFUSED[what]
    ended = job(2, f"ARGV, N = {given}\n{SPAWN}")
    assert ended["error"][0] == error and words in ended["text"][0]
    assert ended["error"][1] in (error, "CollectiveMismatchError")
    assert words in ended["text"][1] and ended["total"] == [2.0, 2.0]


@pytest.mark.parametrize("launcher", ["none", "srun"])
def test_spawn_is_refused_where_the_launcher_can_not(job, launcher):
    """Started by hand in what srun leaves in the environment."""
    step = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    script = f"ARGV, N = [sys.executable], 1\n{SPAWN}"
    ended = job(0, script, env=step if launcher == "srun" else {})
    assert ended["error"] == ["UnsupportedError"] and ended["total"] == [1.0]
    assert "mpiexec" in ended["text"][0] and (launcher == "none" or "srun" in ended["text"][0])


def test_without_parents_there_is_no_parent_group(job):
    script = """
try:
    mc.parent_group(timeout=5)
except InvalidCallError as error:
    report(text=str(error))
"""
    assert all("pg.spawn(" in text for text in job(2, script)["text"])


@pytest.mark.skipif(installed_mpi() == "mpich", reason="MPICH's launcher counts no slots")
def test_a_launcher_without_room_says_so(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(f"{PREAMBLE}ARGV, N = {worker(tmp_path, 'pass')}, 1\n{SPAWN}")
    argv = [word for word in mpiexec(2, ["--host", "localhost:2"]) if word != "--oversubscribe"]
    ended = run_bounded(
        [*argv, sys.executable, str(path)],
        30,
        environment({"MPICOLL_TEST_RESULT": str(tmp_path)}),
    )
    assert not ended.timed_out and not ended.leftovers, ended.output
    for rank in range(2):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["error"] == "UnsupportedError" and told["total"] == 2.0
        assert "2 slots" in told["text"] and "--oversubscribe" in told["text"]
