import array
import ctypes
import gc
import subprocess
import sys
import types
import weakref

import ml_dtypes
import numpy as np
import pytest

from mpicoll.arrays.buffers import Blocks, as_buffer
from mpicoll.errors import InvalidCallError, UnsupportedError


def read(obj, name="tensor"):
    return as_buffer(obj, name, write=False)


def write(obj, name="tensor"):
    return as_buffer(obj, name, write=True)


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


# ---- NumPy ----


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 3, 4), (0,), (3, 0), (1, 1)])
@pytest.mark.parametrize("dtype", ["?", "i1", "u8", "f2", "f4", "g", "c16", ml_dtypes.bfloat16])
def test_numpy(shape, dtype):
    x = np.ones(shape, dtype)
    b = write(x)
    assert b.owner is x
    assert b.shape == shape
    assert (b.count, b.nbytes, b.writable) == (x.size, x.nbytes, True)
    assert b.array.shape == (x.size,)
    assert b.array.flags.c_contiguous
    assert b.array.dtype == b.dtype.storage
    assert b.address == x.__array_interface__["data"][0] or x.size == 0
    b.array.view(np.uint8)[:] = 0  # through to the user's memory
    assert not x.astype(bool).any()


def test_the_owner_lives_as_long_as_the_buffer():
    class Array(np.ndarray):
        pass

    x = np.zeros(3).view(Array)
    seen = weakref.ref(x)
    b = read(x)
    del x
    gc.collect()
    assert seen() is b.owner
    assert type(b.array) is np.ndarray


def test_second_names_of_types():
    b = write(np.zeros(3, np.longlong))
    assert b.array.dtype is b.dtype.storage


def test_memmap(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=(2, 2))
    write(x).array[:] = 7
    assert (x == 7).all()


def test_read_only():
    x = read_only(np.ones(3))
    b = read(x)
    assert not b.writable
    assert b.address == x.ctypes.data
    with pytest.raises(InvalidCallError, match=r"^out must be writable.*read-only.*np\.array\(out"):
        write(x, "out")


@pytest.mark.parametrize(
    "x",
    [
        np.zeros((4, 4))[:, 1], np.zeros(10)[::2], np.zeros(10)[::-1],
        np.zeros((4, 4))[1:3, 1:3], np.broadcast_to(np.zeros(1), (4,)),
        np.lib.stride_tricks.sliding_window_view(np.zeros(5), 2),
        np.zeros((2, 3, 4)).transpose(1, 0, 2),
    ],
)  # fmt: skip
def test_strided(x):
    with pytest.raises(InvalidCallError, match=r"^a must be C-contiguous.*strided.*ascontiguous"):
        read(x, "a")


def test_fortran_order():
    x = np.asfortranarray(np.zeros((2, 3)))
    with pytest.raises(InvalidCallError, match=r"Fortran.*\(2, 3\).*ascontiguousarray\(a\).*a\.T"):
        read(x, "a")
    with pytest.raises(InvalidCallError, match=r"copy the result back: a\[\.\.\.\] = y"):
        write(x, "a")
    assert read(x.T).shape == (3, 2)


@pytest.mark.parametrize("dtype", ["O", ">f4", ">M8[s]", [("a", "O")], []])
def test_dtypes_are_refused(dtype):
    with pytest.raises(UnsupportedError, match="^tensor "):
        read(np.zeros(3, dtype))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize(
    "dtype", ["S5", "U3", "S2", "V7", "M8[s]", "m8[ns]", [("a", "i1"), ("b", "f8")]], ids=str
)
def test_what_only_moves(dtype, shape):
    x = np.zeros(shape, dtype)
    b = write(x)
    assert (b.shape, b.count, b.nbytes) == (shape, x.size, x.nbytes)
    assert b.array.dtype is b.dtype.storage
    b.array.view(np.uint8)[:] = 1  # through to the user's memory
    assert x.tobytes() == b"\1" * x.nbytes
    if x.size:
        assert b.address == x.ctypes.data


def test_what_only_moves_need_not_be_aligned():
    room = np.zeros(33, np.uint8)
    x = room[1:].view("S8")
    write(x).array[:] = 0x4141414141414141
    assert x.tolist() == [b"A" * 8] * 4


def test_records():
    x = np.zeros(3, [("a", "f4"), ("b", "i4")]).view(np.recarray)
    write(x).array.view(np.uint8)[:] = 0xFF
    assert (x.b == -1).all()


def test_masked_arrays_are_refused():
    with pytest.raises(InvalidCallError, match=r"masked.*x\.filled"):
        read(np.ma.masked_equal([1, 2], 2), "x")


@pytest.mark.parametrize("wrap", [list, tuple])
def test_one_element_lists(wrap):
    x = np.zeros(3)
    b = write(wrap([x]))
    assert b.owner is x


@pytest.mark.parametrize("obj", [[], [np.zeros(1), np.zeros(1)], [[np.zeros(1)]], (1, 2, 3)])
def test_other_lists_are_refused(obj):
    with pytest.raises(InvalidCallError, match=r"^x must be one array, but got a (list|tuple) of"):
        read(obj, "x")


OBJECTS = [None, "text", "x" * 1000, object(), {1: 2}, len, [None], [[1], [1, 2]]]
NUMBERS = [
    *(1, 1.5, 1j, True, np.float32(1), np.bool_(True), [3.0], (1, 2, 3), [[1, 2], [3, 4]]),
    *([np.zeros(2), np.zeros(2)], types.SimpleNamespace(__array__=lambda: np.zeros(3))),
]  # the last is no number to NumPy, as it looks for methods of the type


@pytest.mark.parametrize("taken", [read, write])
@pytest.mark.parametrize("obj", [*NUMBERS, *OBJECTS], ids=lambda obj: repr(obj)[:20])
def test_what_is_no_array(obj, taken):
    with pytest.raises(InvalidCallError) as caught:
        taken(obj, "x")
    message = str(caught.value)
    assert message.startswith(("x must be a NumPy array", "x must be one array"))
    assert type(obj[0] if isinstance(obj, list) and len(obj) == 1 else obj).__name__ in message
    assert len(message) < 400
    if any(obj is other for other in OBJECTS):
        assert "broadcast_object" in message
    elif not isinstance(obj, types.SimpleNamespace):
        assert "np.array(x)" in message
        assert ("take the result from y" in message) == (taken is write)


# ---- other arrays ----


@pytest.mark.parametrize(
    "obj",
    [
        bytearray(b"abcd"), array.array("f", [1, 2]), memoryview(bytearray(8)),
        memoryview(np.ones((2, 2))), (ctypes.c_double * 3)(),
    ],
)  # fmt: skip
def test_buffer_protocol(obj):
    b = write(obj)
    assert b.owner is obj
    b.array.view(np.uint8)[:] = 65
    assert bytes(memoryview(obj)) == b"A" * b.nbytes


def test_bytes_are_inputs_only():
    b = read(b"abc")
    assert (b.dtype.name, b.count, b.writable) == ("uint8", 3, False)
    assert read(b"").count == 0
    with pytest.raises(InvalidCallError, match="read-only bytes"):
        write(b"abc")


def test_strided_memoryview():
    with pytest.raises(InvalidCallError, match="strided"):
        read(memoryview(bytearray(8))[::2])


def test_array_of_characters():
    b = write(array.array("u", "ab"), "x")
    assert (b.dtype.name, b.count) == ("U1", 2)


class Interface:
    def __init__(self, x):
        self.kept = x
        self.__array_interface__ = x.__array_interface__


def test_array_interface():
    x = np.arange(6.0).reshape(2, 3)
    b = write(Interface(x))
    assert (b.address, b.shape) == (x.ctypes.data, (2, 3))
    with pytest.raises(InvalidCallError, match="read-only Interface"):
        write(Interface(read_only(x)))
    with pytest.raises(InvalidCallError, match="Fortran"):
        read(Interface(x.T))


class DLPack:
    def __init__(self, x, device=(1, 0)):
        self.x = x
        self.device = device

    def __dlpack__(self, **kwargs):
        return self.x.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.device


def test_dlpack():
    x = np.arange(6.0).reshape(2, 3)
    b = write(DLPack(x))
    assert (b.address, b.shape) == (x.ctypes.data, (2, 3))
    with pytest.raises(InvalidCallError, match="read-only"):
        write(DLPack(read_only(x)))
    with pytest.raises(InvalidCallError, match="Fortran"):
        read(DLPack(x.T))


def test_dlpack_that_fails():
    class Failing(DLPack):
        def __dlpack__(self, **kwargs):
            raise BufferError("not today")

    with pytest.raises(UnsupportedError, match=r"^x is a Failing.*not today"):
        read(Failing(None), "x")


def test_what_lies_on_other_devices_is_refused():
    with pytest.raises(UnsupportedError, match=r"^x must lie in the memory of.*type 10"):
        read(DLPack(np.zeros(3), (10, 0)), "x")


# ---- PyTorch ----


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


TORCH_DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16",
    "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
    "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4)])
@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_tensor(torch, name, shape):
    t = torch.zeros(shape, dtype=torch.uint8).to(getattr(torch, name))
    b = write(t)
    assert b.owner is t
    assert (b.dtype.name, b.shape, b.count, b.writable) == (name, shape, t.numel(), True)
    assert type(b.shape) is tuple
    assert b.array.dtype is b.dtype.storage
    assert b.nbytes == t.numel() * t.element_size()
    assert b.count == 0 or b.address == t.data_ptr()
    b.array.view(np.uint8)[:] = 1  # through to the tensor
    assert b.count == 0 or (t.reshape(-1).view(torch.uint8) == 1).all()


def test_tensor_bits_are_ml_dtypes_bits(torch):
    t = torch.tensor([1.5, -2.0, float("inf")], dtype=torch.bfloat16)
    assert read(t).array.view(ml_dtypes.bfloat16).tolist() == [1.5, -2, np.inf]
    t = t[:2].to(torch.float8_e4m3fn)
    assert read(t).array.view(ml_dtypes.float8_e4m3fn).tolist() == [1.5, -2]


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_tensor_that_requires_grad(torch, name):
    leaf = torch.ones(3, dtype=getattr(torch, name), requires_grad=True)
    for t in (leaf, torch.nn.Parameter(leaf.detach().clone()), leaf * 2):
        write(t).array[:] = 0
        assert (t == 0).all()


def test_tensor_memory_outlives_the_tensor(torch):
    b = read(torch.full((1000,), 3, dtype=torch.bfloat16))
    gc.collect()
    assert (b.array.view(ml_dtypes.bfloat16) == 3).all()


def test_tensors_refused(torch):
    ones = torch.ones(4, 4)
    c = torch.ones(3, dtype=torch.complex64)
    cases = [
        (ones.t(), "contiguous()"),
        (ones[:, 1], "contiguous()"),
        (torch.ones(1).expand(4), "contiguous()"),
        (torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last), "contiguous()"),
        (ones.to_sparse(), "to_dense()"),
        (c.conj(), "resolve_conj()"),
        (c.conj().imag, "resolve_neg()"),
        (torch.ones(3, device="meta"), "empty_like"),
    ]
    for t, remedy in cases:
        with pytest.raises(InvalidCallError) as caught:
            read(t, "x")
        assert str(caught.value).startswith("x ")
        assert remedy in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_tensor_types_refused(torch):
    quantized = torch.quantize_per_tensor(torch.ones(2), 1, 0, torch.qint8)
    with pytest.raises(InvalidCallError, match="dequantize"):
        read(quantized)
    with pytest.raises(UnsupportedError, match="complex32"):
        read(torch.zeros(2, dtype=torch.complex32))
    fake_tensor = pytest.importorskip("torch._subclasses.fake_tensor")
    with fake_tensor.FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(UnsupportedError, match="FakeTensor"):
        read(fake)


def test_neither_torch_nor_ml_dtypes_is_imported():
    code = (
        "import sys, numpy\n"
        "import mpicoll.arrays.buffers as b\n"
        "b.as_buffer(numpy.zeros(3), 'x', write=True)\n"
        "b.as_buffer(b'abc', 'x', write=False)\n"
        "assert not {'torch', 'ml_dtypes', 'mpi4py.MPI'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- overlap ----


# ---- blocks ----


def test_single():
    x = np.arange(6.0).reshape(2, 3)
    b = write(x)
    blocks = Blocks.single(b)
    assert blocks.buffers == (b,)
    assert (blocks.counts, blocks.displs, blocks.total, blocks.nbytes) == ((6,), (0,), 6, 48)
    assert blocks.dtype is b.dtype
    assert blocks.flat() is b.array
    assert blocks.landing() is b.array
    assert blocks.block(0).tolist() == x.ravel().tolist()


@pytest.mark.parametrize("counts", [(6,), (2, 4), (0, 6), (3, 0, 3), (1, 2, 3, 0), [2, 2, 2]])
def test_split(counts):
    x = np.arange(6)
    blocks = Blocks.split(write(x), counts)
    assert blocks.counts == tuple(counts)
    assert blocks.displs == tuple(np.cumsum([0, *counts])[:-1])
    assert np.concatenate([blocks.block(i) for i in range(len(counts))]).tolist() == x.tolist()
    assert blocks.flat() is blocks.landing()
    blocks.unpack(blocks.landing())
    assert x.tolist() == list(range(6))
    blocks.unpack(np.arange(10, 16))
    assert x.tolist() == list(range(10, 16))


@pytest.mark.parametrize("counts", [(), (5,), (7,), (7, -1), (3, 4)])
def test_split_must_fill_the_buffer(counts):
    with pytest.raises(InvalidCallError, match="counts must be at least 0 and add up"):
        Blocks.split(write(np.zeros(6)), counts)


def test_split_of_nothing():
    blocks = Blocks.split(write(np.zeros(0)), (0, 0, 0))
    assert (blocks.total, blocks.displs, blocks.block(2).size) == (0, (0, 0, 0), 0)


def test_each():
    xs = [np.arange(n, dtype=np.int16) + 10 * n for n in (2, 0, 3)]
    blocks = Blocks.each([write(x) for x in xs])
    assert (blocks.counts, blocks.displs) == ((2, 0, 3), (0, 2, 2))
    assert (blocks.total, blocks.nbytes) == (5, 10)
    assert blocks.flat().tolist() == [20, 21, 30, 31, 32]
    assert not np.may_share_memory(blocks.flat(), xs[0])
    assert np.may_share_memory(blocks.block(2), xs[2])
    landing = blocks.landing()
    assert (landing.shape, landing.dtype) == ((5,), np.int16)
    assert blocks.landing() is not landing
    landing[:] = [1, 2, 3, 4, 5]
    blocks.unpack(landing)
    assert [x.tolist() for x in xs] == [[1, 2], [], [3, 4, 5]]


def test_each_of_one_is_the_array_itself():
    b = write(np.zeros(3))
    blocks = Blocks.each([b])
    assert blocks.flat() is b.array
    assert blocks.landing() is b.array


def test_each_needs_one_dtype():
    with pytest.raises(InvalidCallError, match=r"one dtype.*\['float32', 'float64'\]"):
        Blocks.each([write(np.zeros(1)), write(np.zeros(1, np.float32))])
    with pytest.raises(InvalidCallError, match="at least one"):
        Blocks.each([])
