"""Who is on which node, and how data is cut for them: pure, so tested without MPI."""

from __future__ import annotations

import pytest

from mpicoll.errors import InvalidCallError
from mpicoll.runtime.settings import node_sizes
from mpicoll.runtime.topology import Nodes, shares, spans


def test_nodes_are_in_order_of_their_lowest_rank():
    nodes = Nodes.of([30, 10, 30, 20, 10, 30])
    assert nodes.members == ((0, 2, 5), (1, 4), (3,))
    assert nodes.stripes == 1
    assert [nodes.locate(rank) for rank in range(6)] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (2, 0),
        (1, 1),
        (0, 2),
    ]
    with pytest.raises(ValueError):
        nodes.locate(6)


@pytest.mark.parametrize("keys", [[0, 0, 1, 1], [0, 1, 0, 1, 0], [5, 5, 5, 2, 2, 2, 2, 2]])
def test_stripes_serve_every_rank_once(keys):
    nodes = Nodes.of(keys)
    served = nodes.by_stripe()
    assert len(served) == nodes.stripes
    assert sorted(r for stripe in served for ranks in stripe for r in ranks) == list(
        range(len(keys))
    )
    for stripe, by_node in enumerate(served):
        for members, ranks in zip(nodes.members, by_node):
            assert ranks[0] == members[stripe], "the rank at a stripe's place comes first"
            assert all(members.index(r) % nodes.stripes == stripe for r in ranks)


@pytest.mark.parametrize("count", [0, 1, 5, 7, 64, 1001])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7])
def test_shares_add_up_and_are_even(count, parts):
    found = shares(count, parts)
    assert sum(found) == count and len(found) == parts and max(found) - min(found) <= 1


def test_spans_lie_one_after_the_other():
    assert spans([3, 0, 2]) == [(0, 3), (3, 3), (3, 5)]
    assert spans([]) == []


@pytest.mark.parametrize(
    "text, world, sizes",
    [("2", 4, (2, 2)), ("2", 3, (1, 2)), ("3,1", 4, (3, 1)), ("1", 1, (1,)), ("", 4, ())],
)
def test_what_the_environment_pretends(monkeypatch, text, world, sizes):
    monkeypatch.setenv("MPICOLL_NODES", text)
    assert node_sizes(world) == sizes


@pytest.mark.parametrize("text", ["0", "5", "2,1", "2,2,0", "-4", "a", "2;2", ","])
def test_what_it_can_not(monkeypatch, text):
    monkeypatch.setenv("MPICOLL_NODES", text)
    with pytest.raises(InvalidCallError, match="MPICOLL_NODES must be"):
        node_sizes(4)
