"""Exceptions from signal handlers strike anywhere: the user gets them as they are, and goes on."""

from __future__ import annotations

import pytest

from tests.soak import soak

# What a program does until it is struck, over and over, in a group `pg` of one rank.
STRUCK = {
    "polling a receive": """
        w = pg.recv(x, 0, tag=7)
        arm()
        while not w.is_completed(): pass
    """,
    "waiting for a receive": """
        arm()
        pg.recv(x, 0, tag=7).wait()
    """,
    "waiting for a receive from any": """
        arm()
        pg.recv(x, tag=7).wait()
    """,
    "sending and receiving": """
        arm()
        for i in range(10**9):
            y = np.zeros(4)
            r, s = pg.recv(y, 0, tag=9), pg.send(np.full(4, float(i)), 0, tag=9)
            r.wait(), s.wait()
            assert (y == i).all(), (y, i)
    """,
    "reducing": """
        arm()
        while True:
            x[:] = 3
            pg.allreduce(x).wait()
            assert (x == 3).all()
    """,
    "exchanging objects": """
        arm()
        while True: assert pg.allgather_object({"a": 1}) == [{"a": 1}]
    """,
    "futures": """
        arm()
        while True:
            future = pg.allreduce(np.ones(4)).get_future()
            while not future.done(): pass
    """,
    "making and closing groups": """
        arm()
        while True:
            with mc.new_group(comm=MPI.COMM_SELF) as g: g.barrier().wait()
    """,
    "splitting": """
        arm()
        while True: pg.split(0).shutdown()
    """,
    "aborting": """
        arm()
        while True:
            g = mc.new_group(comm=MPI.COMM_SELF)
            g.recv(np.zeros(4), 0)
            g.abort()
    """,
}
OFTEN = ("polling a receive", "waiting for a receive")  # where it may strike as often as one likes

PROGRAM = """
import random, signal
from mpi4py import MPI

armed = False

def strike(number, frame):
    if armed:
        raise Struck("struck")

def arm():
    global armed
    armed = True
    signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-5, 2e-3))

def make():
    return mc.new_group(comm=MPI.COMM_SELF, progress={progress!r}, timeout=20)

def body():
{body}

mc.Future  # is loaded now: what strikes during an import Python may swallow
random.seed({progress!r})
signal.signal(signal.SIGALRM, strike)
x, pg, count, lost = np.zeros(4), make(), 0, 0
while count < {times}:
    try:
        body()
    except Struck:
        armed = False
        count += 1
    except (mc.CallInterruptedError, mc.GroupBrokenError):
        armed = False  # what was struck before: a part of a call, such as a message of a pair
    armed = False
    if pg.is_broken:
        pg, lost = make(), lost + 1

echo = np.zeros(4)
sent = pg.send(np.arange(4.0), 0, tag=3)
pg.recv(echo, 0, tag=3).wait()
sent.wait()
total = np.ones(3)
pg.allreduce(total).wait()
report(count=count, lost=lost, right=bool((echo == np.arange(4)).all() and (total == 1).all()))
"""

EXCEPTIONS = {
    "Exception": "class Struck(Exception): pass",
    "KeyboardInterrupt": "Struck = KeyboardInterrupt",
    "SystemExit": "Struck = SystemExit",
}


TRIED = [("caller", struck) for struck in STRUCK]
TRIED += [("thread", struck) for struck in soak(STRUCK, ("polling a receive", "splitting"))]


@pytest.mark.parametrize("progress, struck", TRIED)
def test_a_handlers_exception_reaches_the_program_as_itself(job, struck, progress):
    times = soak(10_000 if struck in OFTEN else 1_000, 200)
    script = EXCEPTIONS["Exception"] + PROGRAM.format(
        progress=progress, times=times, body=STRUCK[struck]
    )
    ended = job(1, script, timeout=soak(300.0, 60.0))
    assert ended.ranks[0]["count"] == times and ended.ranks[0]["right"], ended.output
    assert "Traceback" not in ended.output, ended.output
    if struck in OFTEN:
        assert ended.ranks[0]["lost"] <= times / 10, "a receive that was struck breaks no group"


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "SystemExit"])
@pytest.mark.parametrize("struck", ["polling a receive", "sending and receiving"])
def test_so_do_those_that_end_a_program(job, struck, kind):
    script = EXCEPTIONS[kind] + PROGRAM.format(
        progress="caller", times=soak(1_000, 200), body=STRUCK[struck]
    )
    ended = job(1, script, timeout=60.0)
    assert ended.ranks[0]["right"] and "Traceback" not in ended.output, ended.output


def test_peers_of_a_struck_rank_hear_of_it_and_no_sum_is_wrong(job):
    """Rank 0 is struck in every round; then both go on with what `shrink_group` makes."""
    script = """
import random, signal
from mpi4py import MPI
class Struck(Exception): pass
armed = False

def strike(number, frame):
    if armed:
        raise Struck("struck")

signal.signal(signal.SIGALRM, strike)
random.seed(1)
pg = mc.new_group(timeout=20)
rounds = {rounds}
for n in range(rounds):
    x, i = np.zeros(500), 0
    try:
        if RANK == 0:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 5e-3))
        while True:
            x[:] = i
            pg.allreduce(x).wait()
            assert (x == 2 * i).all(), (x, i)
            i += 1
    except Struck:
        armed = False
    except MpicollError as error:
        refused = isinstance(error, CollectiveMismatchError) and "Struck" in str(error)
        assert RANK == 1 and (pg.is_broken or refused), (RANK, error)
    pg = pg.shrink_group(timeout=10, group_name="again")
report(rounds=n + 1)
"""
    rounds = soak(500, 40)
    ended = job(2, script.replace("{rounds}", str(rounds)), timeout=soak(300.0, 60.0))
    assert [rank["rounds"] for rank in ended.ranks] == [rounds] * 2, ended.output


def test_an_interrupted_shutdown_is_gone_on_with(job):
    script = """
import signal
class Struck(Exception): pass

def strike(number, frame):
    raise Struck("struck")

signal.signal(signal.SIGALRM, strike)
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 0:
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        pg.shutdown()
        report(error="none")
    except Struck:
        report(error="Struck", broken=pg.is_broken)
    pg.shutdown()
else:
    time.sleep(1)
    pg.shutdown()
assert pg.is_closed
"""
    ended = job(2, script)
    assert ended.ranks[0]["error"] == "Struck", ended.output
