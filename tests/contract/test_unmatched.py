"""Messages of which only one side was called, when their group is shut down."""

from __future__ import annotations

import time

import numpy as np
import pytest

import mpicoll as mc
from tests.contract.conftest import BACKENDS, GROUP_TIMEOUT

pytestmark = pytest.mark.mpi

LARGE = 1_000_000  # elements: no library takes so much off a sender's hands by itself

over_each_backend = pytest.mark.parametrize("backend", BACKENDS)


def shut_down(pg):
    """Shut a group down; return its error, if that comes long before any deadline."""
    start = time.monotonic()
    try:
        pg.shutdown()
    except mc.CollectiveMismatchError as error:
        assert not error.breaks_group
        return str(error)
    finally:
        assert time.monotonic() - start < GROUP_TIMEOUT and pg.is_closed
    return ""


@over_each_backend
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("source", ["a rank", "any"])
def test_a_receive_for_which_no_message_comes(backend, source, dropped):
    pg = mc.new_group(backend, timeout=GROUP_TIMEOUT)
    last = pg.size() - 1
    work = None
    if pg.rank() == last:
        work = pg.recv(np.ones(3), 0 if source == "a rank" else mc.ANY_SOURCE, tag=7)
    if dropped:
        work = None
    said = shut_down(pg)
    if pg.rank() == last:
        assert "tag=7" in said and "no message came for it" in said, said
        assert "test_unmatched.py:" in said, said
    else:
        assert not said
    if work is not None:
        with pytest.raises(mc.CollectiveMismatchError, match="no message came"):
            work.wait()


@over_each_backend
def test_a_large_message_that_nobody_receives(backend):
    pg = mc.new_group(backend, timeout=GROUP_TIMEOUT)
    work = pg.send(np.ones(LARGE), (pg.rank() + 1) % pg.size(), tag=7)
    said = shut_down(pg)
    assert "was not received" in said and "test_unmatched.py:" in said, said
    with pytest.raises(mc.CollectiveMismatchError, match="dropped"):
        work.wait()


@over_each_backend
@pytest.mark.parametrize("how", ["shut down", "dropped"])
def test_small_messages_that_nobody_receives_are_no_error(backend, how):
    """They were done long before.  The group that comes next must not be given them."""
    parent = mc.new_group(backend, timeout=GROUP_TIMEOUT)
    if parent.size() == 1:
        pytest.skip("MPICH does not buffer what is sent to oneself")
    for _ in range(10):
        pg = parent.split(0)
        assert pg is not None
        peer = (pg.rank() + 1) % pg.size()
        pg.barrier().wait()
        for tag in range(3):
            pg.send(np.ones(3), peer, tag=tag).wait()
        if how == "shut down":
            pg.shutdown()
    parent.shutdown()


@over_each_backend
def test_what_matches_ends_well_among_what_does_not(backend):
    """Nobody waits for any of it.  Each rank sends to each, and each fourth message is awaited."""
    pg = mc.new_group(backend, timeout=GROUP_TIMEOUT)
    me, n = pg.rank(), pg.size()
    sends, receives = {}, {}
    for peer in range(n):
        for tag in range(8):
            count = LARGE if tag % 2 else 5
            sends[peer, tag] = pg.send(np.full(count, 10.0 * me + tag), peer, tag=tag)
            if tag % 4 < 2:
                array = np.zeros(count)
                receives[peer, tag] = array, pg.recv(array, peer, tag=tag)
    anyone = [np.zeros(5) for _ in range(n + 1)]
    works = [pg.recv(array, tag=6) for array in anyone]
    missing = pg.recv(np.ones(3), (me + 1) % n, tag=99)
    assert shut_down(pg)
    for (peer, tag), (array, work) in receives.items():
        assert work.is_success() and (array == 10.0 * peer + tag).all()
    assert [work.is_success() for work in works] == [True] * n + [False]
    assert sorted(array[0] for array in anyone[:n]) == [10.0 * peer + 6 for peer in range(n)]
    lost = sorted(tag for (_, tag), work in sends.items() if not work.is_success())
    assert [tag for tag in lost if tag != 2] == [3] * n + [7] * n  # those of tag 2 are small
    assert not missing.is_success()


@over_each_backend
def test_alike_messages_are_received_in_turn_and_the_last_ones_are_lost(backend):
    pg = mc.new_group(backend, timeout=GROUP_TIMEOUT)
    me, n = pg.rank(), pg.size()
    sends = [pg.send(np.full(LARGE, i), (me + 1) % n) for i in range(3)]
    into = np.zeros(LARGE, int)
    receive = pg.recv(into, (me - 1) % n)
    assert "was not received" in shut_down(pg)
    assert receive.is_success() and (into == 0).all()
    assert [send.is_success() for send in sends] == [True, False, False]


def test_with_raises_what_shutdown_raises():
    with (
        pytest.raises(mc.CollectiveMismatchError, match="no message came"),
        mc.new_group(timeout=GROUP_TIMEOUT) as pg,
    ):
        pg.recv(np.ones(3), 0, tag=5)
    assert pg.is_closed


def test_a_receive_whose_deadline_passes_meanwhile_is_a_timeout():
    pg = mc.new_group(timeout=GROUP_TIMEOUT)
    work = pg.recv(np.ones(3), 0, tag=5, timeout=0.2)
    time.sleep(0.4)
    with pytest.raises((mc.CollectiveTimeoutError, mc.CollectiveMismatchError)) as raised:
        pg.shutdown()
    assert pg.is_closed and work.exception() is raised.value
