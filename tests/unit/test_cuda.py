"""What is asked of CUDA, and in which order.  The record of the calls is no GPU: nothing moves."""

from __future__ import annotations

import gc
import itertools
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mpicoll.arrays.device import DeviceArray
from mpicoll.errors import TransportError, UnsupportedError, translate
from mpicoll.transports.cuda.gpu import Gpu, device_for, open_gpu

GPU = DeviceArray(0x7F0000000000, 5, np.dtype("f4"))


class CudaError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class Record:
    """Stands where CuPy would: notes the calls of the runtime, with the device they are made on.

    As with CUDA, a thread has no context at first, and whatever is called there makes one, on the
    thread's device; so does choosing a device by its number.

    Attributes:
        made: the devices on which there is a context.
    """

    def __init__(self):
        self.calls, self.status, self.made = [], 600, set()
        self.numbers = itertools.count(10)
        self.thread = threading.local()
        self.cuda = SimpleNamespace(
            Stream=lambda non_blocking: SimpleNamespace(ptr=next(self.numbers)),
            Event=lambda disable_timing: SimpleNamespace(ptr=next(self.numbers)),
            runtime=self,
            driver=self,
        )
        self.CUDARuntimeError = CudaError

    @property
    def context(self):
        return getattr(self.thread, "context", 0)

    def ctxGetCurrent(self):
        return self.context

    def ctxSetCurrent(self, context):
        self.thread.context = context

    def setDevice(self, device):
        self.made.add(device)
        self.thread.context = 1000 + device

    def eventQuery(self, event):
        self.note("eventQuery", event)
        return self.status

    def note(self, name, *arguments):
        if not self.context:
            self.setDevice(0)
        self.calls.append((name, self.context - 1000, *arguments))
        return SimpleNamespace(device=self.context - 1000)

    def __getattr__(self, name):
        return partial(self.note, name)


@pytest.fixture
def cuda():
    return Record()


def made_on(cuda, device):
    """A GPU, which is the current one, with a clean record."""
    gpu = Gpu(cuda, device)
    del cuda.calls[:]
    cuda.ctxSetCurrent(1000 + device)
    return gpu


def test_no_context_is_made_on_another_gpu(cuda):
    """Each would cost some hundred MB of GPU 0, on every rank of a node."""
    gpu = Gpu(cuda, 2)
    done = gpu.to_host(GPU, np.zeros(20, np.uint8))
    with gpu.active():
        mark = gpu.mark(77)
        gpu.queue_after(mark)
    gpu.after(mark)
    gpu.hold(mark, [5])
    gpu.device_of(GPU.address)
    del done
    thread = threading.Thread(target=gpu.is_done, args=(mark,))
    thread.start()
    thread.join()
    gpu.pinned(4096)
    gc.collect()
    assert cuda.made == {2} and {call[1] for call in cuda.calls} == {2}


@pytest.mark.parametrize("before", [0, 1000, 1003])
def test_the_callers_context_stays(cuda, before):
    """None, the default GPU's, or that of a GPU of the caller's own choice."""
    cuda.thread.context = before
    gpu = Gpu(cuda, 2)
    done = gpu.to_host(GPU, np.zeros(20, np.uint8))
    assert not done() and cuda.context == before
    with pytest.raises(ValueError), gpu.active():
        assert cuda.context == 1002
        raise ValueError
    assert cuda.context == before


def test_a_gpu_that_cant_be_used_says_so_where_it_was_asked_for(cuda):
    def refuse(device):
        raise CudaError(46)

    cuda.setDevice = refuse
    with pytest.raises(CudaError):
        Gpu(cuda, 1)


def test_a_copy_is_done_when_its_event_is(cuda):
    gpu, host = made_on(cuda, 2), np.zeros(20, np.uint8)
    outward, inward = 10, 11
    done = gpu.to_host(GPU, host)
    assert cuda.calls == [
        ("memcpyAsync", 2, host.ctypes.data, GPU.address, 20, 2, outward),
        ("eventRecord", 2, 13, outward),
    ]
    assert not done()
    cuda.status = 0
    assert done()
    del cuda.calls[:]
    into = gpu.to_device(host, GPU), gpu.within(GPU, GPU)
    assert len(into) == 2 and cuda.calls == [
        ("memcpyAsync", 2, GPU.address, host.ctypes.data, 20, 1, inward),
        ("eventRecord", 2, 14, inward),
        ("memcpyAsync", 2, GPU.address, GPU.address, 20, 3, inward),
        ("eventRecord", 2, 15, inward),
    ]


def test_a_failure_on_the_gpu_is_raised_and_not_waited_for(cuda):
    done = Gpu(cuda, 0).to_host(GPU, np.zeros(20, np.uint8))
    cuda.status = 700
    with pytest.raises(CudaError) as caught:
        done()
    ours = translate(caught.value, "allreduce")
    assert isinstance(ours, TransportError) and ours.code == 700


def test_both_ways_come_after_a_mark(cuda):
    gpu = made_on(cuda, 1)
    mark = gpu.mark(77)
    assert cuda.calls == [("eventRecord", 1, mark.ptr, 77)]
    gpu.after(mark)
    assert cuda.calls[1:] == [
        ("streamWaitEvent", 1, 10, mark.ptr),
        ("streamWaitEvent", 1, 11, mark.ptr),
    ]


def test_the_event_of_a_mark_serves_again_when_nobody_has_the_mark(cuda):
    gpu = made_on(cuda, 1)
    first, second = gpu.mark(77), gpu.mark(77)
    assert first.ptr != second.ptr
    freed = first.ptr
    del first
    assert gpu.mark(78).ptr == freed


def test_the_queue_comes_after_a_mark_and_streams_after_the_queue(cuda):
    gpu = made_on(cuda, 1)
    before, passed = gpu.mark(77), gpu.mark(gpu.queue)
    del cuda.calls[:]
    gpu.queue_after(before)
    gpu.hold(passed, [5, 9])
    assert cuda.calls == [
        ("streamWaitEvent", 1, gpu.queue, before.ptr),
        ("streamWaitEvent", 1, 5, passed.ptr),
        ("streamWaitEvent", 1, 9, passed.ptr),
    ]


def test_pinned_memory_is_whole_pages_and_unpinned_with_its_last_view(cuda):
    array = made_on(cuda, 1).pinned(10_000)
    address = array.ctypes.data
    assert address % 4096 == 0 and array.size == 10_000 and array.flags.writeable
    assert cuda.calls == [("hostRegister", 1, address, 10_000, 0)]
    view = array[4:8].view(np.float32)
    del array
    gc.collect()
    assert len(cuda.calls) == 1
    del view
    gc.collect()
    assert cuda.calls[1:] == [("hostUnregister", 1, address)]


def test_pinned_memory_is_unpinned_before_it_is_unmapped(cuda):
    def mapped(address):
        lines = Path("/proc/self/maps").read_text().splitlines()
        spans = (line.split()[0].split("-") for line in lines)
        return any(int(low, 16) <= address < int(high, 16) for low, high in spans)

    seen = []
    cuda.hostUnregister = lambda address: seen.append(mapped(address))
    array = Gpu(cuda, 1).pinned(64 << 20)  # so large that it is not part of another mapping
    address = array.ctypes.data
    views = [array[i:].view(np.uint8)[1:] for i in range(3)]
    del array
    gc.collect()
    assert not seen
    del views
    gc.collect()
    assert seen == [True] and not mapped(address)


@pytest.mark.parametrize(
    "wanted, place, visible, device",
    [
        ("cuda", 0, 1, 0),
        ("cuda", 3, 4, 3),
        ("cuda", 5, 4, 1),
        ("cuda", 3, 1, 0),
        ("cuda:2", 0, 4, 2),
    ],
)
def test_the_choice_of_a_gpu(wanted, place, visible, device):
    assert device_for(wanted, place, visible) == device


@pytest.mark.parametrize("wanted, visible", [("cuda", 0), ("cuda:0", 0), ("cuda:4", 4)])
def test_a_gpu_that_is_not_there(wanted, visible):
    with pytest.raises(UnsupportedError, match="CUDA finds no GPU|cuda:0 to cuda:3"):
        device_for(wanted, 0, visible)


def test_without_cupy(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UnsupportedError, match=r"needs CuPy.*mpicoll\[cuda12\]"):
        open_gpu("cuda", 0)
