"""Groups across separately launched jobs, and groups that grow: real launchers, real deaths."""

from __future__ import annotations

import signal
import socket

import pytest

from tests.harness import Job, Launched, installed_mpi, launch_together

connects = pytest.mark.skipif(
    installed_mpi() == "openmpi", reason="Open MPI connects no separate runs: it is refused"
)

# What every job begins with: JOB, SIZE, FOLDER; `merge` merges, and `works` tries the outcome.
HEAD = """
from mpicoll.cli.trials import TRIALS
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


def job(name: str, n: int, size: int, folder, script: str, after: float = 0.0) -> Job:
    given = f"JOB, SIZE, FOLDER = {name!r}, {size}, {str(folder)!r}\n"
    return Job(n, given + HEAD + script, after)


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
bad = []
for name, make in TRIALS.items():
    trial = make(merged, 1000)
    trial.call()
    if not trial.agrees():
        bad.append(name)
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
            job(name, n, 3, tmp_path / "s", ALL, after=0.4 * (place == late))
            for place, (name, n) in enumerate(jobs)
        )
    )
    assert everyone(ended, "bad") == [[], [], []]
    assert everyone(ended, "order") == [[["a", 0], ["b", 0], ["b", 1]]] * 3
    assert everyone(ended, "ranks") == [[0, -1, -1], [-1, 0, 1], [-1, 0, 1]]
    assert everyone(ended, "transport") == ["shm"] * 3
    assert everyone(ended, "fine") == everyone(ended, "own") == [True] * 3


@connects
@pytest.mark.parametrize("after", [(0, 0.3, 0.6), (0.6, 0, 0.3), (0.3, 0.6, 0)])
def test_three_jobs_come_in_any_order(tmp_path, after):
    jobs = [("a", 2), ("b", 1), ("c", 1)]
    ended = run(
        *(
            job(name, n, 4, tmp_path / "s", ALL, after=wait)
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
    ended = run(job("a", 2, 3, tmp_path, script), job("b", 1, 3, tmp_path, script, after=0.3))
    assert everyone(ended, "order") == [["a", "a", "b"]] * 3
    assert everyone(ended, "fine") == [True] * 3


@connects
def test_one_job_brings_two_groups_and_another_one(tmp_path):
    """Those of one job stay together, by lowest rank; the name of a job's first group counts."""
    two = "merged = merge(pg.split_group([0, 2] if pg.rank() != 1 else [1], group_name='x'))\n"
    tell = "report(order=merged.allgather_object((JOB, pg.rank())), fine=works(merged))\n"
    ended = run(
        job("a", 3, 4, tmp_path / "s", two + tell),
        job("m", 1, 4, tmp_path / "s", "merged = merge()\n" + tell),
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
    while time.monotonic() < until:
        pg.split(0).shutdown()
    report(fine=works(pg))
"""
    first, second = run(*(job(name, 2, 4, tmp_path / "s", script) for name in "ab"))
    assert second["fine"] == [True, True] and second.at - first.at > 1


# ---- what goes wrong ----


def test_a_job_that_never_comes_is_a_timeout(tmp_path):
    script = "fails(lambda: merge(timeout=1))\nreport(own=works(pg))"
    (ended,) = run(job("a", 2, 3, tmp_path / "s", script))
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
    ended = run(*(job(name, 1, 2, tmp_path / "s", script) for name in "ab"))
    assert everyone(ended, "error") == ["InvalidCallError"] * 2
    assert all(words in text for text in everyone(ended, "text"))
    assert everyone(ended, "own") == [True] * 2


@pytest.mark.skipif(installed_mpi() == "mpich", reason="MPICH connects separate runs")
def test_separate_runs_under_open_mpi_are_refused_at_once(tmp_path):
    script = "fails(lambda: merge(timeout=10))\nreport(own=works(pg))"
    ended = run(job("a", 1, 3, tmp_path / "s", script), job("b", 2, 3, tmp_path / "s", script))
    assert everyone(ended, "error") == ["UnsupportedError"] * 3
    assert max(map(float, everyone(ended, "took"))) < 3
    for text in everyone(ended, "text"):
        assert all(way in text for way in ("one job", "pg.spawn", "MPICH")), text
    assert everyone(ended, "own") == [True] * 3


# Where a job is killed: when it says this, or before it makes this call of MPI's.
STAGES = {
    "a, when the groups have met": ("a", "__init__", ""),
    "b, when the groups have met": ("b", "__init__", ""),
    "a, with its port published": ("a", "_say", "1/offer"),
    "b, about to connect": ("b", "_say", "1/coming"),
    "a, about to accept": ("a", "_say", "1/accepting"),
    "b, connecting": ("b", "Connect", ""),
}
KILLED = """
from mpicoll import connecting
def die(*arguments, **options):
    report(died=time.monotonic())
    os.kill(os.getpid(), 9)
def killed_in(stage, key):
    if stage == "Connect":
        connecting._take_in = die
        return
    real = getattr(connecting._Talk, stage)
    def until_then(talk, *arguments):
        real(talk, *arguments)
        if not key or arguments[0] == key:
            die()
    setattr(connecting._Talk, stage, until_then)
"""


@connects
@pytest.mark.parametrize("stage", STAGES)
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
    jobs = [job(name, n, 3, tmp_path / "s", KILLED + script) for name, n in (("a", 1), ("b", 2))]
    jobs.append(job(who, 1 + (who == "b"), 3, tmp_path / "s", again, after=1.2))
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
time.sleep(1)
fails(lambda: merged.barrier().wait())
for _ in range(3):
    own = works(pg)
    pg.split(0).shutdown()
    time.sleep(0.3)
report(own=own)
"""
    first, _ = run(*(job(name, 2, 4, tmp_path / "s", script) for name in "ab"), fail="11")
    assert set(first["error"]) <= {error, "RankFailedError"}, first.output
    assert any(words in text for text in first["text"]) and all(t < 2 for t in first["took"])
    assert first["own"] == [True, True]
