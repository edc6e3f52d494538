"""What a deadline's error says: who is missing, the same on all ranks, and where those are."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.engine import peers
from mpicoll.engine.progress import engine
from mpicoll.errors import CollectiveTimeoutError, MpicollError, RemoteRankError
from tests.contract.conftest import BACKENDS

pytestmark = pytest.mark.mpi

HERE = r"\(\S*test_missing\.py:\d+\)"


@pytest.fixture(params=BACKENDS[:1] if MPI.COMM_WORLD.size == 3 else BACKENDS[-1:])
def make(request, world):
    """Make groups that the test may break, by one backend on 3 ranks and the other on 2."""
    if world.size == 1:
        pytest.skip("nobody can be missing")
    made = []

    def new(name):
        made.append(mc.new_group(request.param, timeout=20, group_name=name))
        made[-1].barrier().wait()
        return made[-1]

    yield new
    finish(world)
    for group in made:  # who arrives late lets MPI end what the others have given up
        for _ in range(
            max(world.allgather(group._caller.group_state.seq)) - group._caller.group_state.seq
        ):
            if not group.is_broken:
                error_of(group.barrier)
    finish(world)
    for group in made:
        group.abort()


def finish(world):
    """Wait for all ranks, beside the library, but answer its peers meanwhile."""
    request = world.Ibarrier()
    while not request.Test():
        engine().test()
        time.sleep(1e-3)


def error_of(call):
    try:
        call().wait()
    except MpicollError as error:
        return error
    return None


def test_a_rank_that_waits_in_another_group_is_said_to_be_there(make, world):
    first, second = make("first"), make("second")
    if world.rank == 0:
        second.barrier().wait()  # the others come when they have given up the first group
        return
    error = error_of(lambda: first.barrier(timeout=2))
    assert isinstance(error, (CollectiveTimeoutError, RemoteRankError)), error
    if isinstance(error, CollectiveTimeoutError):
        assert error.missing == (0,)
    there = rf"rank 0 is in call #2 of group 'second', barrier\(\) {HERE}; last finished here barr"
    assert re.search(there, str(error)), error
    second.barrier().wait()


def test_a_rank_that_waits_for_a_message_is_said_to_do_so(make, world):
    first, second, last = make("first"), make("second"), world.size - 1
    if world.rank == 0:
        second.recv(np.zeros(3), src=last).wait()
        return
    error = error_of(lambda: first.barrier(timeout=2))
    there = rf"rank 0 is in recv\(float64\[3\], src={last}, tag=0\) of group 'second' {HERE}"
    assert re.search(there, str(error)), error
    assert isinstance(error, RemoteRankError) or error.missing == (0,)
    if world.rank == last:
        second.send(np.ones(3), 0).wait()


@pytest.mark.parametrize("source", ["named", "any"])
def test_a_receive_that_expires_says_what_the_sender_is_doing(make, world, source):
    group, other = make("group"), make("other")
    if world.rank == 0:
        said = ""
        for _ in range(10):  # it stays usable; the sender may be slow to answer
            src = 1 if source == "named" else mc.ANY_SOURCE
            said = str(error_of(lambda src=src: group.recv(np.zeros(3), src, timeout=1)))
            if "has not answered" not in said and "rank 1" in said:
                break
        there = rf"still usable; rank 1 is in call #2 of group 'other', barrier\(\) {HERE}"
        assert re.search(there, said), said
    other.barrier().wait()
    group.barrier().wait()


def test_groups_that_are_called_in_opposite_orders_are_recognized(make, world):
    a, b = make("A"), make("B")
    b.barrier().wait()
    mine, number, theirs, their_number = (a, 2, b, 3) if world.rank == 0 else (b, 3, a, 2)
    error = error_of(lambda: mine.allreduce(np.ones(3), timeout=3))
    if isinstance(error, CollectiveTimeoutError):
        rank = 1 if world.rank == 0 else 0
        assert error.missing == (tuple(range(1, world.size)) if world.rank == 0 else (0,))
        assert (
            f"Groups are called in opposite orders: rank {world.rank} is in call #{number} of "
            f"group '{mine.group_name}'" in str(error)
        ), error
        assert (
            f"waits for rank {rank}, which is in call #{their_number} of group "
            f"'{theirs.group_name}' and waits for rank {world.rank}. Call groups in one order"
            in str(error)
        ), error
    else:  # it was told so by one that was there
        assert isinstance(error, RemoteRankError) and "opposite orders" in str(error), error
    assert sum(world.allgather(isinstance(error, CollectiveTimeoutError))) > 0


def test_all_name_the_same_ranks_whoever_comes_at_the_last_moment(make, world):
    """The sets of those that time out are equal, and nobody names itself."""
    for turn in range(6):
        group = make(f"group {turn}")
        late = (turn - 3) * 4e-3
        if world.rank == world.size - 1:
            time.sleep(0.3 + late)
        error = error_of(
            lambda group=group: group.barrier(timeout=5 if world.rank == world.size - 1 else 0.3)
        )
        finish(world)
        found = world.allgather(
            error.missing if isinstance(error, CollectiveTimeoutError) else None
        )
        sets = {missing for missing in found if missing is not None}
        assert len(sets) <= 1, (turn, found)
        assert error is None or isinstance(error, (CollectiveTimeoutError, RemoteRankError))
        assert not (isinstance(error, CollectiveTimeoutError) and world.rank in error.missing)


def test_a_later_call_that_expires_leaves_the_earlier_ones_too(make, world):
    """Those who wait in an earlier one, with more patience, hear of it."""
    group = make("group")
    start = time.monotonic()
    if world.rank == 0:
        works = [group.allreduce(np.ones(3)), group.allreduce(np.ones(3), timeout=0.5)]
        with pytest.raises(CollectiveTimeoutError):
            works[1].wait()
        world.isend(None, 1)
    elif world.rank == 1:
        request = world.irecv(source=0)
        while not request.test()[0]:
            time.sleep(1e-3)
        assert isinstance(error_of(lambda: group.allreduce(np.ones(3))), RemoteRankError)
    else:
        assert isinstance(error_of(lambda: group.allreduce(np.ones(3))), RemoteRankError)
    assert time.monotonic() - start < 15  # their own deadline is after 20 s


def test_notices_that_nobody_takes_are_not_looked_at_again_and_again(make, world, monkeypatch):
    group = make("group")
    if world.rank == 0:
        looks = 0
        is_over = peers._is_over

        def counted(request):
            nonlocal looks
            looks += 1
            return is_over(request)

        monkeypatch.setattr(peers, "_is_over", counted)
        for _ in range(1000):
            group._caller.group_state.peers.ask([1])
        monkeypatch.undo()
        assert looks <= 5000, "each notice looks at all that were sent before"
    finish(world)
    group.barrier().wait()
