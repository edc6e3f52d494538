"""Python objects, and the barrier that says who is missing."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.mpi


def thing(rank, seed=0):
    """Objects whose pickles differ in length between ranks; rank 2's is large."""
    return {"rank": rank, "seed": seed, "text": "x" * (100_000 if rank == 2 else rank)}


def test_broadcast_object(pg):
    for root in range(pg.size()):
        got = pg.broadcast_object(thing(root, 1) if pg.rank() == root else None, root)
        assert got == thing(root, 1)


def test_allgather_object(pg):
    assert pg.allgather_object(thing(pg.rank())) == [thing(r) for r in range(pg.size())]


def test_gather_object(pg):
    for root in range(pg.size()):
        got = pg.gather_object(thing(pg.rank(), root), root)
        all_of = [thing(r, root) for r in range(pg.size())]
        assert got == (all_of if pg.rank() == root else None)


def test_scatter_object(pg):
    for root in range(pg.size()):
        objects = [thing(r, root) for r in range(pg.size())] if pg.rank() == root else None
        assert pg.scatter_object(objects, root) == thing(pg.rank(), root)


@pytest.mark.parametrize("value", [None, 0, "", (), b"\0", {1: [2, {3}]}])
def test_small_values(pg, value):
    assert pg.broadcast_object(value if pg.rank() == 0 else "other", 0, timeout=10) == value
    assert pg.allgather_object(value, timeout=10) == [value] * pg.size()


@pytest.mark.parametrize("wait_all_ranks", [False, True])
def test_monitored_barrier(pg, wait_all_ranks):
    for _ in range(3):
        pg.monitored_barrier(timeout=10, wait_all_ranks=wait_all_ranks)
