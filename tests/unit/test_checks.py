"""The checkers: pure and local.  What they refuse through a group is in the contract suite."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from mpicoll.arrays.ops import ReduceOp
from mpicoll.engine import checks, kinds
from mpicoll.engine.call import ANY_SOURCE, UNEVEN, digest
from mpicoll.errors import InvalidCallError


def f4(n=4):
    return np.zeros(n, np.float32)


def lists(*counts):
    return [f4(n) for n in counts]


# name: (the call of rank 1 of 3, its description, its count)
CALLS = {
    "allreduce": (checks.allreduce(1, 3, f4(), ReduceOp.MAX), "allreduce(float32[4], op=MAX)", 4),
    "broadcast": (checks.broadcast(1, 3, f4(0), 2), "broadcast(float32[0], root=2)", 0),
    "reduce": (
        checks.reduce(1, 3, np.zeros((2, 3), "i8"), 0, ReduceOp.SUM),
        "reduce(int64[6], op=SUM, root=0)",
        6,
    ),
    "allgather": (checks.allgather(1, 3, lists(1, 2, 3), f4(2)), "allgather(float32[uneven])", -1),
    "gather on the root": (
        checks.gather(1, 3, lists(5, 4, 6), f4(), 1),
        "gather(float32[uneven], root=1)",
        UNEVEN,
    ),
    "gather elsewhere": (checks.gather(1, 3, [], f4(), 2), "gather(float32[4], root=2)", 4),
    "scatter": (checks.scatter(1, 3, f4(), None, 2), "scatter(float32[4], root=2)", 4),
    "reduce_scatter": (
        checks.reduce_scatter(1, 3, f4(2), lists(1, 2, 3), ReduceOp.SUM),
        "reduce_scatter(float32[1, 2, 3], op=SUM)",
        UNEVEN,
    ),
    "alltoall": (
        checks.alltoall(1, 3, lists(4, 4, 4), lists(4, 4, 4)),
        "alltoall(float32[4 x 3])",
        4,
    ),
    "all_to_all_single": (
        checks.all_to_all_single(1, 3, f4((4, 2)), f4((6, 2)), [1, 3, 0], (0, 3, 3)),
        "all_to_all_single(float32[0, 6, 6])",
        UNEVEN,
    ),
    "send": (checks.send(3, 99, f4(), 2, 7), "send(float32[4], dst=2, tag=7)", 4),
    "structures": (
        checks.broadcast(1, 3, np.zeros(2, [("id", "i4"), ("at", "M8[s]")]), 0),
        "broadcast({id: int32, at: datetime64[s]}[2], root=0)",
        2,
    ),
    "recv": (checks.recv(3, 99, f4(), ANY_SOURCE, 0), "recv(float32[4], src=ANY_SOURCE, tag=0)", 4),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_says_what_it_is(name):
    call, said, count = CALLS[name]
    assert call.describe() == said
    assert call.count == count


def test_rows_become_elements():
    call, _, _ = CALLS["all_to_all_single"]
    assert call.send.counts == (0, 6, 6) and call.send.displs == (0, 0, 6)
    assert call.recv.counts == (2, 6, 0) and call.extent == 12


def test_only_the_counts_that_must_agree_enter_the_digest():
    def of(*counts, rank=0):
        return checks.allgather(rank, 3, lists(*counts), f4(counts[rank])).digest

    assert of(1, 2, 3) == of(1, 2, 3, rank=2) != of(1, 3, 2)
    assert of(1, 2, 3) != of(1, 2, 4) and 0 <= of(1, 2, 3) < 2**63


def test_a_digest_is_the_same_in_every_process():
    code = "from mpicoll.engine.call import digest; print(digest(1, -2, 3))"
    run = [subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)]
    assert run[0] == run[1] == f"{digest(1, -2, 3)}\n"


def test_coalesced_calls_differ_by_order_dtype_and_size():
    def of(*arrays):
        parts = [checks.allreduce(0, 2, x, ReduceOp.SUM) for x in arrays]
        return checks.coalesced(kinds.ALLREDUCE_COALESCED, parts, "tensors").digest

    i4 = np.zeros(4, np.int32)
    found = {of(f4(), i4), of(i4, f4()), of(f4(), f4(3)), of(f4(3), f4()), of(f4(), f4()), of(i4)}
    assert len(found) == 6


def test_spans_are_the_memory_that_is_read_and_written():
    x, y = f4(3), f4(1)
    reads, writes = checks.all_gather_single(0, 3, x, y).spans()
    assert writes == ((x.ctypes.data, x.ctypes.data + 12),)
    assert reads == ((y.ctypes.data, y.ctypes.data + 4),)
    assert checks.allgather(0, 1, [f4(0)], f4(0)).spans() == ((), ())


def test_what_a_rank_only_reads_need_not_be_writable():
    x = f4()
    x.flags.writeable = False
    assert checks.broadcast(1, 3, x, 1).recv is None
    assert checks.reduce(0, 3, x, 1, ReduceOp.SUM).recv is None
    with pytest.raises(InvalidCallError, match="writable"):
        checks.broadcast(0, 3, x, 1)
    with pytest.raises(InvalidCallError, match="writable"):
        checks.reduce(1, 3, x, 1, ReduceOp.SUM)


def test_overlap_is_found_however_the_arrays_lie():
    x = f4(12)
    parts = [x[0:4], x[4:8], x[8:12]]
    checks.alltoall(0, 3, parts, lists(4, 4, 4))  # neighbours don't overlap
    checks.reduce_scatter(0, 3, f4(), [x[:4]] * 3, ReduceOp.SUM)  # reading twice is fine
    for outputs, inputs in [
        ([x[0:4], x[3:7], x[8:12]], lists(4, 4, 4)),
        ([x[8:12], x[4:8], x[1:5]], lists(4, 4, 4)),
        (parts, [f4(), f4(), x[11:]]),
        (parts, [x, f4(), f4()]),
    ]:
        with pytest.raises(InvalidCallError, match="overlap"):
            checks.alltoall(1, 3, outputs, inputs)


def test_ones_own_part_is_in_place_and_the_rest_of_the_memory_is_not():
    x = f4(12)
    parts = [x[0:4], x[4:8], x[8:12]]
    assert checks.all_gather_single(1, 3, x, x[4:8]).in_place
    assert checks.allgather(2, 3, parts, parts[2]).in_place
    assert checks.gather(0, 3, parts, parts[0], 0).in_place
    assert checks.scatter(1, 3, parts[1], parts, 1).in_place
    assert checks.reduce_scatter(2, 3, parts[2], parts, ReduceOp.SUM).in_place
    assert checks.reduce_scatter_single(0, 3, x[:4], x, ReduceOp.MAX).in_place
    assert checks.alltoall(1, 3, parts, [f4(), parts[1], f4()]).in_place
    assert checks.all_to_all_single(0, 1, x, x, None, None).in_place
    assert checks.all_to_all_single(1, 2, x, x[4:], [4, 8], [0, 8]).in_place
    assert not checks.all_gather_single(1, 3, x, f4()).in_place
    for refused in (
        lambda: checks.all_gather_single(0, 3, x, x[4:8]),
        lambda: checks.allgather(0, 3, parts, parts[2]),
        lambda: checks.scatter(1, 3, parts[1], [parts[0], parts[1], parts[1]], 1),
        lambda: checks.reduce_scatter(2, 3, parts[2], [parts[2], f4(), parts[2]], ReduceOp.SUM),
        lambda: checks.alltoall(1, 3, parts, [parts[0], parts[1], f4()]),
        lambda: checks.all_to_all_single(0, 2, x, x, None, None),
        lambda: checks.all_to_all_single(1, 2, x[:8], x[2:10], [4, 4], [4, 4]),
    ):
        with pytest.raises(InvalidCallError, match="overlap"):
            refused()


def test_an_array_stands_for_the_list_of_its_rows():
    x = np.zeros((3, 4), np.float32)
    call = checks.allgather(1, 3, x, f4())
    assert call.recv.counts == (4, 4, 4)
    assert [b.address for b in call.recv.buffers] == [row.ctypes.data for row in x]
    assert checks.scatter(1, 3, f4(1), np.zeros(3, np.float32), 1).send.counts == (1, 1, 1)
    assert checks.reduce_scatter(1, 3, f4(2), x[:, 1:3], ReduceOp.SUM).send.counts == (2, 2, 2)
    with pytest.raises(InvalidCallError, match="must have 4 arrays, one per rank"):
        checks.allgather(1, 4, x, f4())


def test_the_nested_lists_of_c10d_are_taken():
    outputs = lists(2, 2)
    assert checks.allgather(0, 2, [outputs], [f4(2)]).recv.counts == (2, 2)
    assert checks.gather(1, 2, [[]], [f4(2)], 0).recv is None
    assert checks.reduce_scatter(0, 2, [f4(2)], [lists(2, 2)], ReduceOp.SUM).send.counts == (2, 2)
