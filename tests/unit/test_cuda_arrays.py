"""Arrays in GPU memory, by what they say of themselves: only descriptions, as no GPU is needed."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from mpicoll.arrays.buffers import Blocks, DeviceBuffer, as_buffer, refuse_device
from mpicoll.arrays.device import LEGACY_STREAM, UNKNOWN, DeviceArray, read_capsule, stream_of
from mpicoll.arrays.ops import ReduceOp
from mpicoll.engine import checks, kinds
from mpicoll.errors import InvalidCallError, UnsupportedError

ADDRESS = 0x7F0000000000


def said(shape=(4,), typestr="<f4", address=ADDRESS, read_only=False, version=3, **more):
    face = {"shape": shape, "typestr": typestr, "data": (address, read_only), "version": version}
    return SimpleNamespace(__cuda_array_interface__=face | more)


def on(device, shape=(4,), address=ADDRESS, **more):
    array = said(shape, address=address, **more)
    array.__dlpack_device__ = lambda: (2, device)
    return array


def read(obj, name="x"):
    return as_buffer(obj, name, write=False)


# ---- the CUDA array interface ----


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0, 3)])
@pytest.mark.parametrize("typestr", ["|b1", "|i1", "<u8", "<f2", "<f4", "<c16"])
def test_an_array_is_what_it_says(shape, typestr):
    obj = said(shape, typestr)
    b = as_buffer(obj, "x", write=True)
    assert isinstance(b, DeviceBuffer) and b.owner is obj and b.name == "x"
    assert (b.address, b.shape, b.device) == (ADDRESS, shape, UNKNOWN)
    assert b.dtype.storage == np.dtype(typestr)
    assert b.count == np.prod(shape, dtype=int) and b.nbytes == b.count * b.dtype.itemsize
    assert b.writable


@pytest.mark.parametrize(
    "more, stream",
    [
        ({"stream": None}, LEGACY_STREAM),
        ({"stream": 7}, 7),
        ({"stream": 1}, 1),
        ({}, LEGACY_STREAM),
        ({"version": 2}, LEGACY_STREAM),
    ],
)
def test_its_stream(more, stream):
    assert read(said(**more)).stream == stream


def test_an_array_of_no_elements_may_have_no_address():
    b = read(said((0,), address=None))
    assert (b.address, b.nbytes) == (0, 0)


def test_its_device_is_known_by_dlpack():
    assert read(on(3)).device == 3


def test_bfloat16_has_no_letter():
    b = read(SimpleNamespace(dtype=np.dtype(ml_dtypes.bfloat16), **vars(said(typestr="<V2"))))
    assert b.dtype.name == "bfloat16" and b.dtype.itemsize == 2


def test_strides():
    assert read(said((2, 3), strides=(12, 4))).shape == (2, 3)
    assert read(said((2, 1), strides=(4, 99))).shape == (2, 1)
    assert read(said((0, 3), strides=(99, 99))).count == 0
    for strides in [(4, 8), (24, 4), (-12, 4), (0, 0)]:
        with pytest.raises(InvalidCallError, match=r"^x must be C-contiguous"):
            read(said((2, 3), strides=strides))


def test_what_is_refused():
    with pytest.raises(InvalidCallError, match="read-only"):
        as_buffer(said(read_only=True), "x", write=True)
    with pytest.raises(InvalidCallError, match="masked"):
        read(said(mask=said()))
    with pytest.raises(UnsupportedError, match="^x must have this machine.s byte order"):
        read(said(typestr=">f4"))
    for face in ({}, {"shape": (3,)}, {"shape": 3, "typestr": "<f4", "data": 5, "version": 3}, 7):
        with pytest.raises(UnsupportedError, match="^x is a SimpleNamespace in GPU memory"):
            read(SimpleNamespace(__cuda_array_interface__=face))


def test_a_group_on_host_memory_says_how_to_get_one_for_gpus():
    call = checks.all_gather_single(0, 2, said((8,)), said((4,), address=ADDRESS + 64))
    text = str(refuse_device(call.buffers()))
    assert text.startswith("input must lie in host memory") and 'device="cuda"' in text


@pytest.mark.parametrize("stream, now", [(7, 7), (None, LEGACY_STREAM), (0, LEGACY_STREAM)])
def test_the_stream_by_now_is_asked_for_anew(stream, now):
    array = said(stream=5)
    array.__cuda_array_interface__["stream"] = stream
    assert stream_of(array) == now


def test_the_stream_by_now_of_a_tensor_is_its_librarys_current_one(monkeypatch):
    class Tensor:
        device = SimpleNamespace(index=3)

    current = {3: SimpleNamespace(cuda_stream=60)}
    torch = SimpleNamespace(Tensor=Tensor, cuda=SimpleNamespace(current_stream=current.get))
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert stream_of(Tensor()) == 60
    current[3] = SimpleNamespace(cuda_stream=0)
    assert stream_of(Tensor()) == LEGACY_STREAM and stream_of(object()) == LEGACY_STREAM


# ---- DLPack ----


class Capsule:
    """Says that its memory is a GPU's, with a capsule of NumPy's that says otherwise, or not."""

    def __init__(self, x, device=(2, 0)):
        self.x, self.device = x, device

    def __dlpack__(self, stream=None):
        assert stream == LEGACY_STREAM
        return self.x.__dlpack__()

    def __dlpack_device__(self):
        return self.device


@pytest.mark.parametrize("dtype", ["b", "H", "i", "Q", "e", "f", "d", "D", "?"])
def test_a_capsule_is_read_as_numpy_writes_it(dtype):
    x = np.zeros((2, 3), dtype)
    capsule = x.__dlpack__()
    t = read_capsule(capsule)
    assert (t.data + t.byte_offset, t.device_type, t.device_id) == (x.ctypes.data, 1, 0)
    assert (t.ndim, t.shape[:2], t.bits, t.lanes) == (2, [2, 3], 8 * x.itemsize, 1)
    if t.strides:
        assert t.strides[:2] == [3, 1]


def test_a_capsule_keeps_its_memory_and_gives_it_back():
    x = np.zeros(3)
    before = sys.getrefcount(x)
    capsule = x.__dlpack__()
    read_capsule(capsule)
    assert sys.getrefcount(x) > before
    del capsule
    assert sys.getrefcount(x) == before


def test_where_the_interface_knows_no_streams_dlpack_makes_one_wait():
    """JAX's interface is of version 2: its arrays may not be computed yet."""
    asked = []

    class Jax(Capsule):
        def __dlpack__(self, stream=None):
            asked.append(stream)
            return super().__dlpack__(stream)

    x = Jax(np.zeros(3))
    x.__cuda_array_interface__ = said().__cuda_array_interface__ | {"version": 2}
    with pytest.raises(UnsupportedError, match="device 1:0"):  # the capsule is of NumPy's
        read(x)
    assert asked == [LEGACY_STREAM]
    x.__cuda_array_interface__["stream"] = 7
    assert read(x).stream == 7 and asked == [LEGACY_STREAM]


def test_a_capsule_must_be_of_the_device_that_was_said():
    with pytest.raises(UnsupportedError, match="^x is a Capsule in GPU memory.*device 1:0"):
        read(Capsule(np.zeros(3)))


# ---- where they lie, in calls ----


def test_arrays_of_one_call_lie_in_one_memory():
    host = np.zeros(4, np.float32)
    with pytest.raises(InvalidCallError, match="output and input.*on the host and on GPU 0"):
        checks.all_gather_single(0, 1, host, on(0))
    with pytest.raises(InvalidCallError, match=r"output_tensors\[0\] and output_tensors\[1\]"):
        checks.allgather(0, 2, [on(0), on(1)], on(0))
    with pytest.raises(InvalidCallError, match=r"tensors\[0\] and tensors\[1\].*GPU 0 and on the"):
        parts = [checks.allreduce(0, 1, x, ReduceOp.SUM) for x in (on(0), host)]
        checks.coalesced(kinds.ALLREDUCE_COALESCED, parts, "tensors")
    with pytest.raises(InvalidCallError, match="on the host and in GPU memory"):
        checks.all_gather_single(0, 1, host, said())
    checks.all_gather_single(0, 1, on(0), said(address=ADDRESS + 64))  # one doesn't say where


def test_a_call_says_that_it_is_on_a_gpu():
    call = checks.allreduce(0, 2, on(1), ReduceOp.SUM)
    assert call.device == 1 and [b.device for b in call.buffers()] == [1]
    assert call.describe() == "allreduce(float32[4] in GPU memory, op=SUM)"
    assert checks.allreduce(0, 2, np.zeros(4), ReduceOp.SUM).device is None
    parts = [checks.allreduce(0, 2, on(1), ReduceOp.SUM)]
    assert checks.coalesced(kinds.ALLREDUCE_COALESCED, parts, "tensors").device == 1


def test_overlap_is_found_by_address():
    checks.all_gather_single(0, 2, on(0, (8,)), on(0, address=ADDRESS + 32))
    with pytest.raises(InvalidCallError, match="overlap"):
        checks.all_gather_single(0, 2, on(0, (8,)), on(0, address=ADDRESS + 28))


def test_blocks_are_addresses_too():
    blocks = Blocks.split(read(said((6,))), (1, 2, 3))
    third = blocks.block(2)
    assert isinstance(third, DeviceArray)
    assert (third.address, third.size, third.nbytes) == (ADDRESS + 12, 3, 12)
    assert third[1:9] == DeviceArray(ADDRESS + 16, 2, np.dtype("f4"))
    assert third[5:].size == 0 and ctypes.sizeof(ctypes.c_float) == third.itemsize
