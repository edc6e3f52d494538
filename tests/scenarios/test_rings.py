"""Messages through rings, where ranks stop, die, end, or have no compiled core."""

from __future__ import annotations

import pytest

from mpicoll.transports.shm import core
from tests.harness import launch

pytestmark = pytest.mark.skipif(not core.available(), reason="there is no compiled core here")


def test_a_rank_with_the_core_beside_one_without(job):
    script = """
if RANK == 1:
    os.environ["MPICOLL_NATIVE"] = "0"
pg = mc.new_group(timeout=20)
me, n = pg.rank(), pg.size()
for size in (0, 3, 5000, 200_000):
    x = np.zeros(size)
    mc.wait_all([pg.recv(x, (me - 1) % n), pg.send(np.full(size, 1.0 + me), (me + 1) % n)])
    assert (x == 1 + (me - 1) % n).all()
report(rings=pg._rings is not None)
"""
    assert job(3, script)["rings"] == [False] * 3


def test_a_large_message_of_a_stopped_sender_comes(job):
    """Its receiver reads it by itself."""
    script = """
import signal
pg = mc.new_group(timeout=20)
if RANK == 0:
    pg.send(np.array([os.getpid()]), 1).wait()
    work = pg.send(np.ones(3_000_000), 1, tag=1)
    os.kill(os.getpid(), signal.SIGSTOP)
    work.wait()
    report(same=True)
else:
    pid, x = np.zeros(1, int), np.zeros(3_000_000)
    pg.recv(pid, 0).wait()
    time.sleep(0.3)
    pg.recv(x, 0, tag=1, timeout=5).wait()
    report(same=bool((x == 1).all()))
    os.kill(int(pid[0]), signal.SIGCONT)
"""
    assert job(2, script)["same"] == [True, True]


@pytest.mark.parametrize("size", [3, 3_000_000])
def test_a_send_to_a_stopped_receiver_keeps_its_deadline(size):
    """Small ones have room, until the ring is full."""
    script = f"""
import signal
pg = mc.new_group(timeout=20)
if RANK == 1:
    pg.send(np.array([os.getpid()]), 0).wait()
    os.kill(os.getpid(), signal.SIGSTOP)
else:
    pid = np.zeros(1, int)
    pg.recv(pid, 1).wait()
    time.sleep(0.3)
    start, x = time.monotonic(), np.ones({size})
    try:
        while True:
            pg.send(x, 1, timeout=0.5).wait()
            start = time.monotonic()
    except mc.CollectiveTimeoutError as error:
        report(took=time.monotonic() - start, said=str(error))
    os.kill(int(pid[0]), signal.SIGCONT)
"""
    ended = launch(2, script, 40)
    assert not ended.timed_out, ended.output
    told = ended.ranks[0]
    assert told is not None and 0.4 < told["took"] < 1.5, ended.output
    assert "the receiver did not take the message" in told["said"] and "rank 1" in told["said"]


@pytest.mark.parametrize("size", [3, 3_000_000])
@pytest.mark.parametrize("source", ["0", "mc.ANY_SOURCE"])
def test_a_sender_that_is_killed(size, source):
    """What it has sent through the ring comes; the rest of it is a peer that died."""
    script = f"""
pg = mc.new_group(timeout=20)
if RANK == 0:
    pg.send(np.ones({size}), 1)
    os.kill(os.getpid(), 9)
time.sleep(0.5)
start, x, outcome = time.monotonic(), np.zeros({size}), ""
try:
    pg.recv(x, {source}).wait()
    outcome = "received" if (x == 1).all() else "wrong"
    pg.recv(x, {source}).wait()
except MpicollError as error:
    outcome += " " + type(error).__name__ + " " + str(error)
report(took=time.monotonic() - start, outcome=outcome)
"""
    ended = launch(2, script, 40)
    assert not ended.timed_out, ended.output
    told = ended.ranks[1]
    if told is None:
        assert ended.code != 0  # the launcher has ended the job
        return
    assert told["took"] < 5 and "RankFailedError" in told["outcome"], told
    assert "wrong" not in told["outcome"], told


def test_a_sender_that_is_killed_while_it_is_waited_for():
    script = """
pg = mc.new_group(timeout=20)
if RANK == 0:
    time.sleep(0.5)
    os.kill(os.getpid(), 9)
start, outcome = time.monotonic(), ""
try:
    pg.recv(np.zeros(3), 0).wait()
except MpicollError as error:
    outcome = type(error).__name__
report(took=time.monotonic() - start, outcome=outcome)
"""
    ended = launch(2, script, 40)
    assert not ended.timed_out, ended.output
    told = ended.ranks[1]
    if told is not None:
        assert told["outcome"] == "RankFailedError" and told["took"] < 5, told
    else:
        assert ended.code != 0


@pytest.mark.parametrize("size", [3, 300_000])
def test_an_end_with_messages_that_nobody_receives(job, size):
    """Small ones were done long before; of a large one its sender's end says what became of it."""
    script = f"""
pg = mc.new_group(timeout=20)
pg.send(np.ones({size}), (RANK + 1) % pg.size(), tag=3)
report(there=True)
"""
    ended = job(3, script)
    assert ended["there"] == [True] * 3
    assert ("was not received by the end" in ended.output) == (size > 3), ended.output


def test_an_end_with_receives_for_which_nothing_comes(job):
    script = """
pg = mc.new_group(timeout=20)
work = pg.recv(np.zeros(3), (RANK + 1) % pg.size(), tag=3)
report(there=True)
"""
    ended = job(3, script)
    assert ended["there"] == [True] * 3 and "no message came for it" in ended.output


def test_a_peer_that_leaves_while_a_message_is_waited_for(job):
    script = """
pg = mc.new_group(timeout=20)
outcome = ""
if RANK == 0:
    time.sleep(0.3)
    pg.abort()
else:
    try:
        pg.recv(np.zeros(3), 0).wait()
    except MpicollError as error:
        outcome = type(error).__name__
report(outcome=outcome)
"""
    assert job(3, script)["outcome"] == ["", "RemoteRankError", "RemoteRankError"]


def test_a_wait_that_an_interrupt_ends(job):
    script = """
import signal
pg = mc.new_group(timeout=20)
outcome, x = "", np.zeros(3)
if RANK == 0:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        pg.recv(x, 1).wait()
    except KeyboardInterrupt:
        outcome = "interrupted"
    pg.send(x, 1, tag=1).wait()
    pg.recv(x, 1).wait()
else:
    pg.recv(np.zeros(3), 0, tag=1).wait()
    pg.send(np.ones(3), 0).wait()
report(outcome=outcome, x=x.tolist())
"""
    ended = job(2, script)
    assert ended["outcome"][0] == "interrupted" and ended["x"][0] == [1, 1, 1]


def test_ranks_that_are_stopped_again_and_again_lose_nothing(job):
    """Whatever it is in the middle of, another rank goes on beside it."""
    script = """
import signal
pg = mc.new_group(timeout=30)
pids = pg.allgather_object(os.getpid())
me, n = pg.rank(), pg.size()
over = threading.Event()

def stop():
    rng = np.random.default_rng(me)
    while not over.is_set():
        time.sleep(rng.random() * 2e-3)
        os.kill(pids[(me + 1) % n], signal.SIGSTOP)
        time.sleep(rng.random() * 5e-4)
        os.kill(pids[(me + 1) % n], signal.SIGCONT)

thread = threading.Thread(target=stop)
if me == 0:
    thread.start()
sizes, wrong, end, i = (1, 40, 1024, 1025, 9000), 0, time.monotonic() + 4, 0
going = np.ones(1)
while going[0]:
    for _ in range(300):
        size = sizes[i % 5]
        x, y = np.full(size, me + i), np.zeros(size, int)
        works = [pg.recv(y, (me - 1) % n, tag=i % 2), pg.send(x, (me + 1) % n, tag=i % 2)]
        mc.wait_all(works)
        wrong += not (y == (me - 1) % n + i).all()
        i += 1
    going[0] = time.monotonic() < end
    pg.broadcast(going, 0).wait()
over.set()
if me == 0:
    thread.join()
report(wrong=int(wrong), i=i)
"""
    ended = job(3, script, 60)
    assert ended["wrong"] == [0, 0, 0] and ended["i"][0] >= 300
