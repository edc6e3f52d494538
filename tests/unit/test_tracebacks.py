"""Tracebacks as text: whose frames they show, and what stands above them."""

from __future__ import annotations

import sys

import pytest

from mpicoll import InvalidCallError, ReduceOp
from mpicoll.engine.checks import allreduce
from mpicoll.engine.tracebacks import block, cause, describe
from mpicoll.stores import FileStore


def told(function):
    try:
        function()
    except Exception as error:
        return describe(type(error), error, error.__traceback__)
    raise AssertionError("it did not raise")


def refused():
    allreduce(0, 2, [1.0], ReduceOp.SUM)


def wrapped():
    try:
        refused()
    except InvalidCallError as error:
        raise RuntimeError("in step 3") from error


@pytest.mark.parametrize("function", [refused, wrapped])
def test_the_librarys_frames_are_left_out(monkeypatch, function):
    text = told(function)
    assert "in refused" in text and "checks.py" not in text and "buffers.py" not in text
    assert "InvalidCallError: tensor must be" in text
    assert function is refused or "RuntimeError: in step 3" in text
    monkeypatch.setenv("MPICOLL_DEBUG", "1")
    assert "checks.py" in told(function)


def test_a_fault_of_the_librarys_own_is_shown(tmp_path):
    assert "stores.py" in told(lambda: FileStore(tmp_path).set(3, 4))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="there are no groups of exceptions")
def test_in_groups_of_exceptions_too():
    def several():
        errors = []
        for _ in range(2):
            try:
                refused()
            except InvalidCallError as error:
                errors.append(error)
        raise ExceptionGroup("two", errors)  # noqa: F821

    text = told(several)
    assert text.count("in refused") == 2 and "checks.py" not in text


@pytest.mark.parametrize(
    "ranks, hosts, heading",
    [
        ([1], [""], "rank 1 raised"),
        ([0, 2], [], "ranks 0 and 2 raised"),
        ([3, 0, 2], ["b", "a", "b"], "ranks 0, 2 and 3 on a and b raised"),
        ([*range(6), 9], ["a"], "ranks 0-5 and 9 on a raised"),
    ],
)
def test_headings(ranks, hosts, heading):
    assert (
        block(ranks, "text", " in thread 'x'", hosts) == f"mpicoll: {heading} in thread 'x':\ntext"
    )


class Mute(Exception):
    def __str__(self):
        raise ValueError


def test_the_cause_is_a_line():
    assert cause(ValueError, ValueError("no such file\nat all")) == "ValueError: no such file"
    assert cause(Mute, Mute()) == "Mute"
    assert cause(KeyboardInterrupt, KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_chain_may_be_longer_than_python_goes_deep():
    def chained():
        error = None
        for number in range(sys.getrecursionlimit() + 1):
            before, error = error, ValueError(number)
            error.__context__ = before
        raise error

    assert "ValueError: 0\n" in told(chained)
