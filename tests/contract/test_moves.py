"""What only moves goes through small places in the slots, in compiled code, whoever is late."""

from __future__ import annotations

import time

import numpy as np
import pytest

import mpicoll
from mpicoll.runtime.memory import SLOT
from mpicoll.transports.shm import cma, core

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not core.available(), reason="there is no compiled core here"),
]

PLACE, STREAMED = 32 * 1024, 12 * 2**20  # as in moves.pxi
SIZES = (0, 1, PLACE - 1, PLACE, PLACE + 1, 16 * PLACE, 17 * PLACE + 5, 3_000_001)


class Late:
    """The same moves; this rank comes late to them, and again and again in between."""

    def __init__(self, moves):
        self.moves = moves
        self.begin, self.goes_on = moves.begin, moves.goes_on
        self.close = moves.close

    def advance(self):
        time.sleep(0.002)
        return self.moves.advance()


@pytest.fixture(params=["all at once", "one late", "another late"])
def moving(fresh, request):
    """A group whose moves are the compiled ones, on every rank: the core's, but for who is late."""
    transport = fresh._caller.transport
    fresh.broadcast(np.zeros(2 * SLOT, np.uint8), 0).wait()  # for which the slots are made
    if getattr(transport, "_moves", None) is None:
        pytest.skip("the group's ranks don't all share memory")
    late = {"one late": 0, "another late": fresh.size() - 1}.get(request.param)
    if fresh.rank() == late:
        transport._moves = Late(transport._moves)
        fresh._core = None
    return fresh


def block(source, target, size):
    """What one rank gives another."""
    return np.random.default_rng([source, target, size]).integers(0, 256, size, np.uint8)


def lengths(n, size, even):
    """Blocks all alike, as the core moves them, or of all sorts, of which the first is empty."""
    return [size if even else size * r // max(n - 1, 1) for r in range(n)]


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_broadcast_and_gather(moving, size, even):
    n, me, counts = moving.size(), moving.rank(), lengths(moving.size(), size, even)
    for root in range(n):
        x = block(root, 0, size) if me == root else np.zeros(size, np.uint8)
        moving.broadcast(x, root).wait()
        assert np.array_equal(x, block(root, 0, size))
        outputs = [np.zeros(count, np.uint8) for count in counts] if me == root else []
        moving.gather(outputs, block(me, root, counts[me]), root).wait()
        assert all(np.array_equal(o, block(r, root, counts[r])) for r, o in enumerate(outputs))


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_allgather_scatter_and_alltoall(moving, size, even):
    n, me, counts = moving.size(), moving.rank(), lengths(moving.size(), size, even)
    outputs = [np.zeros(count, np.uint8) for count in counts]
    moving.allgather(outputs, block(me, 0, counts[me])).wait()
    assert all(np.array_equal(o, block(r, 0, counts[r])) for r, o in enumerate(outputs))
    for root in range(n):
        inputs = [block(root, r, counts[r]) for r in range(n)] if me == root else []
        into = np.zeros(counts[me], np.uint8)
        moving.scatter(into, inputs, root).wait()
        assert np.array_equal(into, block(root, me, counts[me]))
    inputs = [block(me, r, counts[r]) for r in range(n)]
    outputs = [np.zeros(counts[me], np.uint8) for _ in range(n)]
    moving.alltoall(outputs, inputs).wait()
    assert all(np.array_equal(o, block(r, me, counts[me])) for r, o in enumerate(outputs))
    if even and size:
        whole = np.zeros(n * size, np.uint8)
        moving.all_gather_single(whole, block(me, 0, size)).wait()
        assert np.array_equal(whole, np.concatenate([block(r, 0, size) for r in range(n)]))
        moving.all_to_all_single(whole, np.concatenate(inputs), None, None).wait()
        assert np.array_equal(whole, np.concatenate([block(r, me, size) for r in range(n)]))


def test_one_after_the_other_in_one_call(moving):
    """Large objects are several moves in one call, without an arrival between them."""
    n, me = moving.size(), moving.rank()
    for size in (300_000, 1_000_001):
        objects = [(r, bytes([r % 256]) * (size + r)) for r in range(n)]
        for root in range(n):
            assert moving.broadcast_object(objects[me], root) == objects[root]
        assert moving.allgather_object(objects[me]) == objects
        assert moving.scatter_object(objects if me == 0 else None, 0) == objects[me]


@pytest.fixture(params=["may read", "may not read"])
def large(request, monkeypatch):
    """A group whose ranks may read one another's memory, or may not; and bytes of a large block."""
    if request.param == "may not read":
        monkeypatch.setattr(cma, "can_read", lambda *_: False)
    with mpicoll.new_group() as group:
        yield group, STREAMED // group.size() + 77


def test_large_blocks(large):
    group, size = large
    n, me = group.size(), group.rank()
    room = np.zeros(n * size + 3, np.uint8)
    whole = room[1:][: n * size]  # not aligned to a cache line
    gives = np.concatenate([block(me, r, size) for r in range(n)])
    group.all_to_all_single(whole, gives).wait()
    assert np.array_equal(whole, np.concatenate([block(r, me, size) for r in range(n)]))
    whole[...] = 0
    group.all_gather_single(whole, block(me, 0, size)).wait()
    everything = np.concatenate([block(r, 0, size) for r in range(n)])
    assert np.array_equal(whole, everything)
    whole[me * size :][:size] += 1  # in place, and only the others' come once more
    group.all_gather_single(whole, whole[me * size :][:size]).wait()
    assert np.array_equal(whole, everything + np.uint8(1))
    root = n - 1
    outputs = [np.zeros(size, np.uint8) for _ in range(n)] if me == root else []
    group.gather(outputs, block(me, 0, size), root).wait()
    assert not outputs or np.array_equal(np.concatenate(outputs), everything)
    group.scatter(room[3:][:size], [o + np.uint8(3) for o in outputs], root).wait()
    assert np.array_equal(room[3:][:size], block(me, 0, size) + np.uint8(3))
    whole[...] = everything if me == root else 0
    group.broadcast(whole, root).wait()
    assert np.array_equal(whole, everything)


def test_what_peers_read_lasts_until_they_have(large):
    """A rank goes on when the others have read its block, and not before."""
    group, size = large
    n, me = group.size(), group.rank()
    mine, whole = np.full(size, me, np.uint8), np.zeros(n * size, np.uint8)
    work = group.all_gather_single(whole, mine) if me else None
    if me == 0:
        time.sleep(0.05)  # longer than the core waits: the rest goes the general way
        work = group.all_gather_single(whole, mine)
    work.wait()
    mine[...] = 255
    assert np.array_equal(whole, np.repeat(np.arange(n, dtype=np.uint8), size))
