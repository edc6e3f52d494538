"""Bad input is refused by name, at once, and the group goes on; on all ranks or on one alone."""

from __future__ import annotations

import contextlib
import importlib
import math
from datetime import datetime, timedelta

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll import ReduceOp
from mpicoll.errors import CollectiveMismatchError, InvalidCallError, UnsupportedError
from tests.contract.arrays import KINDS, NUMPY, data, reduced

pytestmark = pytest.mark.mpi
_, TORCH = KINDS


def ones(kind, dtype, *shape):
    return kind.full(shape, 1, dtype)


def f4(kind, *shape):
    return ones(kind, "f4", *(shape or (4,)))


def locked(array):
    array.flags.writeable = False
    return array


def each(g, kind, *shape):
    return [f4(kind, *shape) for _ in range(g.size())]


def row(g, kind, *shape):
    """float32 with as many rows as the group has ranks."""
    return f4(kind, g.size(), *shape)


def shifted(g, kind):
    """An array, and a part of it that is no rank's own."""
    x = f4(kind, 2 * g.size() + 1)
    return x[:-1], x[1:3]


class OnDevice:
    """What an array in GPU memory says of itself."""

    @property
    def __cuda_array_interface__(self):
        return {"shape": (3,), "typestr": "<f4", "data": (0, False), "version": 3}


# name: (the array, what a call of it raises)
ARRAYS = {
    "strided": (f4(NUMPY, 4, 4)[:, ::2], InvalidCallError),
    "reversed": (f4(NUMPY)[::-1], InvalidCallError),
    "Fortran order": (np.asfortranarray(f4(NUMPY, 3, 4)), InvalidCallError),
    "read-only": (locked(f4(NUMPY)), InvalidCallError),
    "masked": (np.ma.masked_array(f4(NUMPY), mask=[1, 0, 0, 0]), InvalidCallError),
    "list of floats": ([1.0, 2.0], InvalidCallError),
    "scalar": (1.0, InvalidCallError),
    "NumPy scalar": (np.float32(1), InvalidCallError),
    "None": (None, InvalidCallError),
    "string": ("text", InvalidCallError),
    "swapped": (f4(NUMPY).astype(">f4"), UnsupportedError),
    "objects": (np.array([None, {}]), UnsupportedError),
    "structured, with objects": (np.zeros(3, [("a", "f4"), ("b", "O")]), UnsupportedError),
    "swapped structured": (np.zeros(3, [("a", ">f4")]), UnsupportedError),
    "no bytes": (np.zeros(3, []), UnsupportedError),
    "in GPU memory": (OnDevice(), UnsupportedError),
}
# What moves, and is refused where it is reduced.
MOVES = {
    "unicode": np.array(["a", "bc"]),
    "byte strings": np.array([b"a", b"bc"]),
    "dates": np.zeros(3, "M8[s]"),
    "durations": np.zeros(3, "m8[s]"),
    "raw": np.zeros(3, "V7"),
    "structured": np.zeros(3, [("a", "f4"), ("b", "i4")]),
}
# name: (the call, what it raises, the word that its message must hold).  The call gets the group
# and the library whose arrays it is to use.
CASES = {
    f"root {root!r} of {kind}": (call, InvalidCallError, "root")
    for bad in (-1, 99, 1.5, "0", None, True)
    for root in (bad,)
    for kind, call in {
        "broadcast": lambda g, k, r=bad: g.broadcast(f4(k), r),
        "reduce": lambda g, k, r=bad: g.reduce(f4(k), r),
        "gather": lambda g, k, r=bad: g.gather(each(g, k), f4(k), r),
        "scatter": lambda g, k, r=bad: g.scatter(f4(k), each(g, k), r),
    }.items()
}
CASES |= {
    f"timeout {bad!r}": (
        lambda g, k, t=bad: g.allreduce(f4(k), timeout=t),
        InvalidCallError,
        "timeout",
    )
    for bad in (
        *(-1, 0, 0.0, math.nan, -math.inf, -(10**400), np.float32(0), "5", True, np.True_),
        *(timedelta(0), timedelta.min, datetime(2026, 1, 1), [1], 1j),
    )
}
CASES |= {
    f"op {bad!r}": (lambda g, k, op=bad: g.allreduce(f4(k), op), InvalidCallError, "op")
    for bad in (None, "SUM", 3)
}
CASES |= {
    "strided input": (
        lambda g, k: g.all_gather_single(row(g, k, 4), f4(k, 4, 2)[:, 0]),
        InvalidCallError,
        "input",
    ),
    "output overlaps input": (
        lambda g, k: g.all_gather_single(*shifted(g, k)),
        InvalidCallError,
        "overlap",
    ),
    "outputs overlap": (
        lambda g, k: g.allreduce_coalesced([*(lambda x: (x[:3], x[2:]))(f4(k))]),
        InvalidCallError,
        "overlap",
    ),
    "input in reduce_scatter's output": (
        lambda g, k: g.reduce_scatter_single(*shifted(g, k)[::-1]),
        InvalidCallError,
        "overlap",
    ),
    "too small an output": (
        lambda g, k: g.all_gather_single(f4(k, 4 * g.size() - 1), f4(k)),
        InvalidCallError,
        "output",
    ),
    "too large an input": (
        lambda g, k: g.reduce_scatter_single(f4(k), f4(k, 4 * g.size() + 1)),
        InvalidCallError,
        "input",
    ),
    "dtypes that differ": (
        lambda g, k: g.all_gather_single(row(g, k, 4), ones(k, "f8", 4)),
        InvalidCallError,
        "dtype",
    ),
    "dtypes that differ in a list": (
        lambda g, k: g.alltoall(each(g, k), [ones(k, "i4", 4) for _ in range(g.size())]),
        InvalidCallError,
        "dtype",
    ),
    "an output of another dtype than the rest": (
        lambda g, k: g.allgather([*each(g, k), ones(k, "f8", 4)][1:], f4(k)),
        InvalidCallError,
        "dtype",
    ),
    "too few outputs": (
        lambda g, k: g.allgather(each(g, k)[1:], f4(k)),
        InvalidCallError,
        "output_tensors",
    ),
    "too many inputs": (
        lambda g, k: g.reduce_scatter(f4(k), [*each(g, k), f4(k)]),
        InvalidCallError,
        "input",
    ),
    "own output of another size": (
        lambda g, k: g.allgather(each(g, k, 5), f4(k)),
        InvalidCallError,
        "output_tensors",
    ),
    "own part of another size": (
        lambda g, k: g.reduce_scatter(f4(k, 5), each(g, k)),
        InvalidCallError,
        "input",
    ),
    "an array for a list": (
        lambda g, k: g.allgather(memoryview(bytearray(g.size())), f4(k)),
        InvalidCallError,
        "output_tensors",
    ),
    "an array of too many rows for a list": (
        lambda g, k: g.allgather(f4(k, g.size() + 1, 4), f4(k)),
        InvalidCallError,
        "output_tensors",
    ),
    "an array without rows for a list": (
        lambda g, k: g.reduce_scatter(f4(k), f4(k, 1).reshape(())),
        InvalidCallError,
        "input",
    ),
    "a list for an array": (
        lambda g, k: g.all_gather_single([f4(k), f4(k)], f4(k)),
        InvalidCallError,
        "output",
    ),
    "None for a list": (
        lambda g, k: g.reduce_scatter(f4(k), None),
        InvalidCallError,
        "input",
    ),
    "input in a list of outputs": (
        lambda g, k: (lambda x: g.allgather([x[:4], *each(g, k)[1:]], x[1:]))(f4(k, 5)),
        InvalidCallError,
        "overlap",
    ),
    "None in a list": (
        lambda g, k: g.alltoall(each(g, k), [*each(g, k)[1:], None]),
        InvalidCallError,
        "input_tensors",
    ),
    "outputs and inputs in unequal number": (
        lambda g, k: g.all_gather_single_coalesced([row(g, k, 4)], [f4(k), f4(k)]),
        InvalidCallError,
        "inputs",
    ),
    "too few lists to coalesce": (
        lambda g, k: g.allgather_coalesced([[f4(k)]] * (g.size() - 1), [f4(k)]),
        InvalidCallError,
        "output_lists",
    ),
    "too short a list to coalesce": (
        lambda g, k: g.allgather_coalesced([[f4(k)] for _ in range(g.size())], [f4(k), f4(k)]),
        InvalidCallError,
        "output_lists",
    ),
    "an array to coalesce": (
        lambda g, k: g.allreduce_coalesced(f4(k)),
        InvalidCallError,
        "tensors",
    ),
    "nothing to coalesce": (lambda g, k: g.allreduce_coalesced([]), InvalidCallError, "tensors"),
    "splits too short": (
        lambda g, k: g.all_to_all_single(
            row(g, k), row(g, k), [1] * (g.size() - 1) or [1, 0], None
        ),
        InvalidCallError,
        "output_split_sizes",
    ),
    "splits of another sum": (
        lambda g, k: g.all_to_all_single(row(g, k), row(g, k), None, [2] * g.size()),
        InvalidCallError,
        "input_split_sizes",
    ),
    "a negative split": (
        lambda g, k: g.all_to_all_single(row(g, k), row(g, k), None, [-1] * g.size()),
        InvalidCallError,
        "input_split_sizes",
    ),
    "splits that aren't integers": (
        lambda g, k: g.all_to_all_single(row(g, k), row(g, k), [1.0] * g.size(), None),
        InvalidCallError,
        "output_split_sizes",
    ),
    "splits that are no list": (
        lambda g, k: g.all_to_all_single(row(g, k), row(g, k), "11", None),
        InvalidCallError,
        "output_split_sizes",
    ),
    "rows of another size": (
        lambda g, k: g.all_to_all_single(row(g, k, 2), row(g, k, 3), None, None),
        InvalidCallError,
        "rows",
    ),
    "own split of another size": (
        lambda g, k: g.all_to_all_single(row(g, k), f4(k, 2 * g.size()), None, None),
        InvalidCallError,
        "output_split_sizes",
    ),
    "nothing to split": (
        lambda g, k: g.all_to_all_single(f4(k, 1).reshape(()), f4(k, 1), None, None),
        InvalidCallError,
        "output",
    ),
    "AVG of integers": (
        lambda g, k: g.allreduce(ones(k, "i4", 4), ReduceOp.AVG),
        UnsupportedError,
        "AVG",
    ),
    "bits of floats": (lambda g, k: g.allreduce(f4(k), ReduceOp.BAND), UnsupportedError, "BAND"),
    "order of complex numbers": (
        lambda g, k: g.allreduce(ones(k, "c8", 4), ReduceOp.MAX),
        UnsupportedError,
        "MAX",
    ),
    "order of complex numbers in scan": (
        lambda g, k: g.scan(ones(k, "c8", 4), ReduceOp.MIN),
        UnsupportedError,
        "MIN",
    ),
    "AVG in scan": (lambda g, k: g.exscan(f4(k), ReduceOp.AVG), UnsupportedError, "AVG"),
    "bits of complex numbers": (
        lambda g, k: g.reduce(ones(k, "c8", 4), 0, ReduceOp.BXOR),
        UnsupportedError,
        "BXOR",
    ),
    "complex factor for floats": (
        lambda g, k: g.allreduce(f4(k), ReduceOp.PREMUL_SUM(1j)),
        UnsupportedError,
        "PREMUL_SUM",
    ),
}

# Point to point: nobody else takes part.
LONELY = {
    **{
        f"dst {bad!r}": (lambda g, k, d=bad: g.send(f4(k), d), InvalidCallError, "dst")
        for bad in (-1, -2, MPI.PROC_NULL, 99, 0.5, None, mc.ANY_SOURCE)
    },
    **{
        f"src {bad!r}": (lambda g, k, s=bad: g.recv(f4(k), s), InvalidCallError, "src")
        for bad in (-1, -2, MPI.ANY_SOURCE, 99, 0.5, "0")
    },
    **{
        f"tag {bad!r} of {name}": (call, InvalidCallError, "tag")
        for bad in (-1, 2**40, 1.5, None)
        for name, call in {
            "send": lambda g, k, t=bad: g.send(f4(k), 0, tag=t),
            "recv": lambda g, k, t=bad: g.recv(f4(k), 0, tag=t),
            "recv_anysource": lambda g, k, t=bad: g.recv_anysource(f4(k), t),
        }.items()
    },
    "strided message": (lambda g, k: g.send(f4(k, 4, 2)[:, 0], 0), InvalidCallError, "tensor"),
    "timeout of a recv": (lambda g, k: g.recv(f4(k), 0, timeout=-2), InvalidCallError, "timeout"),
}

# What takes no array, and arrays that only NumPy has.
NO_ARRAYS = {
    **{
        f"ranks {bad!r}": (lambda g, k, r=bad: g.split_group(r), InvalidCallError, "ranks")
        for bad in ([0, 0], [99], [-1], 0, "01", [0.5], None)
    },
    **{
        f"color {bad!r}": (lambda g, k, c=bad: g.split(c), InvalidCallError, "color")
        for bad in (-1, 2**31, 2**70, 0.5, "0", np.float64(1))
    },
    **{
        f"key {bad!r}": (lambda g, k, b=bad: g.split(0, key=b), InvalidCallError, "key")
        for bad in (0.5, True, 2**31, -(2**31) - 1, 2**70, None)
    },
    **{
        f"shape {bad!r}": (lambda g, k, s=bad: g.empty(s), InvalidCallError, "shape")
        for bad in (-1, (2, -1), 1.5, "2", 2**62, (2**31, 2**31), 2**70)
    },
    **{
        f"root {bad!r} of broadcast_object": (
            lambda g, k, r=bad: g.broadcast_object(1, r),
            InvalidCallError,
            "root",
        )
        for bad in (-1, 99, 1.5, "0", None, True)
    },
    "dtype of empty": (lambda g, k: g.empty(2, "nonesuch"), InvalidCallError, "dtype"),
    "objects in empty": (lambda g, k: g.empty(2, object), UnsupportedError, "dtype"),
    "an object that can't be pickled": (
        lambda g, k: g.allgather_object(lambda: 0),
        InvalidCallError,
        "obj",
    ),
    "objects in the wrong number": (
        lambda g, k: g.scatter_object([0] * (g.size() + 1), g.rank()),
        InvalidCallError,
        "objs",
    ),
}
NUMPYS = {
    f"{name} array": (lambda g, k, x=bad: g.allreduce(x), error, "tensor")
    for name, (bad, error) in ARRAYS.items()
}
NUMPYS |= {
    f"SUM of {name}": (lambda g, k, x=x: g.allreduce(x), UnsupportedError, "op.*allgather")
    for name, x in MOVES.items()
}
NUMPYS |= {
    "read-only output": (
        lambda g, k: g.all_gather_single(locked(row(g, k, 4)), f4(k)),
        InvalidCallError,
        "output",
    ),
    "read-only in a list": (
        lambda g, k: g.allgather([*each(g, k)[1:], locked(f4(k))], f4(k)),
        InvalidCallError,
        "output_tensors",
    ),
}
NUMPYS_LONELY = {
    "read-only recv": (lambda g, k: g.recv(locked(f4(k)), 0), InvalidCallError, "tensor"),
    "message of objects": (lambda g, k: g.send(np.array([{}]), 0), UnsupportedError, "tensor"),
}

# Tensors that NumPy has no like of.
TENSORS = {
    "strided": (lambda torch: torch.ones(4, 4)[:, ::2], InvalidCallError),
    "transposed": (lambda torch: torch.ones(3, 4).t(), InvalidCallError),
    "expanded": (lambda torch: torch.ones(1).expand(4), InvalidCallError),
    "sparse": (lambda torch: torch.eye(3).to_sparse(), InvalidCallError),
    "quantized": (
        lambda torch: torch.quantize_per_tensor(torch.ones(3), 0.5, 0, torch.qint8),
        InvalidCallError,
    ),
    "meta": (lambda torch: torch.ones(3, device="meta"), InvalidCallError),
    "conjugated": (lambda torch: torch.ones(3, dtype=torch.cfloat).conj(), InvalidCallError),
    "negated": (lambda torch: torch.ones(3, dtype=torch.cfloat).conj().imag, InvalidCallError),
    "complex half": (lambda torch: torch.ones(3, dtype=torch.complex32), UnsupportedError),
    "fake": (
        lambda torch: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3)),
        (InvalidCallError, UnsupportedError),
    ),
}
TORCHS = {
    f"{name} tensor": (
        lambda g, k, make=make: g.allreduce(make(importlib.import_module("torch"))),
        error,
        "tensor",
    )
    for name, (make, error) in TENSORS.items()
}

# What every rank of a group takes part in, and all there is, per library.
TOGETHER = {"numpy": NO_ARRAYS | NUMPYS | CASES, "torch": TORCHS | CASES}
ALL = {"numpy": TOGETHER["numpy"] | NUMPYS_LONELY | LONELY, "torch": TOGETHER["torch"] | LONELY}


def still_works(pg):
    parts = [data(r, 5) for r in range(pg.size())]
    x = parts[pg.rank()].copy()
    pg.allreduce(x).wait()
    assert NUMPY.same(x, reduced("SUM", parts))


def test_there_are_enough_kinds_of_bad_input():
    assert min(map(len, ALL.values())) >= 57


def refused_everywhere(pg, kind, case):
    call, error, word = ALL[kind.name][case]
    with pytest.raises(error, match=word) as caught:
        call(pg, kind)
    assert isinstance(error, tuple) or type(caught.value) is error
    still_works(pg)


def refused_on_one_rank(pg, kind, case):
    call, error, word = TOGETHER[kind.name][case]
    odd = len(case) % pg.size()
    if pg.rank() == odd:
        with pytest.raises(error, match=word):
            call(pg, kind)
    else:
        with pytest.raises(CollectiveMismatchError, match=f"rank {odd}.*{word}"):
            pg.allreduce(f4(kind)).wait()
    still_works(pg)


@pytest.mark.parametrize("case", ALL["numpy"])
def test_bad_on_every_rank(pg, case):
    refused_everywhere(pg, NUMPY, case)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", TOGETHER["numpy"])
def test_bad_on_one_rank(pg, case):
    refused_on_one_rank(pg, NUMPY, case)


@contextlib.contextmanager
def named(case):
    """Have a failure in here name the case: a test for each would take a test run of its own."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"{case}: {error}") from error


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch is in two minds about some
def test_bad_tensors(pg):
    TORCH.require()
    for case in ALL["torch"]:
        with named(case):
            refused_everywhere(pg, TORCH, case)
    for case in TOGETHER["torch"] if pg.size() > 1 else ():
        with named(case):
            refused_on_one_rank(pg, TORCH, case)


def test_a_buffer_that_an_unfinished_work_writes(pg, kind):
    """Reading or writing it is refused until the Work is done; sharing what is read is fine."""
    n, me = pg.size(), pg.rank()
    x = kind.array(data(me, 1000))
    pending = pg.recv(x, me, tag=5)  # nothing was sent yet, so this stays unfinished
    for use in (
        lambda: pg.allreduce(x),
        lambda: pg.broadcast(x, 0),
        lambda: pg.allreduce(x[10:20]),
        lambda: pg.send(x, me, tag=6),
        lambda: pg.recv(x[:5], me, tag=6),
    ):
        with pytest.raises(InvalidCallError, match="unfinished"):
            use()
    sent = kind.array(data(me, 1000, seed=3))
    twice = [pg.send(sent, me, tag=5), pg.send(sent, me, tag=6)]  # both only read
    mc.wait_all([pending, twice[0], pg.recv(kind.full(1000, 0), me, tag=6), twice[1]])
    assert kind.same(x, data(me, 1000, seed=3))
    pg.allreduce(x).wait()
    assert kind.same(x, reduced("SUM", [data(r, 1000, seed=3) for r in range(n)]))


@pytest.mark.parametrize(
    "options, error, word",
    [
        ({"backend": "nonesuch"}, InvalidCallError, "backend"),
        ({"device": "abacus"}, (InvalidCallError, UnsupportedError), "device"),
        ({"device": "cuda:x"}, UnsupportedError, "device"),
        ({"device": "cpu", "backend": "staged"}, UnsupportedError, "device='cuda'"),
        ({"device": "cpu", "backend": "nccl"}, UnsupportedError, "device='cuda'"),
        ({"timeout": -1}, InvalidCallError, "timeout"),
        ({"progress": "eternal"}, InvalidCallError, "progress"),
        ({"comm": 5}, InvalidCallError, "comm"),
        ({"nonesuch": 1}, (InvalidCallError, TypeError), "nonesuch"),
    ],
    ids=str,
)
def test_bad_options_of_a_new_group(options, error, word):
    with pytest.raises(error, match=word):
        mc.new_group(**options)


@pytest.mark.parametrize("size", [0, -1, 1.5, None, 2**31, 2**70])
def test_bad_size_of_a_merge(fresh, folder, size):
    with pytest.raises(InvalidCallError, match="size"):
        fresh.merge_remote_group(mc.FileStore(str(folder)), size, timeout=5)
    still_works(fresh)


@pytest.mark.parametrize("store", [None, "folder", object()])
def test_a_merge_without_a_store(fresh, store):
    """The store is the leader's business; the others hear of it."""
    error = InvalidCallError if fresh.rank() == 0 else (InvalidCallError, CollectiveMismatchError)
    with pytest.raises(error, match="store"):
        fresh.merge_remote_group(store, fresh.size(), timeout=5)
    still_works(fresh)
