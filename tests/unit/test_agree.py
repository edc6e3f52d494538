"""The verdict on a test, out of what each rank says of it: no MPI is needed for that."""

from __future__ import annotations

import pytest

from mpicoll.testing.verdicts import CAUSE, FOLLOWS, LATE, Part, Phase, agree, first_difference


def part(rank, outcome="passed", *, when="call", text="", **more):
    before = [Phase("setup", "passed")] if when != "setup" else []
    return Part(rank, [*before, Phase(when, outcome, text=text, line=text, **more)])


def failed(rank, text, degree=CAUSE, at=0.0, when="call"):
    return part(rank, "failed", text=text, degree=degree, at=at, when=when)


def test_all_passed():
    assert agree([part(0), part(1), Part(2)], 3) == []


def test_the_cause_comes_first_and_what_followed_is_a_line():
    heard = "RemoteRankError: rank 2 failed"
    parts = [failed(0, heard, FOLLOWS, 1.0), part(1), failed(2, "assert 1", CAUSE, 2.0)]
    (verdict,) = agree([*parts, failed(3, heard, FOLLOWS)], 4)
    assert (verdict.when, verdict.outcome) == ("call", "failed")
    assert verdict.text == f"---- rank 2 of 4 ----\nassert 1\n---- and so ----\nranks 0, 3: {heard}"


def test_who_waited_is_told_of_after_who_did_not_come():
    late = "was not done after 1.{} s: ranks [1] have not arrived"
    parts = [failed(0, late.format(1), LATE, 1.0), failed(1, "took longer", CAUSE, 5.0)]
    (verdict,) = agree([*parts, failed(2, late.format(2), LATE, 1.1)], 3)
    assert verdict.text.startswith("---- rank 1 of 3 ----\ntook longer\n---- ranks 0, 2 of 3 ----")


def test_the_set_up_that_failed_is_the_phase_that_is_reported():
    parts = [failed(0, "heard of it", FOLLOWS), failed(1, "no file", when="setup")]
    (verdict,) = agree(parts, 2)
    assert verdict.when == "setup" and "rank 0: heard of it" in verdict.text


def test_failures_of_their_own_in_two_phases_are_two():
    both = Part(0, [Phase("setup", "passed"), Phase("call", "failed", text="a")])
    both.phases.append(Phase("teardown", "failed", text="b"))
    assert [(v.when, v.text[-1]) for v in agree([both, part(1)], 2)] == [
        ("call", "a"),
        ("teardown", "b"),
    ]


@pytest.mark.parametrize("others", ["passed", "followed"])
def test_a_skip_is_agreed_or_a_failure(others):
    skip = [part(rank, "skipped", when="setup", text="no GPU") for rank in range(2)]
    (verdict,) = agree(skip, 2)
    assert (verdict.when, verdict.outcome, verdict.text) == ("setup", "skipped", "no GPU")
    other = part(1) if others == "passed" else failed(1, "rank 0 skipped it", FOLLOWS)
    (verdict,) = agree([skip[0], other], 2)
    assert verdict.outcome == "failed"
    assert verdict.text.startswith("rank 0 skipped what rank 1 did not\nrank 0: skipped: no GPU")


def test_what_is_expected_to_fail_may_fail_on_one_rank():
    expected = part(1, "skipped", xfail="known")
    for other in (part(0), part(0, "passed", xfail="known"), failed(0, "heard of it", FOLLOWS)):
        (verdict,) = agree([other, expected], 2)
        assert (verdict.outcome, verdict.xfail) == ("skipped", "known")
    (verdict,) = agree([failed(0, "another"), expected], 2)
    assert verdict.outcome == "failed"
    (verdict,) = agree([part(0, xfail="known"), part(1, xfail="known")], 2)
    assert (verdict.outcome, verdict.xfail) == ("passed", "known")


def test_the_first_difference_between_collections():
    assert first_difference([["a", "b"], ["a", "b"]]) == ""
    said = first_difference([["a", "b"], ["a", "c"], ["a"]])
    assert said == (
        "test 2 is not the same on all ranks: rank 0: b; rank 1: c; rank 2: no more test"
    )
