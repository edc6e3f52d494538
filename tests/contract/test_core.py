"""The compiled core does what the general way does, and leaves to that what it can't do."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import time

import numpy as np
import pytest
from mpi4py import MPI

import mpicoll as mc
from mpicoll.engine import checks
from mpicoll.engine.progress import engine
from mpicoll.engine.work import DoneWork
from mpicoll.errors import (
    CallInterruptedError,
    CollectiveMismatchError,
    GroupBrokenError,
    GroupClosedError,
    InvalidCallError,
    MpicollError,
    RemoteRankError,
)
from mpicoll.runtime.memory import digest_of
from mpicoll.transports import select
from mpicoll.transports.shm import core
from tests.contract.arrays import DTYPES, KINDS, data

_native = pytest.importorskip("mpicoll.transports.shm._native")
pytestmark = [
    pytest.mark.mpi,
    pytest.mark.skipif(not core.available(), reason="there is no compiled core here"),
]

LIMIT = select.tuning.inline
OPS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")


@pytest.fixture
def direct(fresh):
    """A group whose small calls are the core's."""
    if fresh._core is None:
        pytest.skip("the group's ranks don't all share memory")
    return fresh


def strange(rng, size, dtype):
    """Any bits, among floats many zeros, infinities and NaNs of both signs with payloads."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, size).astype(bool)
    values = np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).copy()
    if dtype.kind == "f":
        chosen = rng.random(size) < 0.5
        special = np.array([0.0, -0.0, np.inf, -np.inf, 1, -1], dtype)
        values[chosen] = rng.choice(special, int(chosen.sum()))
    return values


@pytest.mark.parametrize("dtype", "?bBhHiIqQefd")
@pytest.mark.parametrize("size", [1, 4, 5, 17, 1000, 60_000])  # 4 doubles fill a line
def test_the_same_bits_with_and_without(direct, world, dtype, size):
    compiled, rng = direct._core, np.random.default_rng(size + 7 * direct.rank())
    for op in map(mc.ReduceOp.__dict__.get, OPS):
        given, got = strange(rng, size, dtype), []
        for way in (compiled, None):
            direct._core = way
            for call in (direct.allreduce, direct.scan, direct.exscan):
                array = given.copy()
                try:
                    call(array, op).wait()
                except mc.UnsupportedError:
                    continue
                got.append(array.tobytes())
            array = given.copy()
            try:
                direct.reduce(array, 0, op).wait()
            except mc.UnsupportedError:
                continue
            got.append(array.tobytes())
        half = len(got) // 2
        assert got[:half] == got[half:], op
        if got:
            assert len(set(world.allgather(got[0]))) == 1


@pytest.mark.parametrize("size", [70_001, 600_000])
def test_the_same_bits_in_large_arrays(direct, size):
    n, chunks = direct.size(), direct._caller.transport._chunks
    rng = np.random.default_rng(size + direct.rank())
    for op in map(mc.ReduceOp.__dict__.get, OPS[:5]):
        for dtype in "efd":
            given, whole, got = strange(rng, size, dtype), strange(rng, n * size, dtype), []
            for way in (chunks, None):
                direct._caller.transport._chunks = way
                array = given.copy()
                direct.allreduce(array, op).wait()
                got.append(array.tobytes())
                for root in range(n):
                    array = given.copy()
                    direct.reduce(array, root, op).wait()
                    got.append(array.tobytes())
                array = np.empty_like(given)
                direct.reduce_scatter_single(array, whole.copy(), op).wait()
                got.append(array.tobytes())
                if op is not mc.ReduceOp.AVG:
                    array = given.copy()
                    direct.scan(array, op).wait()
                    got.append(array.tobytes())
            half = len(got) // 2
            assert got[:half] == got[half:], (op, dtype)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_call_that_is_over_answers_as_any_other(direct, kind):
    kind.require()
    x = kind.full(3, direct.rank() + 1)
    works = [direct.allreduce(x) for _ in range(300) if mc.wait_all([direct.barrier()])]
    over = [work for work in works if type(work) is not mc.Work]  # whose peers were not late
    if not all(direct.allgather_object(bool(over))):
        pytest.skip("on this machine the peers are always late")
    work = over[-1]
    assert isinstance(work, mc.Work)
    assert work.wait() and work.wait(timeout=5) and work.is_completed() and work.is_success()
    assert work.exception() is None and work.result() == [x] and work.result()[0] is x
    assert work.get_future().result(5)[0] is x
    assert f"allreduce(float32[3], op=SUM) #{work.seq}, done" in repr(work)
    work.synchronize()
    with pytest.raises(InvalidCallError, match="source_rank"):
        work.source_rank()
    with pytest.raises(InvalidCallError, match="timeout"):
        work.wait(timeout=-1)


def test_the_recorder_shows_it_where_it_was_called(direct):
    direct.broadcast(np.arange(6.0).reshape(2, 3), direct.size() - 1).wait()
    (entry,) = [c for c in json.loads(direct.dump())["calls"] if c["kind"] == "broadcast"]
    assert (entry["dtype"], entry["count"], entry["shape"]) == ("float64", 6, [2, 3])
    assert (entry["root"], entry["op"], entry["state"]) == (direct.size() - 1, "", "finished")
    assert entry["called"] <= entry["ended"] and entry["error"] is None
    assert os.path.basename(entry["file"]) == "test_core.py"


def test_numbers_follow_one_another_whichever_way(direct):
    numbers = []
    for i in range(20):
        x = np.full(5, 1.0)
        numbers.append(direct.allreduce(x).seq)
        numbers.append(direct.scan(x.astype("D")).seq)
        assert direct.broadcast_object(i, 0) == i
    assert numbers == sorted(set(numbers)) and numbers[-1] == 3 * 20 - 1


def test_what_differs_is_told_on_all_ranks(direct):
    if direct.size() == 1:
        pytest.skip("needs two ranks")
    x = np.ones(4, np.float32)
    for _ in range(3):
        with pytest.raises(CollectiveMismatchError, match="differs between the ranks"):
            if direct.rank() == 0:
                direct.allreduce(x).wait()
            else:
                direct.allreduce(x, mc.ReduceOp.MAX).wait()
        direct.allreduce(np.ones(4)).wait()  # still usable


def test_a_late_peer_is_waited_for_the_general_way(direct):
    for late in range(direct.size()):
        for i in range(10):
            if direct.rank() == late:
                time.sleep(2e-3)
            x = np.full(3, direct.rank() + i, np.int64)
            direct.allreduce(x).wait()
            assert (x == sum(range(direct.size())) + i * direct.size()).all()


def test_a_closed_group_has_no_core(direct):
    direct.allreduce(np.ones(3)).wait()
    direct.shutdown()
    with pytest.raises(GroupClosedError):
        direct.allreduce(np.ones(3))
    with pytest.raises(GroupClosedError):
        direct.barrier()


@pytest.fixture
def struck(direct, monkeypatch):
    """A group in which rank 0 was interrupted between the core and the general way."""
    if direct.size() == 1:
        pytest.skip("needs two ranks")
    if direct.rank() == 0:

        def strike(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(engine()._poll, "next", math.inf)  # nor does it go by the core then
            patched.setattr(direct, "_call", strike)
            with pytest.raises(KeyboardInterrupt):
                direct.allreduce(np.ones(3)).wait()
    else:
        time.sleep(0.3)  # rank 0 posts, and gives up waiting
        direct.allreduce(np.ones(3)).wait()  # it had all from rank 0
    return direct


@pytest.mark.parametrize(
    "call",
    [
        lambda pg: pg.allreduce(np.ones(3)),
        lambda pg: pg.allreduce([np.full(3, 10.0)]),  # not for the core: a list
        lambda pg: pg.allreduce(np.ones(3), np.nan),
        lambda pg: pg.reduce(np.ones(3), np.int64(0)),
        lambda pg: pg.barrier(),
        lambda pg: pg.broadcast_object("x", 0),
    ],
    ids=["same", "list", "refused", "reduce", "barrier", "object"],
)
def test_an_exception_between_the_core_and_the_general_way_breaks_the_group(struck, call):
    """The peers may have used what this rank gave, so the call can't be made another one."""
    if struck.rank() == 0:
        with pytest.raises(GroupBrokenError) as caught:
            call(struck)
        assert isinstance(caught.value.__cause__, CallInterruptedError)
    else:
        with pytest.raises((RemoteRankError, GroupBrokenError)):
            struck.barrier().wait()


def test_what_was_posted_is_not_refused_afterwards(direct, monkeypatch):
    if direct.size() == 1:
        pytest.skip("needs two ranks")
    if direct.rank() == 0:

        def strike(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(engine()._poll, "next", math.inf)
            patched.setattr(checks, "allreduce", strike)
            with pytest.raises(KeyboardInterrupt):
                direct.allreduce(np.ones(3)).wait()
        with pytest.raises(GroupBrokenError):
            direct.barrier()
    else:
        time.sleep(0.3)
        direct.allreduce(np.ones(3)).wait()
        with pytest.raises((RemoteRankError, GroupBrokenError)):
            direct.barrier().wait()


def test_an_abort_while_a_digest_is_made(direct, monkeypatch):
    """As by a signal handler: nothing is posted in a group that is gone."""
    outputs = [np.empty(7) for _ in range(direct.size())]
    digest_of = checks.digest

    def aborts(*counts):
        direct.abort()
        return digest_of(*counts)

    _native.configure(**{**core.shared(), "digest": aborts})
    try:
        with pytest.raises(MpicollError):
            direct.allgather(outputs, np.ones(7)).wait()
    finally:
        _native.configure(**core.shared())


def test_results_are_those_that_were_given(direct):
    n = direct.size()
    for _ in range(50):
        outputs = given = [np.empty(2) for _ in range(n)]
        work = direct.allgather(outputs, np.ones(2))
        work.wait()
        kept = list(given)
        outputs.clear()
        assert all(a is b for a, b in zip(work.result(), kept, strict=True))
        assert "allgather" in repr(work)


def test_a_forked_child_makes_no_call(direct):
    direct.allreduce(np.ones(3)).wait()
    child = os.fork()
    if not child:
        try:
            direct.barrier()
        except GroupClosedError:
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    direct.barrier().wait()


@pytest.mark.parametrize("dtype", ["float32", "complex64", "longdouble", "float16", "int16"])
def test_what_moves_moves_both_ways(direct, dtype):
    n, me, compiled = direct.size(), direct.rank(), direct._core
    for way in (compiled, None):
        direct._core = way
        for size in (1, 5, 1000, 90_001):  # the last ones go through the slots
            parts = [data(r, size, dtype) for r in range(n)]
            outputs = [np.zeros(size, dtype) for _ in range(n)]
            direct.allgather(outputs, parts[me]).wait()
            assert all(map(np.array_equal, outputs, parts))
            whole = np.zeros(n * size, dtype)
            direct.all_gather_single(whole, parts[me]).wait()
            assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("ways", ["the core", "the general way", "both"])
@pytest.mark.parametrize("large", ["none", "one", "all"])
def test_objects_of_sizes_around_the_limit(direct, ways, large):
    """Whatever the sizes, and whichever rank's is too large to travel inline."""
    n, me, compiled = direct.size(), direct.rank(), direct._core
    if ways == "the general way" or (ways == "both" and me % 2):
        direct._core = None
    for size in (0, LIMIT // n - 100, LIMIT - 1000, LIMIT - 24, LIMIT - 8, LIMIT, LIMIT + 1):
        for odd in range(n if large == "one" else 1):
            long = [large == "all" or (large == "one" and r == odd) for r in range(n)]
            objects = [(r, b"x" * (size if long[r] else r)) for r in range(n)]
            assert direct.allgather_object(objects[me]) == objects
            for root in range(n):
                assert direct.broadcast_object(objects[me], root) == objects[root]
                got = direct.gather_object(objects[me], root)
                assert got == (objects if me == root else None)
                assert direct.scatter_object(objects if me == root else None, root) == objects[me]
    direct._core = compiled


def test_objects_whose_pickling_fails_or_calls(direct):
    """What the core can't pickle, the general way refuses, on all ranks; and user code may run."""

    class Odd:
        def __reduce__(self):
            direct.barrier().wait()
            return str, ("made by a call",)

    with pytest.raises(MpicollError, match="can't be pickled"):
        direct.broadcast_object((lambda: 0) if direct.rank() == 0 else None, 0)
    assert direct.allgather_object(Odd()) == ["made by a call"] * direct.size()
    if direct.size() > 1:
        with pytest.raises(CollectiveMismatchError):
            direct.broadcast_object("x", min(direct.rank(), 1))
    assert direct.broadcast_object("y", 0) == "y"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_records_are_in_the_same_words(direct, kind):
    """A rank whose peer is late posts twice: by the core, and by the general way."""
    kind.require()
    memory, state, compiled = (
        direct._caller.transport._memory,
        direct._caller.group_state,
        direct._core,
    )

    def record(way, move):
        direct._core = way
        move().wait()
        said = memory.records(state.seq)[direct.rank()][1:]
        line = memory._lines[state.seq & 1][direct.rank()]
        assert memory.words[line : line + 3].tolist() == [state.seq, digest_of(said[:-1]), said[-1]]
        return said

    for dtype in (*DTYPES, "longdouble", "clongdouble"):
        if not kind.holds(dtype):
            continue
        n, x = direct.size(), kind.array(data(0, (2 * direct.size(), 3), dtype))
        out = kind.full((2 * n, 3), 0, dtype)
        parts = [kind.full((2, 3), 0, dtype) for _ in range(n)]
        moves = [
            lambda x=x: direct.broadcast(x, 0),
            lambda x=x, out=out: direct.all_to_all_single(out, x, None, None),
            lambda x=x, out=out: direct.all_gather_single(out, x[:2]),
            lambda x=x, parts=parts: direct.allgather(parts, x[:2]),
            lambda x=x, parts=parts: direct.gather(parts if direct.rank() == 0 else [], x[:2], 0),
            lambda x=x: direct.allreduce(x, mc.ReduceOp.MAX),
        ]
        for move in moves:
            try:
                assert record(compiled, move) == record(None, move), dtype
            except MpicollError:  # no such reduction, which the record doesn't get to
                direct._core = None
                with pytest.raises(MpicollError):
                    move()
    direct._core = compiled


ODD_TENSORS = {
    "conjugated": lambda torch: torch.full((1,), 1 + 2j).conj(),
    "negated": lambda torch: torch.full((1,), 1 + 2j).conj().imag,
    "sparse": lambda torch: torch.eye(3).to_sparse(),
    "meta": lambda torch: torch.empty(3, device="meta"),
    "with a gradient": lambda torch: torch.ones(3, requires_grad=True),
    "a parameter": lambda torch: torch.nn.Parameter(torch.ones(3), requires_grad=False),
    "zero": lambda torch: torch._efficientzerotensor((3,)),
    "quantized": lambda torch: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "complex32": lambda torch: torch.ones(3, dtype=torch.complex32),
    "float8": lambda torch: torch.ones(3).to(torch.float8_e4m3fn),
    "transposed": lambda torch: torch.ones(2, 3).t(),
    "expanded": lambda torch: torch.ones(1).expand(3),
    "a column of one": lambda torch: torch.ones(1, 4)[:, :1],
    "empty": lambda torch: torch.ones(0),
    "a scalar": lambda torch: torch.tensor(1.0),
    "of three dimensions": lambda torch: torch.ones(2, 3, 4),
    "a part": lambda torch: torch.arange(10.0)[3:7],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD_TENSORS)
def test_tensors_of_all_sorts_are_taken_or_refused_as_by_the_general_way(direct, name):
    torch = pytest.importorskip("torch")

    def outcome():
        tensor = ODD_TENSORS[name](torch)
        try:
            direct.allreduce(tensor).wait()
        except MpicollError as error:
            return type(error), str(error)
        return tensor.shape, tensor.dtype, tensor.tolist()

    compiled = direct._core
    first = outcome()
    direct._core = None
    assert outcome() == first
    direct._core = compiled


def test_some_with_the_core_and_some_without(direct, world):
    """The ways are one on the wire: a rank without a compiler is no other rank."""
    if direct.rank() % 2:
        direct._core = None
        direct._caller.transport._chunks = None
    n, me = direct.size(), direct.rank()
    for size in (1, 5, 1000, 30_000, 200_001):
        x = data(me, size, "f8")
        direct.allreduce(x).wait()
        assert np.array_equal(x, sum(data(r, size, "f8") for r in range(n)))
        x = data(me, size, "f4")
        direct.allreduce(x, mc.ReduceOp.MAX).wait()
        assert np.array_equal(x, np.max([data(r, size, "f4") for r in range(n)], axis=0))
        into, given = np.zeros(size), data(me, n * size, "f8")
        direct.reduce_scatter_single(into, given).wait()
        total = sum(data(r, n * size, "f8") for r in range(n))
        assert np.array_equal(into, total[me * size : (me + 1) * size])
        for root in range(n):
            outputs = [np.zeros(size) for _ in range(n)]
            direct.gather(outputs, data(me, size, "f8"), root).wait()
            if me == root:
                assert all(np.array_equal(o, data(r, size, "f8")) for r, o in enumerate(outputs))
            into = np.zeros(size)
            direct.scatter(into, [data(r, size, "f8", root) for r in range(n)], root).wait()
            assert np.array_equal(into, data(me, size, "f8", root))
        sent, into = data(me, n * size, "i4"), np.zeros(n * size, "i4")
        direct.all_to_all_single(into, sent, [], []).wait()
        rows = [data(r, n * size, "i4")[me * size : (me + 1) * size] for r in range(n)]
        assert np.array_equal(into, np.concatenate(rows))
    assert world.allreduce(1, MPI.SUM) == n


def test_methods_take_arguments_as_those_in_python(direct):
    n, sum_, group = direct.size(), mc.ReduceOp.SUM, mc.ProcessGroup
    ways = [
        lambda x: direct.allreduce(x),
        lambda x: direct.allreduce(x, sum_),
        lambda x: direct.allreduce(x, timeout=5, op=sum_),
        lambda x: direct.allreduce(op=sum_, tensor=x),
        lambda x: group.allreduce(direct, x),
        lambda x: getattr(direct, "allreduce")(x),  # noqa: B009
        lambda x: functools.partial(direct.allreduce, x)(op=sum_),
    ]
    for way in ways:
        seen = set()
        for _ in range(50):  # now and then a call goes the general way: peers may be late
            x = np.ones(3)
            work = way(x)
            work.wait()
            seen.add(type(work))
            assert (x == n).all() and work.result()[0] is x
        assert DoneWork in seen
    x = np.ones(3)
    direct.allreduce(x, **{"".join(["o", "p"]): sum_}).wait()  # no name that Python knows already
    assert (x == n).all()
    refused = [
        lambda: direct.allreduce(),
        lambda: direct.allreduce(np.ones(1), sum_, None, 1),
        lambda: direct.allreduce(np.ones(1), tensor=np.ones(1)),
        lambda: direct.broadcast(np.ones(1), 0, rot=1),
    ]
    for call in refused:
        with pytest.raises(TypeError, match=r"ProcessGroup\.\w+\(\) "):
            call()
    assert inspect.signature(group.allreduce).parameters["op"].default is sum_
    assert group.barrier.__qualname__ == "ProcessGroup.barrier" and group.barrier.__doc__


def test_arrays_of_many_dimensions(direct):
    """The recorder has room for eight; what has more goes the general way."""
    for dimensions in (0, 1, 8, 9):
        x = np.ones((1,) * dimensions)
        direct.allreduce(x).wait()
        assert x.sum() == direct.size()
        assert direct._caller.recorder.entries()[-1]["shape"] == [1] * dimensions


def test_a_group_of_one_rank_has_the_core(direct):
    alone = direct.split_group([direct.rank()])
    assert alone._core is not None
    for size in (1, 1000, 300_000):  # the last by MPI
        x, y = data(0, size, "f8"), np.zeros(size)
        alone.allreduce(x).wait()
        alone.broadcast(x, 0).wait()
        alone.all_gather_single(y, x).wait()
        assert np.array_equal(x, data(0, size, "f8")) and np.array_equal(x, y)
    assert alone.broadcast_object("self", 0) == "self"
    alone.shutdown()
