"""What is asked of nccl4py, in which thread, and what becomes of its errors.  Nothing moves."""

from __future__ import annotations

import contextlib
import importlib
import re
import threading
import time
from collections.abc import Iterator

import pytest

from mpicoll.errors import TransportError, UnsupportedError
from mpicoll.transports.cuda import binding as cuda_nccl
from mpicoll.transports.cuda.binding import Communicator, join

LIMIT = 10  # seconds


class NcclError(Exception):
    def __init__(self, status):
        super().__init__(f"InvalidUsage ({status})")
        self.status = status


class Config:
    pass


class Binding:
    """Stands where nccl4py's low-level module would: notes calls, their threads, and the GPU."""

    Config = Config

    class UniqueId:
        from_buffer = staticmethod(lambda name: ("id", name))

    def __init__(self):
        self.calls, self.threads = [], []
        self.gate = threading.Event()
        self.gate.set()
        self.status, self.fails = 0, set()

    def get_last_error(self, handle):
        return "a cable is loose"

    def get_error_string(self, status):
        return f"status {status}"

    def comm_get_async_error(self, handle):
        return self.status

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            self.threads.append(threading.current_thread())
            assert self.gate.wait(LIMIT)
            if name in self.fails:
                raise NcclError(5)
            return f"{name}-{len(self.calls)}"

        return call


class Gpu:
    def __init__(self):
        self.thread = threading.local()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.thread.active = True
        yield
        self.thread.active = False


@pytest.fixture
def binding(monkeypatch):
    found = Binding()
    monkeypatch.setattr(cuda_nccl, "load", lambda: found)
    return found


def settle(communicator: Communicator) -> None:
    end = time.monotonic() + LIMIT
    while not communicator.settled():
        assert time.monotonic() < end
        time.sleep(1e-4)


@pytest.fixture
def made(binding) -> Communicator:
    communicator = join(Gpu(), 4, b"7" * 128, 2)
    settle(communicator)
    del binding.calls[:], binding.threads[:]
    return communicator


def test_it_is_made_aside(binding):
    binding.gate.clear()
    communicator = join(Gpu(), 4, b"7" * 128, 2)
    assert not communicator.settled() and not communicator.settled()
    binding.gate.set()
    settle(communicator)
    ((name, *arguments, config),) = binding.calls
    assert (name, arguments) == ("comm_init_rank_config", [4, ("id", b"7" * 128), 2])
    assert config.launch_order_implicit == 1 and not hasattr(config, "blocking")
    assert binding.threads[0] is not threading.current_thread()


def test_the_first_call_of_its_kind_is_made_aside_and_all_others_here(binding, made):
    def reduce_something():
        made.all_reduce(1, 2, 3, 7, 0, 99)

    binding.gate.clear()
    assert made.perform([reduce_something], "one kind") is False
    assert not made.settled()
    binding.gate.set()
    settle(made)
    assert made.perform([reduce_something], "one kind") is True
    assert made.perform([reduce_something], "another kind") is False
    settle(made)
    assert [call[:7] for call in binding.calls] == [
        ("all_reduce", 1, 2, 3, 7, 0, "comm_init_rank_config-1")
    ] * 3
    here = [thread is threading.current_thread() for thread in binding.threads]
    assert here == [False, True, False]


def test_several_operations_are_one_group_which_ends_whatever_happens(binding, made):
    operations = [lambda: made.send(1, 2, 1, 0, 99), lambda: made.recv(3, 2, 1, 0, 99)]
    made.perform(operations, "p")
    settle(made)
    assert [call[0] for call in binding.calls] == ["group_start", "send", "recv", "group_end"]
    binding.fails.add("recv")
    with pytest.raises(TransportError, match="InvalidUsage.*a cable is loose"):
        made.perform(operations, "p")
    assert binding.calls[-1] == ("group_end",)
    assert made.perform([], "nothing") is False
    settle(made)


@pytest.mark.parametrize("status", [1, 6, 7, 8])
def test_what_went_wrong_beside(binding, made, status):
    """7 is "in progress"; 8, a time-out, is newer than some bindings' tables."""
    binding.status = status
    if status == 7:
        assert made.settled()
        return
    with pytest.raises(TransportError, match=f"status {status}. a cable is loose") as caught:
        made.settled()
    assert caught.value.code == status


def test_what_failed_aside_is_raised_where_it_is_looked_for(binding):
    binding.fails.add("comm_init_rank_config")
    communicator = join(Gpu(), 4, b"7" * 128, 2)
    with pytest.raises(TransportError, match="NCCL failed: InvalidUsage") as caught:
        settle(communicator)
    assert caught.value.code == 5


def test_a_part_is_made_aside(binding, made):
    part = made.split(3, 1)
    settle(part)
    assert binding.calls == [("comm_split", "comm_init_rank_config-1", 3, 1, 0)]
    part.perform([lambda: part.broadcast(1, 2, 3, 1, 0, 99)], "b")
    settle(part)
    assert binding.calls[-1] == ("broadcast", 1, 2, 3, 1, 0, "comm_split-1", 99)


def test_it_is_given_back_aside(binding, made):
    for _ in made.close():
        pass
    assert [call[0] for call in binding.calls] == ["comm_finalize", "comm_destroy"]
    assert threading.current_thread() not in binding.threads


def test_an_abort_returns_at_once_and_happens_once(binding, made):
    binding.gate.clear()
    for _ in range(3):
        made.abort()
    binding.gate.set()
    wait_for_threads()
    assert binding.calls == [("comm_abort", "comm_init_rank_config-1")]
    with pytest.raises(TransportError, match="was aborted"):
        made.settled()


def test_it_is_quiet_again_when_all_aborts_are_over(binding, made):
    other = join(Gpu(), 4, b"7" * 128, 2)
    settle(other)
    assert made.is_quiet()
    binding.gate.clear()
    made.abort()
    assert not made.is_quiet() and not other.is_quiet()
    binding.fails.add("comm_abort")
    binding.gate.set()
    wait_for_threads()
    assert made.is_quiet() and other.is_quiet()


def test_what_is_never_made_keeps_nobody(binding, made):
    binding.gate.clear()
    stuck = join(Gpu(), 4, b"7" * 128, 2)
    stuck.abort()
    time.sleep(0.01)
    assert made.is_quiet()
    binding.gate.set()
    wait_for_threads()
    assert made.is_quiet() and binding.calls[-1][0] == "comm_abort"


def wait_for_threads() -> None:
    for thread in threading.enumerate():
        if thread.name == "mpicoll NCCL":
            thread.join(LIMIT)


def test_what_is_aborted_while_it_is_made_is_aborted_when_it_is(binding):
    binding.gate.clear()
    communicator = join(Gpu(), 4, b"7" * 128, 2)
    communicator.abort()
    with pytest.raises(TransportError, match="was aborted"):
        communicator.settled()
    binding.gate.set()
    wait_for_threads()
    assert binding.calls[-1] == ("comm_abort", "comm_init_rank_config-1")


def test_what_is_aborted_while_it_is_given_back(binding, made):
    """As where a peer stalls: the end of the kernels is what finalizing waits for."""
    binding.gate.clear()
    steps = made.close()
    next(steps)
    made.abort()
    with pytest.raises(TransportError, match="was aborted"):
        next(steps)
    binding.gate.set()
    wait_for_threads()
    assert ("comm_abort", "comm_init_rank_config-1") in binding.calls
    assert "comm_destroy" not in [call[0] for call in binding.calls]


def test_a_factor_is_read_from_the_host_in_the_elements_dtype(binding, made):
    binding.red_op_create_pre_mul_sum = lambda *arguments: seen.append(arguments) or 1000
    seen = []
    assert made.premul_sum(8, 0.5) == 1000
    ((address, kind, residence, handle),) = seen
    assert address and (kind, residence, handle) == (8, 1, "comm_init_rank_config-1")
    made.drop(1000)
    assert binding.calls == [("red_op_destroy", 1000, "comm_init_rank_config-1")]


def test_without_nccl4py(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nccl", None)
    with pytest.raises(UnsupportedError, match=r"nccl4py.*pip install 'mpicoll\[cuda12\]'"):
        cuda_nccl.version()


def test_the_names_and_arguments_are_nccl4pys():
    """Where its wheel is installed; it needs neither NCCL nor a GPU to be looked at."""
    try:
        binding = importlib.import_module("nccl.bindings.nccl")
    except ImportError:
        pytest.skip("nccl4py is not installed")
    wanted = {
        "all_reduce": "sendbuff, recvbuff, count, datatype, op, comm, stream",
        "reduce": "sendbuff, recvbuff, count, datatype, op, root, comm, stream",
        "broadcast": "sendbuff, recvbuff, count, datatype, root, comm, stream",
        "reduce_scatter": "sendbuff, recvbuff, recvcount, datatype, op, comm, stream",
        "all_gather": "sendbuff, recvbuff, sendcount, datatype, comm, stream",
        "send": "sendbuff, count, datatype, peer, comm, stream",
        "recv": "recvbuff, count, datatype, peer, comm, stream",
        "comm_init_rank_config": "nranks, comm_id, rank, config",
        "comm_split": "comm, color, key, config",
        "comm_finalize": "comm",
        "comm_destroy": "comm",
        "comm_abort": "comm",
        "comm_get_async_error": "comm",
        "get_error_string": "result",
        "get_last_error": "comm",
        "red_op_create_pre_mul_sum": "scalar, datatype, residence, comm",
        "red_op_destroy": "op, comm",
        "group_start": "",
        "group_end": "",
        "get_unique_id": "",
        "get_version": "",
    }
    for name, arguments in wanted.items():
        said = re.search(r"\((.*?)\)", getattr(binding, name).__doc__)[1]
        assert [word.split()[-1] for word in said.split(", ") if word] == [
            word for word in arguments.split(", ") if word
        ], name
    assert hasattr(binding.Config(), "launch_order_implicit")
    assert int(binding.ScalarResidence.HostImmediate) == cuda_nccl._ON_HOST
