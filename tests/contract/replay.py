"""The calls that mpicoll makes of NCCL, noted and carried out later by mpi4py, on host memory.

What is queued runs in order, while somebody asks whether a mark has been passed, and not at all
while the gate is shut.  The first call of its kind and size is in the queue only after some looks
whether it is settled, and until then the communicator may be asked for nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Hashable, Iterable, Sequence
from functools import reduce
from typing import Any

import ml_dtypes
import numpy as np
from mpi4py import MPI

from tests.contract.arrays import HALF, Array
from tests.contract.staging import LOOKS, LateCopies, at

QUEUE = 99
NUMPY_TYPES = [*map(np.dtype, "bBiIqQefd"), np.dtype(ml_dtypes.bfloat16)]  # by NCCL's numbers
UFUNCS: tuple[Any, ...] = (np.add, np.multiply, np.maximum, np.minimum, np.add)  # likewise
AVG = 4

Requests = list[MPI.Request]


class Step:
    """One thing in the queue: `start` posts requests; when they are complete comes `finish`."""

    def __init__(self, start: Callable[[], tuple[Requests, Callable[[], None]]]) -> None:
        self.start, self.looks = start, 0
        self.posted: tuple[Requests, Callable[[], None]] | None = None

    def done(self) -> bool:
        self.looks += 1
        if self.looks < LOOKS:
            return False
        if self.posted is None:
            self.posted = self.start()
        if not MPI.Request.Testall(self.posted[0]):
            return False
        self.posted[1]()
        return True


class Queue(LateCopies):
    """Keeps `mpicoll.transports.cuda.nccl.Queue`; a mark: how many steps were queued before it."""

    queue = QUEUE

    def __init__(self, comm: MPI.Intracomm) -> None:
        super().__init__()
        self.comm = comm
        self.pending: list[Step] = []
        self.given = self.passed = 0
        self.held = self.needed = 0
        self.open = True
        self.asked: set[Any] = set()  # marks that were asked for

    def add(self, start: Callable[[], tuple[Requests, Callable[[], None]]]) -> None:
        self.pending.append(Step(start))
        self.given += 1

    def mark(self, stream: int) -> Any:
        assert self.active_now
        self.log.append(("mark", stream))
        return self.given if stream == QUEUE else ("user", self.held)

    def after(self, mark: Any) -> None:
        super().after(mark)
        self.needed = max(self.needed, mark[1])

    def queue_after(self, mark: Any) -> None:
        assert self.active_now
        self.log.append(("queue_after", mark))

    def is_done(self, mark: Any) -> bool:
        self.asked.add(mark)
        while self.open and self.pending and self.pending[0].done():
            self.pending.pop(0)
            self.passed += 1
        return self.passed >= mark

    def hold(self, mark: Any, streams: Iterable[int]) -> None:
        self.log.append(("hold", mark, tuple(streams)))
        self.held = max(self.held, mark)

    def _start(self, way: str, into: Array, source: Array) -> Callable[[], bool]:
        needed, done = self.needed, super()._start(way, into, source)
        return lambda: self.passed >= needed and done()

    def settle(self) -> None:
        """Wait for what the user's stream has been told to wait for."""
        limit = time.monotonic() + 20
        while self.passed < self.held:
            assert time.monotonic() < limit
            time.sleep(1e-4)


Call = Callable[[], tuple[Requests, Callable[[], None]]]
_OPS = 1000  # the number of the first operator that is made


class Communicator:
    """Keeps `mpicoll.transports.cuda.nccl.Nccl`.

    Attributes:
        quiet: what `is_quiet` says.
        opened: while False, what was asked of it does not settle, as where a peer never connects.
    """

    def __init__(self, queue: Queue) -> None:
        self.q, self.comm, self.log = queue, queue.comm, queue.log
        self.error: Exception | None = None
        self.opened = self.quiet = True
        self.aborted = False
        self.calls: list[Call] = []  # that have not settled
        self.looks = 0
        self.warm: set[Hashable] = set()
        self.like: Hashable = None
        self.factors: dict[int, float] = {}
        self.made = _OPS

    def settled(self) -> bool:
        if self.error is not None:
            raise self.error
        if self.aborted:
            raise RuntimeError("aborted")
        if not self.calls:
            return True
        self.looks += 1
        if self.looks < LOOKS or not self.opened:
            return False
        self.warm.add(self.like)
        self.looks = 0
        self._add_all()
        return True

    def is_quiet(self) -> bool:
        return self.quiet

    def knows(self, like: Hashable) -> bool:
        return like in self.warm

    def perform(self, operations: Sequence[Callable[[], None]], like: Hashable) -> bool:
        assert not self.calls, "asked before it had settled"
        for operation in operations:
            operation()
        if len(operations) > 1:
            self.log.append(("group", len(operations)))
        self.like = like
        if not self.calls or like not in self.warm:
            return not self.calls
        self._add_all()
        return True

    def _add_all(self) -> None:
        calls, self.calls = self.calls, []

        def start() -> tuple[Requests, Callable[[], None]]:
            posted = [call() for call in calls]
            requests = [request for some, _ in posted for request in some]
            return requests, lambda: [finish() for _, finish in posted] and None

        self.q.add(start)

    def _add(self, call: Call) -> None:
        self.calls.append(call)

    def _note(self, name: str, stream: int, *what: object) -> None:
        assert stream == QUEUE and self.q.active_now
        self.log.append((name, *what))

    def premul_sum(self, kind: int, factor: float) -> int:
        self.made += 1
        self.factors[self.made] = factor
        return self.made

    def drop(self, op: int) -> None:
        del self.factors[op]

    def _reduced(self, src: int, n: int, kind: int, op: int, give: Callable[[Array], None]) -> None:
        dtype, factor = NUMPY_TYPES[kind], self.factors.get(op)
        op = 0 if factor is not None else op

        def start() -> tuple[Requests, Callable[[], None]]:
            mine = at(src, n * dtype.itemsize).copy()
            if factor is not None:
                mine.view(dtype)[:] *= factor
            every = np.empty((self.comm.size, mine.size), np.uint8)

            def finish() -> None:
                wide = np.dtype("f") if dtype in HALF else dtype
                with np.errstate(all="ignore"):
                    total = reduce(UFUNCS[op], [row.view(dtype).astype(wide) for row in every])
                    if op == AVG:
                        total = total / wide.type(self.comm.size)
                    give(total.astype(dtype))

            return [self.comm.Iallgather(mine, every)], finish

        self._add(start)

    def all_reduce(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None:
        self._note("all_reduce", stream, n, kind, op)
        self._reduced(src, n, kind, op, lambda total: _put(dst, total))

    def reduce(self, src: int, dst: int, n: int, kind: int, op: int, root: int, stream: int):
        self._note("reduce", stream, n, kind, op, root)
        own = self.comm.rank == root
        self._reduced(src, n, kind, op, lambda total: _put(dst, total) if own else None)

    def reduce_scatter(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None:
        self._note("reduce_scatter", stream, n, kind, op)
        part = slice(self.comm.rank * n, (self.comm.rank + 1) * n)
        self._reduced(src, n * self.comm.size, kind, op, lambda total: _put(dst, total[part]))

    def broadcast(self, src: int, dst: int, n: int, kind: int, root: int, stream: int) -> None:
        self._note("broadcast", stream, n, kind, root)

        def start() -> tuple[Requests, Callable[[], None]]:
            room = np.empty(n * NUMPY_TYPES[kind].itemsize, np.uint8)
            if self.comm.rank == root:
                room[...] = at(src, room.size)
            return [self.comm.Ibcast(room, root)], lambda: _put(dst, room)

        self._add(start)

    def all_gather(self, src: int, dst: int, n: int, kind: int, stream: int) -> None:
        self._note("all_gather", stream, n, kind)

        def start() -> tuple[Requests, Callable[[], None]]:
            mine = at(src, n * NUMPY_TYPES[kind].itemsize).copy()
            every = np.empty(mine.size * self.comm.size, np.uint8)
            return [self.comm.Iallgather(mine, every)], lambda: _put(dst, every)

        self._add(start)

    def send(self, src: int, n: int, kind: int, peer: int, stream: int) -> None:
        self._note("send", stream, n, kind, peer)

        def start() -> tuple[Requests, Callable[[], None]]:
            mine = at(src, n * NUMPY_TYPES[kind].itemsize).copy()
            request = self.comm.Isend(mine, peer)
            return [request], lambda: mine.fill(0)  # it lived so long

        self._add(start)

    def recv(self, dst: int, n: int, kind: int, peer: int, stream: int) -> None:
        self._note("recv", stream, n, kind, peer)

        def start() -> tuple[Requests, Callable[[], None]]:
            room = np.empty(n * NUMPY_TYPES[kind].itemsize, np.uint8)
            return [self.comm.Irecv(room, peer)], lambda: _put(dst, room)

        self._add(start)

    def split(self, color: int, key: int) -> Communicator:
        assert self.q.passed == self.q.given
        self.log.append(("split", color, key))
        if self.error is not None:
            raise self.error
        made = self.comm.Split(MPI.UNDEFINED if color < 0 else color, key)
        return Communicator(Queue(made))

    def close(self) -> Generator[int, None, None]:
        self.log.append(("close",))
        yield 0

    def abort(self) -> None:
        self.aborted = True
        self.log.append(("abort",))


def _put(address: int, values: Array) -> None:
    at(address, values.nbytes)[...] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
