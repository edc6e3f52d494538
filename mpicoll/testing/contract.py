"""What a group promises, as tests that the author of a backend inherits.

    mc.register_backend("mine", make_mine)

    class TestMine(GroupContract):
        dtypes = ("float32", "int64")

        @pytest.fixture
        def group(self):
            made = mc.new_group("mine", timeout=20)
            yield made
            made.shutdown()

Results are compared with NumPy's, on whole numbers, so they are exact.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ..arrays.ops import ReduceOp

Array = npt.NDArray[Any]

_NUMPY: dict[str, Callable[[Array, Array], Array]] = {
    "SUM": np.add,
    "PRODUCT": np.multiply,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}


def values(rank: int, count: int, dtype: str, seed: int = 0) -> Array:
    """Return whole numbers from 1 to 5, other ones on each rank and in each place."""
    places = np.arange(count)
    return ((places * 3 + rank * 7 + places // 5 * rank + seed) % 5 + 1).astype(dtype)


class GroupContract:
    """The tests.  A subclass gives the fixture `group`, and says what its groups can do.

    Attributes:
        dtypes: what the group moves and reduces.
        ops: by which operators.
        counts: of elements.
        lacks: methods of a group that this one does not have.
        mismatch: what calls that differ between ranks raise on every rank; None: it is not seen.
        late: what a call raises on the ranks whose peers don't come; None: it has no deadline.
    """

    dtypes: Sequence[str] = ("float32", "float64", "int32", "int64")
    ops: Sequence[str] = ("SUM", "PRODUCT", "MIN", "MAX")
    counts: Sequence[int] = (1, 3, 5, 1000)
    lacks: Sequence[str] = ()
    mismatch: type[Exception] | None = RuntimeError
    late: type[Exception] | None = RuntimeError

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run a test for each dtype and count that it asks for."""
        for name, all_of in (("dtype", self.dtypes), ("count", self.counts)):
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, all_of)

    @pytest.fixture(autouse=True)
    def _has_it(self, request: pytest.FixtureRequest) -> None:
        tested = request.function.__name__.removeprefix("test_").partition("__")[0]
        if tested in self.lacks:
            pytest.skip(f"it lacks {tested}")

    # ---- what moves ----

    def test_broadcast(self, group: Any, dtype: str, count: int) -> None:
        """Every root's array arrives everywhere."""
        for root in range(group.size()):
            x = values(group.rank(), count, dtype)
            group.broadcast(x, root).wait()
            _same(x, values(root, count, dtype))

    def test_allgather(self, group: Any, dtype: str, count: int) -> None:
        """Arrays of several sizes arrive in rank order."""
        counts = [count + rank for rank in range(group.size())]
        got = [np.zeros(n, dtype) for n in counts]
        group.allgather(got, values(group.rank(), counts[group.rank()], dtype)).wait()
        for rank, x in enumerate(got):
            _same(x, values(rank, counts[rank], dtype))

    def test_all_gather_single(self, group: Any, dtype: str, count: int) -> None:
        """Equal arrays arrive in one; what a rank gives may lie where it is to come."""
        n, me = group.size(), group.rank()
        want = np.concatenate([values(rank, count, dtype) for rank in range(n)])
        got = np.zeros(n * count, dtype)
        group.all_gather_single(got, values(me, count, dtype)).wait()
        _same(got, want)
        got[:] = 0
        mine = got[me * count : (me + 1) * count]
        mine[:] = values(me, count, dtype)
        group.all_gather_single(got, mine).wait()
        _same(got, want)

    def test_gather(self, group: Any, dtype: str, count: int) -> None:
        """Every root gets all arrays, in rank order."""
        n, me = group.size(), group.rank()
        for root in range(n):
            got = [np.zeros(count, dtype) for _ in range(n)] if me == root else []
            group.gather(got, values(me, count, dtype), root).wait()
            for rank, x in enumerate(got):
                _same(x, values(rank, count, dtype))

    def test_scatter(self, group: Any, dtype: str, count: int) -> None:
        """Each rank gets its array of every root's list."""
        n, me = group.size(), group.rank()
        for root in range(n):
            given = [values(root, count, dtype, rank) for rank in range(n)] if me == root else []
            got = np.zeros(count, dtype)
            group.scatter(got, given, root).wait()
            _same(got, values(root, count, dtype, me))

    def test_alltoall(self, group: Any, dtype: str, count: int) -> None:
        """Each pair of ranks exchanges arrays of a size of its own."""
        n, me = group.size(), group.rank()
        given = [values(me, count + me + to, dtype, to) for to in range(n)]
        got = [np.zeros(count + me + of, dtype) for of in range(n)]
        group.alltoall(got, given).wait()
        for rank, x in enumerate(got):
            _same(x, values(rank, count + rank + me, dtype, me))

    def test_all_to_all_single(self, group: Any, dtype: str, count: int) -> None:
        """Equal parts go to the ranks in turn."""
        n, me = group.size(), group.rank()
        given = np.concatenate([values(me, count, dtype, to) for to in range(n)])
        got = np.zeros(n * count, dtype)
        group.all_to_all_single(got, given).wait()
        _same(got, np.concatenate([values(rank, count, dtype, me) for rank in range(n)]))

    def test_send(self, group: Any, dtype: str, count: int) -> None:
        """Messages to the next rank arrive, each by its tag."""
        n, me = group.size(), group.rank()
        first, second = (np.zeros(count, dtype) for _ in range(2))
        works = [group.recv(second, (me - 1) % n, 2), group.recv(first, (me - 1) % n, 1)]
        works += [group.send(values(me, count, dtype, tag), (me + 1) % n, tag) for tag in (1, 2)]
        for work in works:
            work.wait()
        _same(first, values((me - 1) % n, count, dtype, 1))
        _same(second, values((me - 1) % n, count, dtype, 2))

    def test_barrier(self, group: Any) -> None:
        """No rank goes on before the last one has come."""
        for late in range(group.size()):
            group.barrier().wait()
            start = time.monotonic()
            if group.rank() == late:
                time.sleep(0.05)
            group.barrier().wait()
            assert time.monotonic() - start > 0.02, f"it did not wait for rank {late}"

    # ---- what reduces ----

    def test_allreduce(self, group: Any, dtype: str, count: int) -> None:
        """Every rank gets the same, by each operator."""
        for op in self.ops:
            x = values(group.rank(), count, dtype)
            group.allreduce(x, op=getattr(ReduceOp, op)).wait()
            _same(x, self._reduced(group, op, count, dtype))

    def test_reduce(self, group: Any, dtype: str, count: int) -> None:
        """Every root gets the result, and the other ranks' arrays stay as they are."""
        for op in self.ops:
            for root in range(group.size()):
                mine = values(group.rank(), count, dtype)
                x = mine.copy()
                group.reduce(x, root, op=getattr(ReduceOp, op)).wait()
                at_root = group.rank() == root
                _same(x, self._reduced(group, op, count, dtype) if at_root else mine)

    def test_reduce_scatter(self, group: Any, dtype: str, count: int) -> None:
        """Each rank gets a part of a size of its own."""
        n, me = group.size(), group.rank()
        for op in self.ops:
            got = np.zeros(count + me, dtype)
            given = [values(me, count + part, dtype, part) for part in range(n)]
            group.reduce_scatter(got, given, op=getattr(ReduceOp, op)).wait()
            _same(got, self._reduced(group, op, count + me, dtype, me))

    def test_reduce_scatter_single(self, group: Any, dtype: str, count: int) -> None:
        """Each rank gets an equal part."""
        n, me = group.size(), group.rank()
        for op in self.ops:
            got = np.zeros(count, dtype)
            given = np.concatenate([values(me, count, dtype, part) for part in range(n)])
            group.reduce_scatter_single(got, given, op=getattr(ReduceOp, op)).wait()
            _same(got, self._reduced(group, op, count, dtype, me))

    def _reduced(self, group: Any, op: str, count: int, dtype: str, seed: int = 0) -> Array:
        arrays = [values(rank, count, dtype, seed) for rank in range(group.size())]
        return reduce(_NUMPY[op], arrays).astype(dtype)

    # ---- what goes wrong ----

    def test_allreduce__of_different_sizes(self, group: Any) -> None:
        """Calls that differ are an error on all ranks, not a wrong result."""
        if self.mismatch is None or group.size() == 1:
            pytest.skip("nobody is to see it")
        with pytest.raises(self.mismatch):
            group.allreduce(np.ones(3 + group.rank(), self.dtypes[0]), timeout=5).wait()

    def test_allreduce__without_a_rank(self, group: Any) -> None:
        """A call to which a rank does not come ends at its deadline."""
        if self.late is None or group.size() == 1:
            pytest.skip("nobody is late")
        start = time.monotonic()
        if group.rank() == 0:
            time.sleep(0.8)
        with pytest.raises(self.late if group.rank() > 0 else Exception):
            group.allreduce(np.ones(3, self.dtypes[0]), timeout=0.3).wait()
        assert time.monotonic() - start < 5, "it took long after its deadline"


def _same(got: Array, want: Array) -> None:
    __tracebackhide__ = True
    np.testing.assert_array_equal(got, want)
