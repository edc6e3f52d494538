"""A job with MPICOLL_TRACE_DIR set, then `python -m mpicoll trace` on what its ranks left."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.harness import environment, run_bounded


def trace(*argv: object, status: int = 0) -> str:
    """Run the command, on a machine without MPI, and return what it prints."""
    env = environment({"MPI4PY_LIBMPI": "/nonexistent/libmpi.so"})
    ended = run_bounded([sys.executable, "-m", "mpicoll", "trace", *map(str, argv)], 30, env)
    assert ended.code == status and not ended.timed_out, ended.output
    return ended.output


def told(folder: Path) -> dict:
    return json.loads(trace(folder, "--json"))


def spans(path: Path) -> list[dict]:
    return [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]


HERE = """
def here():
    return f"{__file__}:{sys._getframe(1).f_lineno}"
"""

AWAY = f"""{HERE}
pg = mc.new_group(timeout=20)
x = np.ones(5, dtype=np.float32)
for step in range(3):
    pg.allreduce(x).wait(); before = here()
if RANK == 2:
    time.sleep(1.0)
    report(before=before, at="")
else:
    try:
        pg.broadcast(x, 0, timeout=0.5).wait(); at = here()
    except CollectiveTimeoutError:
        report(before=before, at=f"{{__file__}}:{{sys._getframe().f_lineno - 2}}")
    time.sleep(1.0)
"""


def test_who_stayed_away_is_named_with_call_and_line(job, tmp_path):
    ended = job(3, AWAY, env={"MPICOLL_TRACE_DIR": str(tmp_path)})
    at, _, _ = ended["at"]
    before = ended["before"][2]

    said = trace(tmp_path)
    assert "ranks 0-1    failed        broadcast(float32[5], root=0)" in said and at in said
    assert "CollectiveTimeoutError" in said and "ranks [2] have not arrived" in said
    assert f"last: #3 allreduce(float32[5], op=SUM) at {before}, finished" in said

    account = told(tmp_path)["groups"][0]
    assert account["key"] == {"name": "world", "ranks": [0, 1, 2], "ordinal": 0}
    assert account["done"]["seq"] == 3 and account["done"]["rows"][0]["ranks"] == [0, 1, 2]
    failed, away = account["unfinished"][0]["rows"]
    assert (failed["ranks"], failed["place"], away["ranks"]) == ([0, 1], at, [2])

    events = spans(tmp_path / "trace.json")
    calls = [(e["pid"], e["args"]["seq"], e["cat"]) for e in events if e["name"] == "allreduce"]
    assert sorted(calls) == [(r, seq, "finished") for r in range(3) for seq in (1, 2, 3)]
    (late,) = [e for e in events if e["name"] == "broadcast" and e["pid"] == 0]
    assert 0.45e6 < late["dur"] < 1.5e6 and late["args"]["at"] == at


LOST = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 2:
    time.sleep(60)
pg.allreduce(np.ones(3), timeout=0.5).wait()
"""


def test_a_rank_that_was_killed_left_no_file_and_that_is_said(job, tmp_path):
    """The others' error ends the job, and with it the rank that they waited for."""
    job(3, LOST, fails=True, env={"MPICOLL_TRACE_DIR": str(tmp_path)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank-0.json", "rank-1.json"]
    found = told(tmp_path)
    assert found["absent"] == [2]
    rows = found["groups"][0]["unfinished"][0]["rows"]
    assert [(row["state"], row["ranks"]) for row in rows] == [("failed", [0, 1]), ("no file", [2])]
    assert "No file from rank 2" in trace(tmp_path)


SLOW = f"""{HERE}
pg = mc.new_group(timeout=20); made = here()
half = pg.split(RANK % 2)
x = np.ones(1000)
for step in range(10):
    if RANK == 1 and step in (4, 7):
        time.sleep(0.1 * step)
    pg.allreduce(x).wait(); at = here()
half.barrier().wait()
works = [pg.allreduce(np.ones(5)) for _ in range(3)]
mc.wait_all(works)
report(at=at, made=made)
"""


def test_a_straggler_is_found(job, tmp_path):
    ended = job(3, SLOW, env={"MPICOLL_TRACE_DIR": str(tmp_path)})
    at, made = ended["at"][1], ended["made"][1]
    found = told(tmp_path)
    assert found["absent"] == [] and found["notes"] == []
    assert sorted(found["clocks"]) == ["0", "1", "2"]
    for clock in found["clocks"].values():  # of one machine: they are alike
        assert abs(clock["seconds"]) < 0.05 and clock["uncertainty"] < 0.05
    assert all(group["well"] for group in found["groups"])
    names = [(g["key"]["name"], g["key"]["ranks"]) for g in found["groups"]]
    assert ("world:split:0", [0, 2]) in names and ("world:split:1", [1]) in names

    (making,) = [g for g in found["groups"] if g["key"]["name"] == "new_group"]
    assert [row["place"] for row in making["done"]["rows"]] == [made]

    late = found["stragglers"][0]
    assert late["rank"] == 1 and late["last"] >= 2
    assert 0.65 < late["longest"] < 0.95 and 2.1 < late["total"] < 3.2
    assert f"{late['worst']['file']}:{late['worst']['line']}" == at
    assert late["worst"]["seq"] == 9 and late["group"]["name"] == "world"
    assert any(f"#9 of 'world'  {at}" in line for line in trace(tmp_path).splitlines())

    events = spans(tmp_path / "trace.json")
    ends = [
        e["ts"] + e["dur"] for e in events if e["name"] == "allreduce" and e["args"]["seq"] == 9
    ]
    assert len(ends) == 3 and max(ends) - min(ends) < 0.1e6, "on aligned clocks all end together"
    threads: dict = {}
    for event in sorted(events, key=lambda e: e["ts"]):
        last = threads.get((event["pid"], event["tid"]), -1e9)
        assert event["ts"] >= last - 1, "calls overlap on one thread of the trace"
        threads[event["pid"], event["tid"]] = event["ts"] + event["dur"]


NOWHERE = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
report(done=True)
"""


def test_a_folder_that_cannot_be_made_harms_no_job(job, tmp_path):
    (tmp_path / "file").write_text("in the way")
    ended = job(2, NOWHERE, env={"MPICOLL_TRACE_DIR": str(tmp_path / "file" / "folder")})
    assert ended["done"] == [True, True] and "can't be written" in ended.output
