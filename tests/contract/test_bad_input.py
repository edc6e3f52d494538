"""Bad input is refused by name, at once, and the group goes on; on all ranks or on one alone."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import pytest

import mpicoll as mc
from mpicoll import ReduceOp
from mpicoll.errors import CollectiveMismatchError, InvalidCallError, UnsupportedError
from tests.contract.arrays import NUMPY, data, reduced

pytestmark = pytest.mark.mpi


def f4(*shape):
    return np.ones(shape or (4,), np.float32)


def locked(array):
    array.flags.writeable = False
    return array


def each(g, make):
    return [make() for _ in range(g.size())]


def row(g, *shape):
    """float32 with as many rows as the group has ranks."""
    return f4(g.size(), *shape)


# name: (the call, what it raises, the word that its message must hold)
ARRAYS = {
    "strided": (f4(4, 4)[:, ::2], InvalidCallError),
    "reversed": (f4()[::-1], InvalidCallError),
    "Fortran order": (np.asfortranarray(f4(3, 4)), InvalidCallError),
    "read-only": (locked(f4()), InvalidCallError),
    "masked": (np.ma.masked_array(f4(), mask=[1, 0, 0, 0]), InvalidCallError),
    "list of floats": ([1.0, 2.0], InvalidCallError),
    "scalar": (1.0, InvalidCallError),
    "NumPy scalar": (np.float32(1), InvalidCallError),
    "None": (None, InvalidCallError),
    "string": ("text", InvalidCallError),
    "swapped": (f4().astype(">f4"), UnsupportedError),
    "objects": (np.array([None, {}]), UnsupportedError),
    "unicode": (np.array(["a", "bc"]), UnsupportedError),
    "byte strings": (np.array([b"a", b"bc"]), UnsupportedError),
    "dates": (np.zeros(3, "M8[s]"), UnsupportedError),
    "durations": (np.zeros(3, "m8[s]"), UnsupportedError),
    "structured": (np.zeros(3, [("a", "f4"), ("b", "i4")]), UnsupportedError),
}
CASES = {
    f"{name} array": (lambda g, x=bad: g.allreduce(x), error, "tensor")
    for name, (bad, error) in ARRAYS.items()
}
CASES |= {
    f"root {root!r} of {kind}": (call, InvalidCallError, "root")
    for bad in (-1, 99, 1.5, "0", None, True)
    for root in (bad,)
    for kind, call in {
        "broadcast": lambda g, r=bad: g.broadcast(f4(), r),
        "reduce": lambda g, r=bad: g.reduce(f4(), r),
        "gather": lambda g, r=bad: g.gather(each(g, f4), f4(), r),
        "scatter": lambda g, r=bad: g.scatter(f4(), each(g, f4), r),
        "broadcast_object": lambda g, r=bad: g.broadcast_object(1, r),
    }.items()
}
CASES |= {
    f"timeout {bad!r}": (lambda g, t=bad: g.barrier(timeout=t), InvalidCallError, "timeout")
    for bad in (-1, 0, 0.0, math.nan, "5", True, timedelta(0), datetime(2026, 1, 1), [1])
}
CASES |= {
    f"op {bad!r}": (lambda g, op=bad: g.allreduce(f4(), op), InvalidCallError, "op")
    for bad in (None, "SUM", 3)
}
CASES |= {
    f"ranks {bad!r}": (lambda g, r=bad: g.split_group(r), InvalidCallError, "ranks")
    for bad in ([], [0, 0], [99], [-1], 0, "01", [0.5], None)
}
CASES |= {
    "strided input": (
        lambda g: g.all_gather_single(row(g, 4), f4(4, 2)[:, 0]),
        InvalidCallError,
        "input",
    ),
    "read-only output": (
        lambda g: g.all_gather_single(locked(row(g, 4)), f4()),
        InvalidCallError,
        "output",
    ),
    "read-only in a list": (
        lambda g: g.allgather([*each(g, f4)[1:], locked(f4())], f4()),
        InvalidCallError,
        "output_tensors",
    ),
    "output overlaps input": (
        lambda g: g.all_gather_single(*(lambda x: (x, x[:1]))(row(g))),
        InvalidCallError,
        "overlap",
    ),
    "outputs overlap": (
        lambda g: g.allreduce_coalesced([*(lambda x: (x[:3], x[2:]))(f4())]),
        InvalidCallError,
        "overlap",
    ),
    "input in reduce_scatter's output": (
        lambda g: g.reduce_scatter_single(*(lambda x: (x[:1], x))(row(g))),
        InvalidCallError,
        "overlap",
    ),
    "too small an output": (
        lambda g: g.all_gather_single(f4(4 * g.size() - 1), f4()),
        InvalidCallError,
        "output",
    ),
    "too large an input": (
        lambda g: g.reduce_scatter_single(f4(), f4(4 * g.size() + 1)),
        InvalidCallError,
        "input",
    ),
    "dtypes that differ": (
        lambda g: g.all_gather_single(row(g, 4), np.ones(4)),
        InvalidCallError,
        "dtype",
    ),
    "dtypes that differ in a list": (
        lambda g: g.alltoall(each(g, f4), each(g, lambda: np.ones(4, np.int32))),
        InvalidCallError,
        "dtype",
    ),
    "too few outputs": (
        lambda g: g.allgather(each(g, f4)[1:], f4()),
        InvalidCallError,
        "output_tensors",
    ),
    "too many inputs": (
        lambda g: g.reduce_scatter(f4(), [*each(g, f4), f4()]),
        InvalidCallError,
        "input",
    ),
    "own output of another size": (
        lambda g: g.allgather(each(g, lambda: f4(5)), f4()),
        InvalidCallError,
        "output_tensors",
    ),
    "own part of another size": (
        lambda g: g.reduce_scatter(f4(5), each(g, f4)),
        InvalidCallError,
        "input",
    ),
    "an array for a list": (
        lambda g: g.allgather(row(g, 4), f4()),
        InvalidCallError,
        "output_tensors",
    ),
    "None in a list": (
        lambda g: g.alltoall(each(g, f4), [*each(g, f4)[1:], None]),
        InvalidCallError,
        "input_tensors",
    ),
    "outputs and inputs in unequal number": (
        lambda g: g.all_gather_single_coalesced([row(g, 4)], [f4(), f4()]),
        InvalidCallError,
        "inputs",
    ),
    "nothing to coalesce": (lambda g: g.allreduce_coalesced([]), InvalidCallError, "tensors"),
    "splits too short": (
        lambda g: g.all_to_all_single(row(g), row(g), [1] * (g.size() - 1) or [1, 0], None),
        InvalidCallError,
        "output_split_sizes",
    ),
    "splits of another sum": (
        lambda g: g.all_to_all_single(row(g), row(g), None, [2] * g.size()),
        InvalidCallError,
        "input_split_sizes",
    ),
    "a negative split": (
        lambda g: g.all_to_all_single(row(g), row(g), None, [-1] * g.size()),
        InvalidCallError,
        "input_split_sizes",
    ),
    "splits that aren't integers": (
        lambda g: g.all_to_all_single(row(g), row(g), [1.0] * g.size(), None),
        InvalidCallError,
        "output_split_sizes",
    ),
    "nothing to split": (
        lambda g: g.all_to_all_single(f4(1).reshape(()), f4(1), None, None),
        InvalidCallError,
        "output",
    ),
    "AVG of integers": (
        lambda g: g.allreduce(np.ones(4, np.int32), ReduceOp.AVG),
        UnsupportedError,
        "AVG",
    ),
    "bits of floats": (lambda g: g.allreduce(f4(), ReduceOp.BAND), UnsupportedError, "BAND"),
    "order of complex numbers": (
        lambda g: g.allreduce(np.ones(4, "c8"), ReduceOp.MAX),
        UnsupportedError,
        "MAX",
    ),
    "complex factor for floats": (
        lambda g: g.allreduce(f4(), ReduceOp.PREMUL_SUM(1j)),
        UnsupportedError,
        "PREMUL_SUM",
    ),
    "an object that can't be pickled": (
        lambda g: g.allgather_object(lambda: 0),
        InvalidCallError,
        "obj",
    ),
    "objects in the wrong number": (
        lambda g: g.scatter_object([0] * (g.size() + 1), g.rank()),
        InvalidCallError,
        "objs",
    ),
}

# Point to point: nobody else takes part.
LONELY = {
    **{
        f"dst {bad!r}": (lambda g, d=bad: g.send(f4(), d), InvalidCallError, "dst")
        for bad in (-1, 99, 0.5, None)
    },
    **{
        f"src {bad!r}": (lambda g, s=bad: g.recv(f4(), s), InvalidCallError, "src")
        for bad in (-2, 99, 0.5, "0")
    },
    **{
        f"tag {bad!r} of {name}": (call, InvalidCallError, "tag")
        for bad in (-1, 2**40, 1.5, None)
        for name, call in {
            "send": lambda g, t=bad: g.send(f4(), 0, tag=t),
            "recv": lambda g, t=bad: g.recv(f4(), 0, tag=t),
            "recv_anysource": lambda g, t=bad: g.recv_anysource(f4(), t),
        }.items()
    },
    "strided message": (lambda g: g.send(f4(4, 2)[:, 0], 0), InvalidCallError, "tensor"),
    "read-only recv": (lambda g: g.recv(locked(f4()), 0), InvalidCallError, "tensor"),
    "message of objects": (lambda g: g.send(np.array([{}]), 0), UnsupportedError, "tensor"),
    "timeout of a recv": (lambda g: g.recv(f4(), 0, timeout=-2), InvalidCallError, "timeout"),
}


def still_works(pg):
    parts = [data(r, 5) for r in range(pg.size())]
    x = parts[pg.rank()].copy()
    pg.allreduce(x).wait()
    assert NUMPY.same(x, reduced("SUM", parts))


@pytest.mark.parametrize("case", [*CASES, *LONELY])
def test_bad_on_every_rank(pg, case):
    call, error, word = (CASES | LONELY)[case]
    with pytest.raises(error, match=word) as caught:
        call(pg)
    assert type(caught.value) is error
    still_works(pg)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("case", CASES)
def test_bad_on_one_rank(pg, case):
    call, error, word = CASES[case]
    odd = len(case) % pg.size()
    if pg.rank() == odd:
        with pytest.raises(error, match=word):
            call(pg)
    else:
        with pytest.raises(CollectiveMismatchError, match=f"rank {odd}.*{word}"):
            pg.allreduce(f4()).wait()
    still_works(pg)


TENSORS = {
    "strided": (lambda torch: torch.ones(4, 4)[:, ::2], InvalidCallError),
    "transposed": (lambda torch: torch.ones(3, 4).t(), InvalidCallError),
    "expanded": (lambda torch: torch.ones(1).expand(4), InvalidCallError),
    "sparse": (lambda torch: torch.eye(3).to_sparse(), InvalidCallError),
    "meta": (lambda torch: torch.ones(3, device="meta"), InvalidCallError),
    "conjugated": (lambda torch: torch.ones(3, dtype=torch.cfloat).conj(), InvalidCallError),
    "complex half": (lambda torch: torch.ones(3, dtype=torch.complex32), UnsupportedError),
    "fake": (
        lambda torch: torch._subclasses.FakeTensorMode().from_tensor(torch.ones(3)),
        (InvalidCallError, UnsupportedError),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_bad_tensors(pg, case):
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: torch)")
    make, error = TENSORS[case]
    with pytest.raises(error, match="tensor"):
        pg.allreduce(make(torch))
    still_works(pg)


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


@pytest.mark.parametrize("size", [0, -1, 1.5, None])
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
