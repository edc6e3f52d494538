"""send and recv: tags, any source, no queueing, a checked header."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.errors import CollectiveMismatchError
from tests.contract.arrays import NUMPY, SIZES, data, reduced

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("size", SIZES)
def test_ring(pg, kind, size):
    n, me = pg.size(), pg.rank()
    incoming = kind.full(size, 9)
    sending = pg.send(kind.array(data(me, size)), (me + 1) % n)
    receiving = pg.recv(incoming, (me - 1) % n)
    assert receiving.wait() is True and sending.wait() is True
    assert kind.same(incoming, data((me - 1) % n, size))
    assert receiving.source_rank() == (me - 1) % n


def test_tags_are_told_apart_whatever_the_order(pg, kind):
    """Three messages to everybody, waited for in the opposite order."""
    n, me = pg.size(), pg.rank()
    tags = (0, 7, 32_000)
    sends = [
        pg.send(kind.array(data(me, 5, seed=tag + peer)), peer, tag=tag)
        for peer in range(n)
        for tag in tags
    ]
    for tag in reversed(tags):
        for peer in reversed(range(n)):
            incoming = kind.full(5, 9)
            pg.recv(incoming, peer, tag=tag).wait()
            assert kind.same(incoming, data(peer, 5, seed=tag + me)), (peer, tag)
    mc.wait_all(sends)


def test_messages_of_one_tag_keep_their_order(pg):
    n, me = pg.size(), pg.rank()
    sends = [pg.send(data(me, 5, seed=i), (me + 1) % n) for i in range(10)]
    incoming = [data(0, 5) for _ in range(10)]
    mc.wait_all([pg.recv(x, (me - 1) % n) for x in incoming])
    mc.wait_all(sends)
    for i, x in enumerate(incoming):
        assert NUMPY.same(x, data((me - 1) % n, 5, seed=i)), i


@pytest.mark.parametrize("form", ["default", "constant", "recv_anysource"])
def test_any_source(pg, kind, form):
    n, me = pg.size(), pg.rank()
    sends = [pg.send(kind.array(data(me, 5)), 0, tag=3)]
    if me == 0:
        seen = []
        for _ in range(n):
            incoming = kind.full(5, 9)
            if form == "default":
                work = pg.recv(incoming, tag=3)
            elif form == "constant":
                work = pg.recv(incoming, mc.ANY_SOURCE, 3)
            else:
                work = pg.recv_anysource(incoming, 3)
            work.wait()
            assert kind.same(incoming, data(work.source_rank(), 5))
            seen.append(work.source_rank())
        assert sorted(seen) == list(range(n))
    mc.wait_all(sends)
    pg.barrier().wait()


def test_messages_and_collectives_do_not_wait_for_each_other(pg):
    """A recv posted long before its message blocks no collective of the same group."""
    n, me = pg.size(), pg.rank()
    incoming = data(0, 5)
    receiving = pg.recv(incoming, (me - 1) % n)
    total = data(me, 5)
    pg.allreduce(total).wait()
    assert NUMPY.same(total, reduced("SUM", [data(r, 5) for r in range(n)]))
    assert not receiving.is_completed()
    pg.barrier().wait()
    sending = pg.send(data(me, 5, seed=4), (me + 1) % n)
    receiving.wait()
    sending.wait()
    assert NUMPY.same(incoming, data((me - 1) % n, 5, seed=4))


@pytest.mark.parametrize("shape, dtype", [(5, "i4"), (4, "f4"), (3, "f4"), (0, "f4"), (10, "f2")])
def test_a_message_of_another_type_or_count_is_an_error(pg, shape, dtype):
    """Sent: five float32.  The receiver is told; nobody gets garbage; the group goes on."""
    n, me = pg.size(), pg.rank()
    incoming = data(9, shape, dtype)
    sending = pg.send(data(me, 5), (me + 1) % n)
    with pytest.raises(CollectiveMismatchError, match="message"):
        pg.recv(incoming, (me - 1) % n).wait()
    sending.wait()
    test_ring(pg, NUMPY, 5)


def test_a_computed_rank_is_never_any_or_none(pg):
    """In MPI both are negative numbers: `rank - 1` on rank 0 would take anybody's message."""
    x = np.full(3, 7.0)
    for number in (-1, -2, MPI.ANY_SOURCE, MPI.PROC_NULL):
        with pytest.raises(mc.InvalidCallError, match=r"mpicoll.ANY_SOURCE .* mpicoll.PROC_NULL"):
            pg.recv(x, src=number)
        with pytest.raises(mc.InvalidCallError, match=r"mpicoll.PROC_NULL for none"):
            pg.send(x, dst=number)
        assert number not in (mc.ANY_SOURCE, mc.PROC_NULL)
    assert (x == 7).all()
    for one in (mc.ANY_SOURCE, mc.PROC_NULL):
        assert pickle.loads(pickle.dumps(one)) is copy.deepcopy(one) is one


def test_messages_to_and_from_nobody_are_over_at_once(pg):
    """As halo exchanges at the ends of a line want it."""
    me, n = pg.rank(), pg.size()
    left = me - 1 if me else mc.PROC_NULL
    right = me + 1 if me + 1 < n else mc.PROC_NULL
    ghost = np.full(4, -1.0)
    works = [pg.recv(ghost, left, tag=2), pg.send(np.full(4, float(me)), right, tag=2)]
    mc.wait_all(works, timeout=10)
    assert (ghost == (me - 1 if me else -1)).all()
    assert works[0].source_rank() == left
    alone = pg.recv(ghost, mc.PROC_NULL)
    assert alone.is_completed() and alone.source_rank() is mc.PROC_NULL
    assert "src=PROC_NULL" in repr(alone)
