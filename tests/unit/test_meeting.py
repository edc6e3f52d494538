"""The order in which groups merge, whoever comes first."""

from __future__ import annotations

import itertools

import pytest

from mpicoll.groups.rendezvous import in_order


def group(name, job, ranks, **others):
    return {"name": name, "job": job, "members": {job: ranks, **others}}


def named(groups):
    return [(one["name"], one["job"]) for one in groups]


ONE_WORLD = [group("z", "w", [0, 3]), group("b", "w", [2, 1]), group("a", "w", [4])]
APART = [group("a", "y", [0]), group("b", "x", [0, 1]), group("c", "z", [0])]
MIXED = [group("z", "x", [0]), group("a", "x", [1]), group("m", "w", [5, 4])]
OF_SEVERAL = [group("a:split", "x", [0], y=[1]), group("b:split", "x", [1], y=[0])]


@pytest.mark.parametrize("expected", [ONE_WORLD, APART, MIXED, OF_SEVERAL])
def test_the_order_does_not_depend_on_who_came_first(expected):
    for came in itertools.permutations(expected):
        assert in_order(came) == expected


def test_equal_names_are_ordered_by_arrival():
    for came in itertools.permutations([group("world", job, [0]) for job in "xyz"]):
        assert in_order(came) == list(came)
