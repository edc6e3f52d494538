"""A rank that raises, leaves, is interrupted or forks: the job ends, soon, and says why."""

from __future__ import annotations

import pytest

from tests.soak import soak

SOON = 6.0  # seconds from the cause to the end of the job

CAUSES = {
    "uncaught exception": "raise ValueError('boom')",
    "sys.exit": "sys.exit(4)",
    "killed": "os.kill(os.getpid(), 9)",
    "exception in a with statement": "with pg:\n        raise ValueError('boom')",
}


@pytest.mark.parametrize("cause", CAUSES)
def test_a_rank_that_leaves_ends_the_job(job, cause):
    script = f"""
pg = mc.new_group(timeout=60)
pg.barrier().wait()
if RANK == 1:
    report(cause=True)
    {CAUSES[cause]}
try:
    pg.allreduce(np.ones(70_001)).wait()
except MpicollError as error:
    report(error=type(error).__name__, text=str(error))
    raise
"""
    ended = job(3, script, fails=True)
    assert ended.at - ended.ranks[1]["wall"] <= SOON
    if "exception" in cause:
        assert "boom" in ended.output
        told = [rank for rank in (ended.ranks[0], ended.ranks[2]) if rank]
        assert told and all(rank["error"] == "RemoteRankError" for rank in told), ended.output
        assert all("rank 1" in rank["text"] and "boom" in rank["text"] for rank in told)


def test_keyboard_interrupt_while_waiting(job):
    script = """
import signal
pg = mc.new_group(timeout=20)
pg.barrier().wait()
if RANK == 1:
    time.sleep(60)
timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
timer.start()
start = time.monotonic()
try:
    pg.allreduce(np.ones(3)).wait()
except KeyboardInterrupt:
    report(took=time.monotonic() - start)
"""
    ended = job(2, script, fails=True)
    assert ended.ranks[0] is not None, ended.output
    assert ended.ranks[0]["took"] < 0.6
    assert ended.at - ended.ranks[0]["wall"] <= SOON


def test_a_signal_handler_may_launch_and_the_lock_survives(job):
    """Fifty alarms whose handler launches a call, while the main program is in the engine."""
    script = """
import signal
pg = mc.new_group(timeout=20)
side = pg.split(0)
launched = []
def alarm(*_):
    y = np.full(1 + 500 * len(launched), RANK + 1.0)
    launched.append((side.allreduce(y), y))
    if len(launched) < 50:
        signal.setitimer(signal.ITIMER_REAL, 0.002)
signal.signal(signal.SIGALRM, alarm)
signal.setitimer(signal.ITIMER_REAL, 0.002)
x, right = np.ones(70_001), True
while not all(pg.allgather_object(len(launched) == 50)):
    x[:] = 1
    pg.allreduce(x).wait()
    right = right and bool((x == 2).all())
mc.wait_all(work for work, _ in launched)
report(right=right and all(bool((y == 3).all()) for _, y in launched))
"""
    assert job(2, script)["right"] == [True, True]


def test_a_forked_child_is_not_a_rank(job):
    script = """
pg = mc.new_group(timeout=20)
child = os.fork()
if child == 0:
    refused = 0
    for use in (lambda: pg.barrier(), lambda: pg.allreduce(np.ones(3)), lambda: mc.new_group()):
        try:
            use()
        except GroupClosedError as error:
            refused += "fork" in str(error)
    os._exit(40 + refused)  # as multiprocessing's children end
_, status = os.waitpid(child, 0)
x = np.full(3, RANK + 1.0)
pg.allreduce(x).wait()
report(code=os.waitstatus_to_exitcode(status), total=x[0])
"""
    ended = job(2, script)
    assert ended["code"] == [43, 43] and ended["total"] == [3.0, 3.0]


@pytest.mark.parametrize("progress", ["caller", "thread"])
def test_children_are_forked_again_and_again_while_the_parent_communicates(job, progress):
    """As a data loader's workers are.  They end as multiprocessing ends them, by os._exit."""
    script = f"""
import multiprocessing, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of fork where there are threads
fork = multiprocessing.get_context("fork")
def load(queue, step):
    queue.put(np.full(5_000, float(step)))
pg = mc.new_group(timeout=20, progress={progress!r})
wrong = []
for step in range({soak(200, 10)}):
    queue = fork.SimpleQueue()
    x = np.full(300_000, RANK + 1.0)
    work = pg.allreduce(x)  # under way while the children start
    children = [fork.Process(target=load, args=(queue, step + i)) for i in range(2)]
    for child in children:
        child.start()
    small = np.ones(3)
    more = pg.allreduce(small)
    batch = sum(queue.get() for _ in children)
    for child in children:
        child.join()
    work.wait()
    more.wait()
    pg.allreduce(batch).wait()
    codes = [child.exitcode for child in children]
    if not ((x == 3).all() and (small == 2).all() and (batch == 4 * step + 2).all()):
        wrong.append(step)
    if codes != [0, 0]:
        wrong.append(codes)
pg.shutdown()
report(wrong=wrong)
"""
    ended = job(2, script, timeout=soak(300, 30))
    assert ended["wrong"] == [[], []], ended.output


def test_after_mpi_finalize(job):
    """The bare call would kill the process."""
    script = """
from mpi4py import MPI
pg = mc.new_group(timeout=20)
pg.barrier().wait()
MPI.Finalize()
errors = []
for use in (lambda: pg.barrier(), lambda: pg.allreduce(np.ones(3)), lambda: mc.new_group(),
            lambda: pg.send(np.ones(3), 0), lambda: pg.split_group([0])):
    try:
        use()
    except GroupClosedError as error:
        errors.append(str(error))
pg.abort()
report(errors=errors, said=[repr(pg), pg.ranks, pg.dump()])
"""
    for errors in job(2, script)["errors"]:
        assert len(errors) == 5 and all("inalize" in text for text in errors), errors


def test_groups_left_open_end_quietly(job):
    """No shutdown, Works dropped, groups in reference cycles: success is still success."""
    script = """
pg = mc.new_group(timeout=20)
pg.self = pg
more = [pg.split(0) for _ in range(3)]
works = [g.allreduce(np.ones(1000)) for g in more]
del pg
report(done=True)
"""
    ended = job(3, script)
    assert ended["done"] == [True] * 3 and not ended.output, ended.output


def test_an_exception_outside_any_group_keeps_its_exit_code_and_message(job):
    ended = job(2, "raise RuntimeError('before any group')", fails=True)
    assert "before any group" in ended.output


def test_a_thread_that_raises_does_not_end_the_job(job):
    script = """
pg = mc.new_group(timeout=20)
def fail():
    raise ValueError("in a thread")
thread = threading.Thread(target=fail)
thread.start()
thread.join()
x = np.full(3, RANK + 1.0)
pg.allreduce(x).wait()
report(total=x[0])
"""
    ended = job(2, script)
    assert ended["total"] == [3.0, 3.0] and "in a thread" in ended.output
