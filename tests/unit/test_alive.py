"""Processes that die are seen to, by pidfd and by lock; others, and stopped ones, are not."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time

import pytest

from mpicoll.runtime import processes
from mpicoll.runtime.processes import Identity, Watch

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]

pytestmark = pytest.mark.skipif(
    processes.identity().namespace == processes.NOBODY, reason="this system has no pidfds"
)


@pytest.fixture
def child():
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def identity_of(pid: int) -> Identity:
    started = int(processes._status(pid)[processes._STARTED])
    return Identity(processes.identity().namespace, pid, started)


def soon(watch: Watch) -> bool:
    until = time.monotonic() + 0.2
    while time.monotonic() < until:
        if watch.look():
            return True
        time.sleep(0.001)
    return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_death_is_seen_and_how(child, number):
    watch, who = Watch(), identity_of(child.pid)
    watch.add(who)
    watch.add(who)
    assert not watch.look() and not watch.dead
    child.send_signal(number)
    assert soon(watch)
    assert watch.dead == {who: f"was killed by {signal.Signals(number).name}"}
    assert not watch.look(), "it is news only once"


@pytest.mark.parametrize("foreign", [False, True])
def test_only_the_deaths_of_this_world_are_losses(child, foreign):
    watch, who = Watch(), identity_of(child.pid)
    watch.add(who, foreign=foreign)
    child.kill()
    assert soon(watch)
    assert watch.lost == ([] if foreign else ["was killed by SIGKILL"]) and who in watch.dead


def test_an_exit_is_a_death_too():
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read(); sys.exit(3)"],
                             stdin=subprocess.PIPE)  # fmt: skip
    watch, who = Watch(), identity_of(child.pid)
    watch.add(who)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert watch.look() and watch.dead[who] == "ended with exit code 3"
    child.wait()


def test_who_is_gone_already_or_was_another_process_of_that_pid(child):
    watch, me = Watch(), processes.identity()
    earlier = me._replace(started=me.started - 1)
    watch.add(earlier)
    who = identity_of(child.pid)
    child.kill()
    child.wait()
    watch.add(who)
    assert watch.dead == {earlier: "died", who: "died"}


def test_a_stopped_process_lives(child):
    watch, who = Watch(), identity_of(child.pid)
    watch.add(who)
    assert not processes.is_stopped(who)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert processes.is_stopped(who) and not watch.look()
    child.send_signal(signal.SIGCONT)


def test_a_lock_dies_with_its_holder(tmp_path):
    from mpicoll.runtime.memory import NodeMemory, bytes_of

    path = tmp_path / "room"
    path.write_bytes(bytes(bytes_of(2)))
    held = (
        f"import fcntl; f = open({str(path)!r}, 'r+b'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 1); "
        "print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", held], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    file = os.open(path, os.O_RDWR)
    memory = NodeMemory(mmap.mmap(file, bytes_of(2)), 0, 2, file)
    assert memory.locked and not memory.has_died(1)
    holder.kill()
    holder.wait()
    assert memory.has_died(1) and memory.has_died(1)
    holder.stdin.close()
    holder.stdout.close()
