"""A rank that raises, leaves, dies, is interrupted or forks: its peers hear of it; the job ends."""

from __future__ import annotations

import os
import re

import pytest

from tests.soak import soak

SOON = 5.0  # seconds from the cause to the end of the job
AT_ONCE = 1.0  # seconds from the cause until those who wait have raised

# What ends rank 1; the error of those who wait for it, and what it says.
CAUSES = {
    "an uncaught exception": ("raise ValueError('boom')", "RemoteRankError", "boom"),
    "sys.exit": ("sys.exit(4)", "RemoteRankError", "exit code 4"),
    "SystemExit": ("raise SystemExit(4)", "RemoteRankError", "left the program"),
    "an exception in a with statement": (
        "with pg: raise ValueError('boom')",
        "RemoteRankError",
        "boom",
    ),
    "an exception in a thread": (
        "threading.Thread(target=lambda: 1 / 0).start(); time.sleep(60)",
        "RemoteRankError",
        "ZeroDivisionError",
    ),
    "KeyboardInterrupt": ("os.kill(os.getpid(), 2); time.sleep(60)", "RemoteRankError", "Keyboard"),
    "SIGKILL": ("os.kill(os.getpid(), 9)", "RankFailedError", ""),
    "SIGSEGV": ("os.kill(os.getpid(), 11)", "RankFailedError", ""),
}
TWICE = soak([*CAUSES], ["an uncaught exception", "an exception in a thread", "SIGKILL"])
TRIED = [("auto", cause) for cause in CAUSES] + [("mpi", cause) for cause in TWICE]


@pytest.mark.parametrize("repeat", range(soak(10, 1)))
@pytest.mark.parametrize("backend, cause", TRIED)
def test_those_who_wait_raise_at_once_and_the_job_ends(job, backend, cause, repeat):
    program, error, words = CAUSES[cause]
    script = f"""
pg = mc.new_group({backend!r}, timeout=60)
pg.barrier().wait()
if RANK == 1:
    time.sleep(0.2)
    report(cause=time.time())
    {program}
try:
    pg.allreduce(np.ones(70_001)).wait()
    report(error="none")
except MpicollError as error:
    report(error=type(error).__name__, text=str(error), rank=getattr(error, "rank", None))
    raise
"""
    ended = job(3, script, fails=True)
    began = ended.ranks[1]["cause"]
    assert ended.at - began <= SOON, f"{ended.at - began:.1f} s"
    # A launcher that notices a death may end the others before they can say anything.
    told = [ended.ranks[r] for r in (0, 2) if ended.ranks[r] is not None]
    assert told or error == "RankFailedError", ended.output
    for rank in told:
        assert (rank["error"], rank["rank"]) == (error, 1), rank
        assert rank["wall"] - began <= AT_ONCE, rank
        assert "rank 1" in rank["text"] and words in rank["text"], rank
    if cause == "an exception in a thread":
        assert "mpicoll: rank 1 raised in thread 'Thread-" in ended.output, ended.output


@pytest.mark.parametrize("cause", ["an uncaught exception", "sys.exit", "an exception in a thread"])
def test_a_job_whose_other_ranks_never_get_there_is_ended_after_the_grace_period(job, cause):
    script = f"""
pg = mc.new_group(timeout=60)
pg.barrier().wait()
report(cause=time.time())
if RANK == 1:
    {CAUSES[cause][0].replace("time.sleep(60)", "time.sleep(0.1)")}
else:
    time.sleep(60)
"""
    ended = job(3, script, fails=True, env={"MPICOLL_GRACE": "1"})
    took = ended.at - ended.ranks[1]["cause"]
    assert 1 <= took <= 1 + SOON, f"{took:.1f} s"
    assert ended.code == (4 if cause == "sys.exit" else 1)


def test_a_job_that_is_ended_though_its_programs_did_well_says_why(job):
    script = """
pg = mc.new_group(timeout=60)
if RANK == 1:
    time.sleep(60)
try:
    pg.allreduce(np.ones(3), timeout=0.2).wait()
except CollectiveTimeoutError:
    pass
"""
    ended = job(2, script, fails=True, env={"MPICOLL_GRACE": "0.5"})
    assert ended.code == 1 and "ranks [1] of group 'world' are not at theirs" in ended.output


def test_the_next_call_hears_of_it_too(job):
    """The peers were not waiting when it happened, and what they were doing goes on."""
    script = """
pg = mc.new_group(timeout=60)
pg.barrier().wait()
if RANK == 1:
    raise ValueError("boom")
time.sleep(1)
start = time.monotonic()
try:
    pg.allreduce(np.ones(3)).wait()
except RemoteRankError as error:
    report(rank=error.rank, took=time.monotonic() - start)
"""
    ended = job(3, script, fails=True)
    for told in (ended.ranks[0], ended.ranks[2]):
        assert told is not None and told["rank"] == 1 and told["took"] < 0.5, ended.output


def test_the_exit_code_is_that_of_the_rank_that_failed(job):
    for code, program in {7: "sys.exit(7)", 1: "sys.exit('no such file')"}.items():
        script = f"""
pg = mc.new_group(timeout=60)
pg.barrier().wait()
if RANK == 1:
    {program}
time.sleep(20)
"""
        assert job(2, script, fails=True, env={"MPICOLL_GRACE": "0.5"}).code == code


def test_run_knows_an_exit_code_that_is_only_raised(job, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, time, mpicoll as mc\n"
        "pg = mc.new_group(timeout=60)\n"
        "pg.barrier().wait()\n"
        "if pg.rank() == 1: raise SystemExit(len(sys.argv))\n"
        "time.sleep(20)\n"
    )
    script = f"""
import runpy
sys.argv = ["mpicoll", "run", {str(program)!r}, "one", "two"]
runpy.run_module("mpicoll", run_name="__main__", alter_sys=True)
"""
    assert job(2, script, fails=True, env={"MPICOLL_GRACE": "0.5"}).code == 3


def test_sys_exit_that_the_program_catches_is_no_end(job):
    script = """
pg = mc.new_group(timeout=20)
try:
    sys.exit(4)
except SystemExit as error:
    code = error.code
x = np.ones(3)
pg.allreduce(x).wait()
report(code=code, total=x[0])
sys.exit()
"""
    ended = job(2, script)
    assert ended["code"] == [4, 4] and ended["total"] == [2.0, 2.0]


def test_all_ranks_that_exit_with_a_code_end_by_themselves(job):
    ended = job(3, "pg = mc.new_group(timeout=20)\nreport(at=1)\nsys.exit(3)", fails=True)
    assert ended["at"] == [1, 1, 1] and "MPI_Abort" not in ended.output, ended.output


def test_a_healthy_rank_is_not_killed_in_the_middle_of_its_checkpoint(job):
    """It knows of the failure, so those who leave before it wait for it."""
    script = """
pg = mc.new_group(timeout=60)
pg.barrier().wait()
if RANK == 1:
    raise ValueError("boom")
try:
    pg.allreduce(np.ones(3)).wait()
except RemoteRankError:
    if RANK == 0:
        time.sleep(4)
        report(checkpoint="written")
"""
    ended = job(3, script, fails=True, env={"MPICOLL_GRACE": "0.5"})
    assert ended.ranks[0] and ended.ranks[0]["checkpoint"] == "written", ended.output


def test_a_stopped_rank_is_a_timeout_that_names_it(job):
    script = """
import signal
pg = mc.new_group(timeout=60)
pids = pg.allgather_object(os.getpid())
if RANK == 2:
    report(stopped=True)
    os.kill(os.getpid(), signal.SIGSTOP)
start = time.monotonic()
try:
    pg.barrier(timeout=1).wait()
except CollectiveTimeoutError as error:
    report(missing=list(error.missing), text=str(error), took=time.monotonic() - start)
time.sleep(0.5)
os.kill(pids[2], signal.SIGCONT)
"""
    ended = job(3, script, fails=True)
    for told in ended.ranks[:2]:
        assert told["missing"] == [2] and 0.99 <= told["took"] <= 1.1, told
        assert "stopped by a signal" in told["text"] and "allgather_object #1" in told["text"], told


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


def test_a_thread_that_raises_breaks_the_groups_of_its_rank(job):
    """The thread may have been the one for which the others wait."""
    script = """
pg = mc.new_group(timeout=20)
side = pg.split(0)
pg.barrier().wait()
if RANK == 1:
    def fail():
        raise ValueError("in a thread")
    thread = threading.Thread(target=fail, name="worker")
    thread.start()
    thread.join()
errors = []
for group in (pg, side):
    try:
        group.allreduce(np.ones(3)).wait()
    except MpicollError as error:
        errors.append([type(error).__name__, "in thread 'worker'" in str(error)])
report(errors=errors)
"""
    ended = job(2, script, fails=True)
    assert ended["errors"] == [[["RemoteRankError", True]] * 2, [["GroupBrokenError", True]] * 2]


def test_a_thread_that_raises_where_nobody_waits_is_the_programs_own_business(job):
    """Alone, or with all groups shut down; and a thread may end by SystemExit."""
    script = """
for target in (lambda: 1 / 0, sys.exit):
    with mc.new_group(timeout=20) as pg:
        pg.barrier().wait()
        if target is sys.exit:
            thread = threading.Thread(target=target, args=[3])
            thread.start()
            thread.join()
            pg.barrier().wait()
    if target is not sys.exit:
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
report(done=True)
"""
    ended = job(2, script)
    assert ended["done"] == [True, True] and "ZeroDivisionError" in ended.output
    alone = job(1, "pg = mc.new_group()" + script)  # which stays open
    assert alone["done"] == [True]


def test_sys_exit_is_still_what_it_was(job):
    script = """
import copy, pickle
pg = mc.new_group(timeout=20)
caught = []
for status in ((), (None,), (3,), ("words",)):
    try:
        sys.exit(*status)
    except SystemExit as error:
        again = pickle.loads(pickle.dumps(error))
        caught.append([repr(error), error.code, type(again) is SystemExit and again.code])
        error.code = 7
        assert error.code == 7
report(caught=caught)
"""
    for caught in job(2, script)["caught"]:
        assert caught == [
            ["SystemExit()", None, None],
            ["SystemExit()", None, None],
            ["SystemExit(3)", 3, 3],
            ["SystemExit('words')", "words", "words"],
        ]


def test_a_wrong_grace_period_is_refused_at_once(job):
    script = """
try:
    mc.new_group(timeout=20)
except InvalidCallError as error:
    report(said=str(error))
"""
    for said in job(2, script, env={"MPICOLL_GRACE": "soon"})["said"]:
        assert "MPICOLL_GRACE" in said and "'soon'" in said


def test_forked_children_end_as_they_like_and_the_rank_goes_on(job):
    script = """
pg = mc.new_group(timeout=20)
codes = []
for end in ("sys.exit(3)", "sys.exit()", "1 / 0", "pass"):
    child = os.fork()
    if child == 0:
        exec(end)
        break
    _, status = os.waitpid(child, 0)
    codes.append(os.waitstatus_to_exitcode(status))
else:
    x = np.full(3, RANK + 1.0)
    pg.allreduce(x).wait()
    report(codes=codes, total=x[0])
"""
    ended = job(2, script)
    assert ended["codes"] == [[3, 0, 1, 0]] * 2 and ended["total"] == [3.0, 3.0]


# What rank 1 never waits for, and what is said of it; "" if it ends well.
UNASKED = {
    "a receive": ("pg.recv(np.ones(3), 0)", "no message came for it"),
    "a receive from anyone": ("pg.recv(np.ones(3), tag=7)", "no message came for it"),
    "a large send": ("pg.send(np.ones(1_000_000), 0)", "was not received"),
    "a large send to itself": ("pg.send(np.ones(1_000_000), 1)", "was not received"),
    "a small send": ("pg.send(np.ones(3), 0)", ""),
    "a thousand receives": ("[pg.recv(np.ones(1), i % 3) for i in range(1000)]", "999 more"),
    "receives in several groups": (
        "[group.recv(np.ones(1), 0) for group in (pg, more, last)]",
        "2 more",
    ),
    "a receive in a dropped group": ("pg.split(0).recv(np.ones(1), 0)", "no message came for it"),
    "a small collective": ("pg.allreduce(np.ones(3))", "left the program"),
    "a large collective": ("pg.allreduce(np.ones(1_000_000))", "left the program"),
    "what fails at once": ("time.sleep(1); pg.allreduce(np.ones(3))", "left the program"),
    "a split of others": ("pg.split(0).barrier()", "left the program"),
}


@pytest.mark.parametrize("what", UNASKED)
def test_what_nobody_waits_for_does_not_decide_how_the_job_ends(job, what):
    call, said = UNASKED[what]
    script = f"""
pg = mc.new_group(timeout=60)
more = pg.split(0)
last = pg.split(0)
if "pg.split" in {call!r} and RANK != 1:
    pg.split(0)
if RANK == 1:
    {call}  # here
report(wall=time.time())
"""
    ended = job(3, script)
    assert ended.at - ended.ranks[1]["wall"] <= SOON
    lines = [line for line in ended.output.splitlines() if line.strip()]
    if not said:
        assert not lines, ended.output
    else:
        assert len(lines) == 1 and said in lines[0] and "rank 1" in lines[0], ended.output
        assert "/script.py:" in lines[0], ended.output


def test_a_message_to_oneself_that_is_never_received(job):
    """A group of one rank has nobody to take leave of."""
    script = """
from mpi4py import MPI
pg = mc.new_group(comm=MPI.COMM_SELF)
pg.recv(np.ones(3), 0)
pg.send(np.ones(1_000_000), 0, tag=1)
report(done=True)
"""
    ended = job(2, script)
    assert ended["done"] == [True, True] and ended.output.count("and so 1 more") == 2, ended.output


@pytest.mark.parametrize("call", ["allreduce(x)", "send(x, 1)", "recv(x, 1)"])
def test_what_nobody_waits_for_waits_for_the_peer(job, call):
    """As MPI_Finalize does: the peer may compute for longer than any grace period."""
    other = {"allreduce(x)": call, "send(x, 1)": "recv(x, 0)", "recv(x, 1)": "send(x, 0)"}[call]
    script = f"""
pg = mc.new_group(timeout=60)
x = np.full(1_000_000, RANK + 1.0)
if RANK == 0:
    pg.{call}
    report(total=0)
else:
    time.sleep(4)
    pg.{other}.wait()
    report(total=x[-1])
"""
    ended = job(2, script, env={"MPICOLL_GRACE": "0.5"})
    assert ended["total"][1] == {"a": 3, "s": 1, "r": 2}[call[0]]
    if call[0] == "a":  # its result is never read: that may be a mistake
        assert re.match(r".*/script\.py:\d+: DroppedWorkWarning: allreduce\(", ended.output)
    assert ended.output.count("Warning: ") == (call[0] == "a"), ended.output


def test_pytest_ends_with_its_own_code_after_a_test_that_leaves_a_receive(job, tmp_path):
    program = tmp_path / "test_it.py"
    program.write_text(
        "import numpy as np, mpicoll as mc\n"
        "def test_it():\n"
        "    pg = mc.new_group(timeout=60)\n"
        "    if pg.rank() == 1: pg.recv(np.ones(3), 0)\n"
    )
    script = f"""
import pytest
code = pytest.main(["-q", "-p", "no:cacheprovider", {str(program)!r}])
report(code=int(code))
sys.exit(code)
"""
    ended = job(2, script)
    assert ended["code"] == [0, 0] and "test_it.py:4" in ended.output, ended.output


def test_a_job_that_is_aborted_leaves_nothing_of_the_mpi_library_in_shared_memory(job):
    script = """
pg = mc.new_group(timeout=60)
pg.barrier().wait()
with open("/proc/self/maps") as maps:
    files = {line.split()[-1] for line in maps if "/dev/shm/" in line}
report(files=[file for file in files if "mpich_shm_" in file or "sm_segment." in file])
pg.barrier().wait()
if RANK == 1:
    raise ValueError("boom")
time.sleep(60)
"""
    ended = job(3, script, fails=True, env={"MPICOLL_GRACE": "0.5"})
    files = {file for files in ended["files"] for file in files}
    assert files and not [file for file in files if os.path.exists(file)]


HOOKS = """
sys.excepthook = lambda *error: print("hooked", flush=True)
threading.excepthook = lambda args: print("hooked in", args.thread.name, flush=True)
"""


@pytest.mark.parametrize("where", ["the main program", "a thread", "one that waits for a thread"])
def test_hooks_that_the_program_sets_later_hide_no_cause(job, where):
    """As rich.traceback.install() and pytest set theirs."""
    script = f"""
pg = mc.new_group(timeout=60)
pg.barrier().wait()
{HOOKS}
def fail():
    raise ValueError("boom")
where = {where!r}
if RANK == 1:
    report(cause=time.time())
    if where == "the main program":
        fail()
    if where == "a thread":
        threading.Thread(target=fail, name="worker").start()
        time.sleep(60)
    threading.Thread(target=pg.barrier().wait).start()  # it ends when the others have come, or left
    fail()
if where == "one that waits for a thread":
    time.sleep(0.5)
try:
    pg.allreduce(np.ones(3)).wait()
except RemoteRankError as error:
    report(rank=error.rank, text=str(error))
"""
    ended = job(3, script, fails=True, env={"MPICOLL_GRACE": "1"})
    assert "hooked in worker" if where == "a thread" else "hooked" in ended.output, ended.output
    for told in (ended.ranks[0], ended.ranks[2]):
        assert told["rank"] == 1 and "boom" in told["text"], told


def test_the_hook_of_threads_can_be_read_set_and_put_back(job):
    script = """
from unittest import mock
first = threading.excepthook
pg = mc.new_group(timeout=20)
said = [threading.excepthook is first]
def other(args):
    said.append("other")
    raise KeyError("of the hook")
with mock.patch.object(threading, "excepthook", other):
    said.append(threading.excepthook is other)
said.append(threading.excepthook in (first, threading.__excepthook__))
pg.shutdown()
threading.excepthook = other
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
report(said=said)
"""
    assert job(1, script)["said"] == [[True, True, True, "other"]]


def test_exceptions_that_were_caught_are_not_the_end_of_the_program(job):
    """Prompts and test runners leave them where the interpreter leaves the last one."""
    script = """
pg = mc.new_group(timeout=20)
def caught():
    try:
        1 / 0
    except ZeroDivisionError as error:
        sys.last_type, sys.last_value, sys.last_traceback = sys.exc_info()
caught()
report(wall=time.time())
if RANK == 1:
    time.sleep(1)
    x = np.ones(3)
    pg.split(0).allreduce(x).wait()
    report(total=x[0])
else:
    pg.split(0).allreduce(np.ones(3)).wait()
"""
    ended = job(2, script)
    assert ended.ranks[1]["total"] == 2 and not ended.output, ended.output


def test_what_runs_when_the_interpreter_ends(job):
    """Functions registered with atexit before and after the group, and __del__ at the very end."""
    script = """
import atexit
said = []
def note(name, use):
    try:
        said.append([name, repr(use())])
    except Exception as error:
        said.append([name, type(error).__name__])
    report(said=said)
atexit.register(lambda: note("before", pg.barrier))
atexit.register(lambda: note("before", pg.shutdown))
atexit.register(lambda: note("before", lambda: mc.new_group(timeout=5)))
pg = mc.new_group(timeout=20)
side = pg.split(0)
def after():
    x = np.ones(70_001)
    part = side.split(0)
    part.allreduce(x).wait()
    part.shutdown()
    return float(x[0])
atexit.register(lambda: note("after", after))
class Last:
    def __del__(self, side=side, x=np.ones(3), closed=GroupClosedError, write=os.write):
        side.shutdown()
        try:
            side.allreduce(x)
        except closed:
            write(1, b"refused at last;")
last = Last()
"""
    ended = job(2, script)
    assert ended.output.count("refused at last;") == 2, ended.output
    for said in ended["said"]:
        assert said == [
            ["after", "2.0"],
            ["before", "GroupClosedError"],
            ["before", "None"],
            ["before", "GroupClosedError"],
        ]


LEVELS = ["rc.thread_level = 'serialized'", "rc.thread_level = 'single'", "rc.threads = False"]


@pytest.mark.parametrize("level", LEVELS)
def test_without_threads_what_needs_none_works_and_the_rest_says_so(job, level):
    script = f"""
import asyncio, mpi4py
mpi4py.{level}
pg = mc.new_group(timeout=20)
said = []
def tried(use):
    try:
        use()
        said.append("done")
    except MpicollError as error:
        said.append(type(error).__name__ + ": " + str(error))
async def awaited(work):
    await work
def later(use):
    work = pg.barrier() if RANK == 0 else time.sleep(0.3)
    try:
        if work:
            use(work)
    finally:
        (work or pg.barrier()).wait()
tried(lambda: later(lambda work: work.get_future()))
tried(lambda: later(lambda work: asyncio.run(awaited(work))))
tried(lambda: mc.new_group(timeout=20, progress="thread"))
tried(lambda: mc.new_group("nonsense" if RANK == 0 else "auto", timeout=20))
tried(lambda: pg.allreduce(np.ones(4)[::2] if RANK == 0 else np.ones(2)).wait())
work = pg.barrier()
work.wait()
tried(lambda: work.get_future().result(1))
for make in (lambda: mc.new_group(timeout=20), lambda: pg.split(0), pg.local_group):
    with make() as group:
        x = np.ones(70_001)
        group.allreduce(x).wait()
        assert x[-1] == 2
sending = pg.send(np.ones(3), 1 - RANK)
pg.recv(np.ones(3)).wait()
sending.wait()
report(said=said)
"""
    first, second = job(2, script)["said"]
    for said in first[:3]:
        assert said.startswith("InvalidCallError") and "MPI_THREAD_MULTIPLE" in said, said
    assert "backend must be one of" in first[3] and "C-contiguous" in first[4]
    assert second[:2] == ["done", "done"] and second[2].startswith("InvalidCallError")
    assert all(said.startswith("CollectiveMismatchError") for said in second[3:5])
    assert first[5] == second[5] == "done"
