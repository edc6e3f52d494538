"""What ranks reported, and what scripts/reliability makes of it."""

from __future__ import annotations

import pytest

from scripts.failures.scenario import Scenario
from scripts.failures.verdicts import judge
from tests.harness import Launched

ALL = Scenario("group", "name", "", "", "", "")
OTHERS = Scenario("group", "name", "", "", "", "", ranks=3, culprits=(2,))
NAN = Scenario("group", "name", "", "", "", "", alike=True)


LIMIT = 4.0  # seconds from 10.0 on


def ended(*ranks, code=0, timed_out=False, output=""):
    return Launched(code, 5.0, timed_out, output, [], 15.0, list(ranks))


def failed(at, text="", **more):
    return {"began": 10.0, "at": at, "error": "Oops", "text": text, **more}


DONE = {"began": 10.0, "returned": 10.5}
WAITS = {"began": 10.0}
CAUSE = {"began": 10.0, "cause": 11.0}


@pytest.mark.parametrize(
    "scenario, job, kind, words",
    [
        (ALL, ended(failed(10.01), failed(12.0)), "error on every rank", "(2.0 s)"),
        (ALL, ended(failed(10.01), failed(10.02)), "error on every rank", "(at once)"),
        (
            ALL,
            ended(failed(10.0), failed(10.0), timed_out=True),
            "error on every rank",
            "hangs at its end",
        ),
        (ALL, ended(failed(10.0), DONE), "error on some ranks, the rest go on in silence", "Oops"),
        (
            ALL,
            ended(failed(10.0), DONE | {"right": True}),
            "error on some ranks, the rest have the right answer",
            "the right answer",
        ),
        (
            ALL,
            ended(failed(10.0), WAITS, timed_out=True),
            "error on some ranks, the rest hang",
            "the rest hang",
        ),
        (
            ALL,
            ended(failed(10.0), WAITS, code=1),
            "error on some ranks, the rest are ended",
            "Oops",
        ),
        (ALL, ended(DONE, DONE), "wrong data in silence", "wrong"),
        (ALL, ended(DONE | {"right": True}, DONE | {"right": True}), "right answer", "right"),
        (ALL, ended(DONE | {"right": True}, DONE | {"right": False}), "wrong data in silence", ""),
        (NAN, ended(DONE | {"seen": "1"}, DONE | {"seen": "1"}), "right answer", ""),
        (NAN, ended(DONE | {"seen": "1"}, DONE | {"seen": "2"}), "wrong data in silence", ""),
        (ALL, ended(WAITS, WAITS, timed_out=True), "hangs", "hangs"),
        (ALL, ended(DONE, WAITS, timed_out=True), "hangs", "some ranks return"),
        (ALL, ended(DONE | {"returned": 14.1}, failed(14.1), timed_out=True), "hangs", "hangs"),
        (ALL, ended(WAITS, WAITS, code=139), "crash", "crash"),
        (ALL, ended(WAITS, None, code=1, output="Segmentation fault"), "crash", "crash"),
        (OTHERS, ended(WAITS, WAITS, CAUSE, code=9), "job ended by the launcher", "(4.0 s)"),
        (OTHERS, ended(failed(11.3), failed(11.2), CAUSE), "error on every rank", "(0.3 s)"),
        (
            OTHERS,
            ended(failed(11.3, "ranks [1, 2] have not arrived"), failed(11.2, "rank 2 died"), None),
            "error on every rank",
            "names the rank",
        ),
    ],
)
def test_verdict(scenario, job, kind, words):
    verdict = judge(scenario, job, LIMIT)
    assert verdict.kind == kind and words in verdict.words, verdict


def test_a_rank_is_named_only_as_a_rank():
    told = [failed(11.0, "2 ranks are there, rank 12 is not") for _ in range(2)]
    assert "names" not in judge(OTHERS, ended(*told, CAUSE), LIMIT).words
