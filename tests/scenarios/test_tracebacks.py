"""What the terminal shows of ranks that end by exceptions: each whole, under a heading, once."""

from __future__ import annotations

import re

SCRIPT = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
def load():
    if RANK == 1:
        raise ValueError("no part-1.npy")
    return np.ones(4)
x = load()
pg.allreduce(x).wait()
"""


def blocks(output):
    """Return the headings, each with what stands under it, without what the launcher adds."""
    parts = re.split(r"^mpicoll: (ranks? .* raised.*):\n", output, flags=re.M)
    assert not parts[0], output
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_a_cause_and_then_what_follows_once(job):
    ended = job(4, SCRIPT, fails=True)
    found = blocks(ended.output)
    assert list(found) == ["rank 1 raised", "ranks 0, 2 and 3 raised"], ended.output
    cause, rest = found.values()
    assert cause.startswith("Traceback (most recent call last):\n") and "in load" in cause
    assert "\nValueError: no part-1.npy\n" in cause
    last = "mpicoll.RemoteRankError: rank 1 raised ValueError: no part-1.npy"
    assert last in rest.splitlines(), rest
    assert "pg.allreduce(x).wait()" in rest and "mpicoll/engine" not in ended.output, rest
    assert ended.output.count("no part-1.npy") == 3  # in the line of code, too


def test_the_librarys_frames_are_shown_on_demand_and_the_error_holds_the_cause(job):
    script = SCRIPT.replace(
        "pg.allreduce(x).wait()",
        """
try:
    pg.allreduce(x).wait()
except RemoteRankError as error:
    report(text=str(error))
    raise""",
    )
    ended = job(2, script, fails=True, env={"MPICOLL_DEBUG": "1"})
    assert "mpicoll/engine/work.py" in blocks(ended.output)["rank 0 raised"], ended.output
    first, then, *_, last = ended.ranks[0]["text"].splitlines()
    assert first == "rank 1 raised ValueError: no part-1.npy"
    assert then.startswith("Traceback") and last == "ValueError: no part-1.npy"


def test_long_ones_come_whole_and_in_turn(job):
    """Longer than a pipe hands on at once."""
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
def f(n):
    return g(n) if n else {}["x" * 9000 + str(RANK)]
def g(n):
    return f(n - 1)
f(100)
"""
    ended = job(3, script, fails=True)
    found = blocks(ended.output)
    assert list(found) == ["rank 0 raised", "rank 1 raised", "rank 2 raised"], ended.output
    for rank, text in enumerate(found.values()):
        assert text.count("in g\n") == text.count("in f\n") - 1 == 100 and len(text) > 20_000
        assert f"\nKeyError: '{'x' * 9000}{rank}'\n" in text, rank


def test_what_differs_only_in_the_time_and_what_comes_late(job):
    script = """
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 1:
    time.sleep(0.8)
pg.allreduce(np.ones(3), timeout=0.2).wait()
"""
    ended = job(3, script, fails=True)
    assert list(blocks(ended.output)) == ["ranks 0 and 2 raised", "rank 1 raised"], ended.output


def test_hooks_of_the_program_and_prompts_inside_of_it(job):
    """One that is there stays; one set later may call what it found; prompts show errors."""
    script = """
first = sys.excepthook
if RANK == 0:
    sys.excepthook = lambda *error: (print("hooked", flush=True), first(*error))
own = sys.excepthook
pg = mc.new_group(timeout=20)
found = sys.excepthook
if RANK == 1:
    sys.excepthook = lambda *error: (print("hooked", flush=True), found(*error))
report(same=own is found)
import code
shell = code.InteractiveConsole()
shell.push("1 / 0")
pg.barrier().wait()
raise ValueError("boom")
"""
    ended = job(2, script, fails=True)
    assert ended["same"] == [True, False]
    for words, times in {
        "hooked": 4,
        "ZeroDivisionError: division by zero": 2,
        "ValueError: boom": 2,
        "mpicoll: rank 1 raised:": 1,
        "mpicoll: ": 1,
    }.items():
        assert ended.output.count(words) == times, (words, ended.output)
