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


PACKED, APART = 1024, 1025  # float32: the most that is packed behind a header; and more


def test_large_messages_are_told_apart_whatever_the_order(pg):
    """Their payloads come after their headers, which are received in the opposite order."""
    n, me = pg.size(), pg.rank()
    sends, incoming = [], {}
    for tag in range(5):
        for i, size in enumerate((APART, PACKED, 100_000)):
            sends.append(pg.send(data(me, size, seed=10 * tag + i), (me + 1) % n, tag=tag))
    left = (me - 1) % n
    for tag in reversed(range(5)):
        arrays = [data(9, size) for size in (APART, PACKED, 100_000)]
        incoming[tag] = arrays, [pg.recv(x, left, tag=tag) for x in arrays]
    for tag, (arrays, works) in incoming.items():
        mc.wait_all(reversed(works))
        for i, x in enumerate(arrays):
            assert NUMPY.same(x, data(left, x.size, seed=10 * tag + i)), (tag, i)
    mc.wait_all(sends)


@pytest.mark.parametrize("source", ["the rank", "any"])
@pytest.mark.parametrize("sent", [0, PACKED, APART, 100_000])
@pytest.mark.parametrize("expected", [0, PACKED, APART, 100_000])
def test_a_message_that_does_not_fit_does_no_harm_to_the_next_ones(pg, sent, expected, source):
    n, me = pg.size(), pg.rank()
    left = (me - 1) % n
    incoming = data(9, expected)
    sizes = (sent, 100_000, 3)
    sends = [pg.send(data(me, size), (me + 1) % n, tag=6) for size in sizes]
    receiving = pg.recv(incoming, left if source == "the rank" else mc.ANY_SOURCE, tag=6)
    if sent == expected:
        receiving.wait()
    else:
        text = rf"rank {left} sent float32\[{sent}\], but the array is float32\[{expected}\]"
        with pytest.raises(CollectiveMismatchError, match=text):
            receiving.wait()
        assert NUMPY.same(incoming, data(9, expected)), "the array is left alone"
    for size in sizes[1:]:
        x = data(9, size)
        pg.recv(x, left, tag=6).wait()
        assert NUMPY.same(x, data(left, size))
    mc.wait_all(sends)


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


def _probed(pg, src, tag=0):
    while (found := pg.probe(src, tag)) is None:
        pass
    return found


@pytest.mark.parametrize("src", ["the rank", "any"])
@pytest.mark.parametrize("size", [0, 1, 5, 300_000])
def test_a_message_of_unknown_size_is_probed_and_received(pg, kind, size, src):
    n, me = pg.size(), pg.rank()
    left = (me - 1) % n
    sending = pg.send(kind.array(data(me, size)), (me + 1) % n, tag=5)
    later = pg.send(kind.array(data(me, 2)), (me + 1) % n, tag=5)
    found = _probed(pg, left if src == "the rank" else mc.ANY_SOURCE, tag=5)
    assert found == _probed(pg, left, tag=5), "it stays what it is until it is received"
    source, tag, dtype, count = found
    assert (source, tag, dtype, count) == (left, 5, "float32", size)
    incoming, more = kind.full(count, 9), kind.full(2, 9)
    receiving = pg.recv(incoming, source if src == "the rank" else mc.ANY_SOURCE, tag=5)
    following = pg.recv(more, left, tag=5)
    mc.wait_all([sending, later, receiving, following])
    assert receiving.source_rank() == left
    assert kind.same(incoming, data(left, size)) and kind.same(more, data(left, 2))
    assert pg.probe(left, tag=5) is None


def test_probe_leaves_a_message_to_the_receives_that_wait_for_it(pg):
    n, me = pg.size(), pg.rank()
    incoming = data(0, 3)
    receiving = pg.recv(incoming, tag=4)
    pg.barrier().wait()
    sending = pg.send(data(me, 3), (me + 1) % n, tag=4)
    while not receiving.is_completed():
        assert pg.probe(tag=4) is None
    mc.wait_all([sending, receiving])
    assert NUMPY.same(incoming, data((me - 1) % n, 3))


def test_probe_names_dtypes_and_refuses_what_recv_refuses(pg):
    me = pg.rank()
    for array in (np.zeros(2, "int8"), np.zeros(2, "complex64"), np.zeros(2, "datetime64[s]")):
        sending = pg.send(array, me)
        found = _probed(pg, me)
        assert np.dtype(found.dtype) == array.dtype
        pg.recv(np.zeros(found.count, found.dtype), me).wait()
        sending.wait()
    assert pg.probe(mc.PROC_NULL) is None
    for wrong in ({"src": -1}, {"src": pg.size()}, {"tag": -1}, {"tag": 2**40}):
        with pytest.raises(mc.InvalidCallError, match=next(iter(wrong))):
            pg.probe(**wrong)


def test_a_message_that_was_probed_and_does_not_fit_says_what_it_is(pg):
    me = pg.rank()
    sending = pg.send(np.arange(7, dtype="int32"), me)
    _probed(pg, me)
    with pytest.raises(CollectiveMismatchError, match=r"int32\[7\].*float64\[3\].*pg.probe"):
        pg.recv(np.zeros(3), me).wait()
    sending.wait()
    assert pg.probe(me) is None


def test_a_message_that_was_probed_and_never_received_is_dropped_at_the_end(fresh):
    me = fresh.rank()
    sending = fresh.send(np.ones(300_000), me)
    _probed(fresh, me)
    try:
        fresh.shutdown()
        assert sending.is_success()
    except CollectiveMismatchError as error:  # where probing takes no more than the header
        assert "its message was dropped" in str(error)
    assert fresh.is_closed and sending.is_completed()


def test_probing_for_one_that_left_raises(fresh):
    if fresh.size() == 1:
        pytest.skip("nobody to leave")
    if fresh.rank() == 0:
        fresh.abort("enough")
        return
    with pytest.raises(mc.RemoteRankError, match="enough"):
        while True:
            fresh.probe(0)
