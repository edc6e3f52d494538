"""What goes on after a failure: deaths that the launcher survives, and groups made anew."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from tests.harness import ROOT, environment, installed_mpi, mpiexec, run_bounded
from tests.soak import soak

MPICH = installed_mpi() == "mpich"
ULFM = ("--with-ft", "ulfm")
NOTICED = 0.2  # seconds from a peer's death until those who wait have raised

only_mpich = pytest.mark.skipif(not MPICH, reason="Open MPI's launcher ends the job at once")
only_ulfm = pytest.mark.skipif(MPICH, reason="MPICH's launcher ends the job when a rank is killed")

over_each_backend = pytest.mark.parametrize("backend", ["auto", "mpi"], ids="over {}".format)

DEATH = """
pg = mc.new_group({backend!r}, timeout=60)
pg.barrier().wait()
if RANK == 1:
    time.sleep(0.3)
    report(cause=time.time())
    os._exit(0)
if RANK == 2:
    time.sleep({late})
start = time.monotonic()
try:
    pg.allreduce(np.ones(70_001)).wait()
except RankFailedError as error:
    report(rank=error.rank, took=time.monotonic() - start, text=str(error))
"""


@only_mpich
@over_each_backend
def test_a_death_is_noticed_while_waiting_and_by_who_comes_later(job, backend):
    """MPICH's launcher can be told to let the others live after an exit."""
    script = DEATH.format(backend=backend, late=1)
    ended = job(3, script, fails=True, options=["-disable-auto-cleanup"])
    waiting, dead, late = ended.ranks
    assert waiting and waiting["rank"] == 1, ended.output
    assert waiting["wall"] - dead["cause"] <= NOTICED, waiting
    assert late and late["rank"] == 1 and late["took"] <= NOTICED, ended.output
    assert "rank 1 of group 'world' died; ending the job" in ended.output
    assert ended.at - late["wall"] <= 5


@only_mpich
def test_who_is_gone_behind_its_part_of_shutdown_has_not_died(job):
    """MPI_Finalize need not keep it, and it has given all that the others want."""
    script = """
from mpicoll.runtime import agreement
from mpicoll.runtime.library import IDLE
pg = mc.new_group(timeout=20)
exchanged = agreement.exchanged
def slow(*arguments):
    steps = exchanged(*arguments)
    yield next(steps)
    end = time.monotonic() + (0 if RANK else 0.5)
    while time.monotonic() < end:
        yield IDLE
    return (yield from steps)
agreement.exchanged = slow
pg.shutdown()
report(fine=True)
os._exit(0)
"""
    ended = job(2, script, options=["-disable-auto-cleanup"])
    assert ended["fine"] == [True, True], ended.output


@only_mpich
def test_a_death_is_noticed_across_pid_namespaces(job):
    """Containers: a rank's pid means nothing to the others, but its lock does."""
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if (
        not shutil.which("unshare")
        or subprocess.run([*inside, "true"], capture_output=True).returncode
    ):
        pytest.skip("making pid namespaces takes unshare and root")
    # (Hydra signals those who are left, and unshare would die of it.)
    python = ["sh", "-c", 'trap "" USR1; exec "$@"', "sh", *inside, sys.executable]
    script = DEATH.format(backend="auto", late=0) + (
        "assert pg._caller.resources.shared.locked and os.getpid() == 1\n"
    )
    ended = job(3, script, fails=True, options=["-disable-auto-cleanup"], python=python)
    for told in (ended.ranks[0], ended.ranks[2]):
        assert told and told["rank"] == 1, ended.output
        assert told["wall"] - ended.ranks[1]["cause"] <= NOTICED, told


SURVIVE = """
pg = group = mc.new_group({backend!r}, timeout=20)
me, told = pg.rank(), []
for victim in {victims}:
    for step in range(30):
        x = np.full({size}, 1.0)
        if me == victim and step == 15:
            os.kill(os.getpid(), 9)
        start = time.monotonic()
        try:
            group.allreduce(x).wait()
        except RankFailedError as error:
            noticed, dead = time.monotonic(), group.ranks[error.rank]
            group = group.shrink_group(timeout=10)
            told.append([dead, noticed - start, time.monotonic() - noticed])
            break
    x = np.ones({size})
    group.allreduce(x).wait()
    part = group.split(group.rank() % 2)
    y = np.ones(3)
    part.allreduce(y).wait()
    objects = group.allgather_object(me)
    report(told=told, right=bool((x == group.size()).all() and (y == part.size()).all()),
           ranks=group.ranks, objects=objects)
"""

# Every victim of three, and deaths in a row, the coordinator's among them.
VICTIMS = [(3, [0]), (3, [1]), (3, [2]), (4, [0, 1]), (4, [3, 0]), (4, [1, 2])]
RECOVERIES = [
    (backend, n, victims, "1", repeat)
    for repeat in range(soak(5, 1))
    for backend in ("auto", "mpi")
    for n, victims in VICTIMS
] + [("auto", 4, victims, "2", 0) for victims in ([0], [3, 1])]


@only_ulfm
@pytest.mark.parametrize("backend, n, victims, nodes, repeat", RECOVERIES, ids=str)
def test_deaths_are_survived(job, backend, n, victims, nodes, repeat):
    script = SURVIVE.format(backend=backend, victims=victims, size=1000 if repeat % 2 else 300_001)
    env = {"MPICOLL_NODES": nodes}
    ended = job(n, script, options=ULFM, env=env)  # and it ends by itself, with exit code 0
    alive = [rank for rank in range(n) if rank not in victims]
    for rank in alive:
        told = ended.ranks[rank]
        assert told and told["right"], ended.output
        assert told["ranks"] == told["objects"] == alive
        assert [dead for dead, _, _ in told["told"]] == victims
        assert all(noticed <= NOTICED for _, noticed, _ in told["told"]), told


@only_ulfm
@pytest.mark.parametrize("dies", ["in shrink_group", "before it"])
def test_a_second_death_in_the_middle_of_the_recovery(job, dies):
    """The rank that decides, at that."""
    killed = {
        "in shrink_group": "threading.Timer(0.05, os.kill, [os.getpid(), 9]).start()",
        "before it": "os.kill(os.getpid(), 9)",
    }[dies]
    script = f"""
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 3:
    os.kill(os.getpid(), 9)
try:
    pg.allreduce(np.ones(70_001)).wait()
except RankFailedError:
    pass
if RANK == 0:
    {killed}
if RANK == 1:
    time.sleep(0.5)  # the others wait in shrink_group meanwhile
group = pg.shrink_group(timeout=10)
x = np.ones(70_001)
group.allreduce(x).wait()
report(ranks=group.ranks, total=x[-1])
"""
    ended = job(4, script, options=ULFM)
    for told in ended.ranks[1:3]:
        assert told and told["ranks"] == [1, 2] and told["total"] == 2, ended.output


@only_ulfm
def test_a_death_that_nobody_recovers_from_is_no_success(job):
    """The launcher itself would report 0."""
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 1:
    os.kill(os.getpid(), 9)
try:
    pg.allreduce(np.ones(70_001)).wait()
except RankFailedError as error:
    report(rank=error.rank)
"""
    ended = job(3, script, options=ULFM, fails=True)
    assert ended.ranks[0] and ended.ranks[0]["rank"] == 1


@only_ulfm
def test_survive_restores_from_its_checkpoint(tmp_path):
    checkpoint = tmp_path / "weights.npy"
    program = [sys.executable, str(ROOT / "examples" / "survive.py")]
    options = ["--kill", "1@25", "--kill", "0@60", "--checkpoint", str(checkpoint)]
    ended = run_bounded([*mpiexec(4, ULFM), *program, *options], 60, environment())
    assert ended.code == 0 and not ended.timed_out and not ended.leftovers, ended.output
    page = ROOT / "docs" / "examples" / "survive-deaths.txt"  # begins with the command
    assert ended.output == page.read_text().partition("\n")[2]
    assert not checkpoint.exists()


@only_mpich
def test_survive_goes_on_when_it_is_started_again(tmp_path):
    checkpoint = tmp_path / "weights.npy"
    program = [sys.executable, str(ROOT / "examples" / "survive.py")]
    options = ["--checkpoint", str(checkpoint)]
    killed = run_bounded([*mpiexec(2), *program, *options, "--kill", "1@25"], 60, environment())
    assert killed.code != 0 and not killed.timed_out and checkpoint.exists(), killed.output
    ended = run_bounded([*mpiexec(2), *program, *options], 60, environment())
    assert ended.code == 0 and "correct: 2 ranks" in ended.output, ended.output


# ---- all alive ----

LATE = """
pg = mc.new_group({backend!r}, timeout=20)
pg.barrier().wait()
if RANK == 2:
    time.sleep(1)
try:
    pg.allreduce(np.ones(70_001), timeout=20 if RANK == 2 else 0.5).wait()
except (CollectiveTimeoutError, RemoteRankError) as error:
    first = type(error).__name__
"""


@over_each_backend
def test_after_a_timeout_all_go_on_and_the_job_succeeds(job, backend):
    script = (
        LATE.format(backend=backend)
        + """
group = pg.shrink_group(timeout=10)
x = np.full(70_001, RANK + 1.0)
group.allreduce(x).wait()
parts = group.split(RANK % 2)
y = np.ones(3)
parts.allreduce(y).wait()
try:
    pg.barrier()
except GroupBrokenError:
    report(first=first, ranks=group.ranks, total=x[-1], part=y[0], name=group.group_name)
group.shutdown()
"""
    )
    ended = job(3, script)
    # Of two that wait equally long, the second may hear that the first has given up.
    *waited, came = ended["first"]
    assert "CollectiveTimeoutError" in waited and came == "RemoteRankError", ended["first"]
    assert ended["ranks"] == [[0, 1, 2]] * 3 and ended["total"] == [6.0] * 3
    assert ended["part"] == [2.0, 1.0, 2.0] and ended["name"] == ["world:shrink"] * 3


@over_each_backend
def test_a_rank_that_does_not_come_is_named_and_can_be_left_out(job, backend):
    script = f"""
pg = mc.new_group({backend!r}, timeout=20)
pg.barrier().wait()
if RANK == 1:
    time.sleep(3)
    try:
        pg.barrier().wait()
    except RemoteRankError as error:
        report(error=str(error))
    sys.exit()
errors, took = [], []
for timeout in (0.5, 0.7):
    start = time.monotonic()
    try:
        pg.shrink_group(timeout=timeout)
    except CollectiveTimeoutError as error:
        errors.append(list(error.missing))
        took.append(time.monotonic() - start - timeout)
group = pg.shrink_group([1], timeout=5)
x = np.ones(70_001)
group.allreduce(x).wait()
report(errors=errors, took=took, ranks=group.ranks, total=x[0])
"""
    ended = job(3, script)
    for told in (ended.ranks[0], ended.ranks[2]):
        assert told["errors"] == [[1], [1]] and told["ranks"] == [0, 2] and told["total"] == 2
        assert all(-0.1 <= late <= 0.2 for late in told["took"]), told
    assert "shrink_group" in ended.ranks[1]["error"], ended.ranks[1]


def test_a_working_group_can_be_shrunk_and_wrong_lists_are_refused(job):
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
errors, differ = [], ""
for wrong in ([RANK], [7], ["a"], 3):
    try:
        pg.shrink_group(wrong)
    except InvalidCallError as error:
        errors.append("ranks_to_exclude" in str(error))
pg.barrier().wait()  # bad arguments break nothing
if RANK == 3:
    time.sleep(2)
    report(errors=errors)
    sys.exit()
try:
    group = pg.shrink_group([3] if RANK else [2], timeout=5)
except CollectiveMismatchError as error:
    differ = str(error)
    group = pg.shrink_group([3], timeout=5)
x = np.ones(3)
group.allreduce(x).wait()
report(errors=errors, differ=differ, total=x[0])
"""
    ended = job(4, script)
    for told in ended.ranks[:3]:
        assert told["errors"] == [True] * 4 and told["total"] == 3, told
    assert "rank 0 excludes [2]" in ended.ranks[0]["differ"], ended.ranks[0]


# What rank 1 does while the others wait for it, until their deadline passes.
ABSENCES = {
    "late": "time.sleep(1); pg.barrier().wait()",
    "aborts": "time.sleep(0.2); pg.abort()",
    "goes straight to shrink_group": "time.sleep(1)",
    "waits for a large send": "pg.send(np.ones(1_000_000), 0, timeout=0.5).wait()",
}


@over_each_backend
@pytest.mark.parametrize("nodes", ["", "2"], ids=["one node", "two nodes"])
@pytest.mark.parametrize("absent", soak([1, 2], [1]))
@pytest.mark.parametrize("what", ABSENCES)
def test_what_is_left_pending_by_a_failure_is_ended_with_the_program(
    job, backend, nodes, absent, what
):
    """Arrivals in MPI for which others wait, and messages that nobody receives."""
    script = f"""
pg = mc.new_group({backend!r}, timeout=20)
pg.barrier().wait()
try:
    if RANK == {absent}:
        {ABSENCES[what]}
    else:
        pg.barrier(timeout=0.5).wait()
except MpicollError as error:
    pass
if {what!r} != "aborts":
    x = np.ones(3)
    pg.shrink_group(timeout=10).allreduce(x).wait()
    report(total=x[0])
"""
    ended = job(4, script, env={"MPICOLL_NODES": nodes, "MPICOLL_GRACE": "1"})
    assert what == "aborts" or ended["total"] == [4.0] * 4


@pytest.mark.parametrize("repeat", range(soak(20, 2)))
def test_who_is_the_last_to_come_has_the_time_to_settle_as_well(job, repeat):
    """When it comes, the grace period of those who wait for it is long over."""
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 1:
    time.sleep(0.7)
try:
    pg.barrier(timeout=20 if RANK == 1 else 0.5).wait()
except (CollectiveTimeoutError, RemoteRankError) as error:
    report(error=type(error).__name__)
if RANK == 1:
    time.sleep(2.5)
"""
    ended = job(2, script, env={"MPICOLL_GRACE": "1.5"})
    assert ended["error"] == ["CollectiveTimeoutError", "RemoteRankError"]


def test_a_recovery_that_leaves_a_stuck_rank_behind_ends(job):
    """It never comes to its end, so MPI can't be finalized: the job is ended after the grace."""
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 2:
    time.sleep(60)
group = pg.shrink_group([2], timeout=5)
x = np.ones(3)
group.allreduce(x).wait()
report(total=x[0])
"""
    ended = job(3, script, fails=True, env={"MPICOLL_GRACE": "1"})
    assert [told["total"] for told in ended.ranks[:2]] == [2, 2]
    assert ended.at - ended.ranks[0]["wall"] <= 5


@pytest.mark.parametrize("backend", ["auto", "mpi"])
def test_a_refused_call_with_an_abort_behind_it_leaves_nothing_pending(job, backend):
    """The peers tell who called what, in which the rank that gave up may not have begun to."""
    script = f"""
for _ in range(30):
    pg = mc.new_group({backend!r}, timeout=20)
    pg.barrier().wait()
    try:
        pg.allreduce("text" if RANK == 0 else np.ones(3)).wait()
    except InvalidCallError:
        pg.abort()
    except (CollectiveMismatchError, RemoteRankError):
        pass
report(done=True)
"""
    ended = job(3, script)
    assert [rank["done"] for rank in ended.ranks] == [True] * 3, ended.output
