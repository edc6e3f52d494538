"""What is asked of CUDA, and in which order.  The record of the calls is no GPU: nothing moves."""

from __future__ import annotations

import gc
import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from mpicoll.cuda import Gpu, device_for, open_gpu
from mpicoll.cuda_arrays import DeviceArray
from mpicoll.errors import TransportError, UnsupportedError, translate

GPU = DeviceArray(0x7F0000000000, 5, np.dtype("f4"))


class CudaError(RuntimeError):
    def __init__(self, status):
        super().__init__(f"status {status}")
        self.status = status


class Record:
    """Stands where CuPy would: notes the calls of the runtime, with the device they are made on."""

    def __init__(self):
        self.calls, self.device, self.status = [], 0, 600
        self.numbers = itertools.count(10)
        self.cuda = SimpleNamespace(
            Device=self.on,
            Stream=lambda non_blocking: SimpleNamespace(ptr=next(self.numbers)),
            Event=lambda disable_timing: SimpleNamespace(ptr=next(self.numbers)),
            runtime=self,
            get_current_stream=lambda: SimpleNamespace(ptr=5),
        )
        self.CUDARuntimeError = CudaError

    def on(self, device):
        record = self

        class Device:
            def __enter__(self):
                self.before, record.device = record.device, device

            def __exit__(self, *_):
                record.device = self.before

        return Device()

    def eventQuery(self, event):
        return self.status

    def __getattr__(self, name):
        def note(*arguments):
            self.calls.append((name, self.device, *arguments))

        return note


@pytest.fixture
def cuda(monkeypatch):
    record = Record()
    monkeypatch.setattr("mpicoll.cuda.load_nccl", lambda: record)
    return record


def test_a_copy_is_done_when_its_event_is(cuda):
    gpu, host = Gpu(cuda, 2), np.zeros(20, np.uint8)
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
    gpu.to_device(host, GPU)
    assert cuda.calls == [
        ("memcpyAsync", 2, GPU.address, host.ctypes.data, 20, 1, inward),
        ("eventRecord", 2, 14, inward),
    ]


def test_a_failure_on_the_gpu_is_raised_and_not_waited_for(cuda):
    done = Gpu(cuda, 0).to_host(GPU, np.zeros(20, np.uint8))
    cuda.status = 700
    with pytest.raises(CudaError) as caught:
        done()
    ours = translate(caught.value, "allreduce")
    assert isinstance(ours, TransportError) and ours.code == 700


def test_both_ways_come_after_a_mark(cuda):
    gpu = Gpu(cuda, 1)
    mark = gpu.mark(77)
    assert cuda.calls == [("eventRecord", 1, mark.ptr, 77)]
    gpu.after(mark)
    assert cuda.calls[1:] == [
        ("streamWaitEvent", 1, 10, mark.ptr),
        ("streamWaitEvent", 1, 11, mark.ptr),
    ]
    assert cuda.device == 0, "the caller's current device stays"


def test_the_queue_comes_after_a_mark_and_streams_after_the_queue(cuda, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    gpu = Gpu(cuda, 1)
    before, passed = gpu.mark(77), gpu.mark(gpu.queue)
    del cuda.calls[:]
    gpu.queue_after(before)
    gpu.hold(passed, {9, 5})
    assert cuda.calls == [
        ("streamWaitEvent", 1, gpu.queue, before.ptr),
        ("streamWaitEvent", 1, 5, passed.ptr),  # the current one
        ("streamWaitEvent", 1, 9, passed.ptr),
    ]


def test_the_current_stream_of_torch_waits_too(cuda, monkeypatch):
    import sys

    streams = SimpleNamespace(
        is_initialized=lambda: True, current_stream=lambda d: SimpleNamespace(cuda_stream=60 + d)
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=streams))
    Gpu(cuda, 1).hold(SimpleNamespace(ptr=4), ())
    assert [call[2] for call in cuda.calls] == [5, 61]


def test_calls_of_nccl_become_one_on_the_groups_gpu(cuda):
    gpu = Gpu(cuda, 1)
    gpu.nccl(4, b"7" * 128, 2)
    with pytest.raises(ValueError), gpu.nccl_group():
        raise ValueError
    assert cuda.calls == [
        ("NcclCommunicator", 1, 4, b"7" * 128, 2),
        ("groupStart", 1),
        ("groupEnd", 1),
    ]


def test_pinned_memory_is_whole_pages_and_unpinned_with_its_last_view(cuda):
    array = Gpu(cuda, 1).pinned(10_000)
    address = array.ctypes.data
    assert address % 4096 == 0 and array.size == 10_000 and array.flags.writeable
    assert cuda.calls == [("hostRegister", 1, address, 10_000, 0)]
    view = array[4:8].view(np.float32)
    del array
    gc.collect()
    assert len(cuda.calls) == 1
    del view
    gc.collect()
    assert [call[::2] for call in cuda.calls[1:]] == [("hostUnregister", address)]


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
