"""The runner's counting: what hangs, dies or leaves processes behind is a failure."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.harness import Ended, run_bounded
from tests.run import Stage, in_order, outcomes


def ended(code=0, timed_out=False, leftovers=()):
    return Ended(code, 1.0, timed_out, "output", list(leftovers), at=0.0)


def log(tmp_path, *events):
    path = tmp_path / "log.jsonl"
    lines = [{"event": e, "test": t, "when": "call", "text": "text"} for e, t in events]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


DONE = [("start", "a"), ("passed", "a"), ("start", "b"), ("skipped", "b")]


@pytest.mark.parametrize(
    "events, how, failed, said",
    [
        (DONE, {}, 0, ""),
        ([*DONE, ("start", "c"), ("failed", "c")], {"code": 1}, 1, "c (call)"),
        ([*DONE, ("start", "c")], {"timed_out": True, "code": -15}, 1, "in c: killed"),
        ([*DONE, ("start", "c")], {"code": -11}, 1, "in c: died with exit code -11"),
        (DONE, {"code": 1}, 1, "no test failed"),
        (DONE, {"leftovers": [7]}, 1, "left processes [7]"),
        ([*DONE, ("passed", "c"), ("failed", "c")], {"code": 1}, 1, "c (call)"),
        (DONE, {"code": 5}, 0, ""),
    ],
)
def test_counting(tmp_path, events, how, failed, said):
    count, failures = outcomes(log(tmp_path, *events), ended(**how))
    assert (count["passed"], count["failed"], count["skipped"]) == (1, failed, 1)
    assert len(failures) == failed and all(said in title for title, _ in failures)


def test_a_stage_that_writes_nothing_fails(tmp_path):
    count, _ = outcomes(tmp_path / "missing", ended(code=3))
    assert count["failed"] == 1


def staged(name, half):
    return Stage(name, 0, [], 1.0, half=half)


def test_halves_run_two_at_a_time_and_all_are_told_in_order():
    together = threading.Barrier(2)

    def run(stage):
        if stage.half:
            together.wait(5)  # raises if the other one doesn't come meanwhile
        return ended(int(stage.name))

    row = [staged("1", True), staged("2", True), staged("3", False), staged("4", False)]
    told = list(in_order(row, run, stop=lambda: None))
    assert [(stage.name, how.code) for stage, how in told] == [(str(n), n) for n in (1, 2, 3, 4)]


def test_an_interrupt_ends_what_runs_and_starts_no_more():
    begun, stopped = [], threading.Event()

    def run(stage):
        begun.append(stage.name)
        if stage.name == "1":
            raise KeyboardInterrupt  # as in the main program
        assert stopped.wait(5)
        return ended()

    with pytest.raises(KeyboardInterrupt):
        list(in_order([staged(name, True) for name in "1234"], run, stopped.set))
    assert stopped.is_set() and "4" not in begun


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("started", flush=True)
time.sleep(60)
"""


def test_a_hang_is_ended_with_all_that_it_started():
    result = run_bounded([sys.executable, "-c", STUBBORN], 1.0, os.environ)
    assert result.timed_out and result.code == -9 and "started" in result.output
    assert 4.0 <= result.seconds < 5.0 and len(result.leftovers) == 1
    (pid,) = result.leftovers
    stat = Path(f"/proc/{pid}/stat")
    deadline = time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":  # Z: waits to be reaped
        assert time.monotonic() < deadline, "the leftover lives"
