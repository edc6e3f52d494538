"""The node's shared memory: a file that all ranks of a group have mapped.

Not an MPI window: windows are freed collectively, run out, and die of SIGBUS where /dev/shm is
full.  The file is reserved when it is made and unlinked as soon as all have opened it, so nothing
stays behind, whatever becomes of the processes.

Each rank owns a page of control words and two slots for data:

    page   two records that alternate (arrival.py), a flag, the call that the rank left,
           two payloads that alternate; on rank 0's two outcomes of arrivals across nodes
    slots  `SLOT` bytes each, in turn written by the owner and read by the others

A rank writes only in its own page and slots.  What a flag announces is written before the flag.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from .library import IDLE, MOVED, MPI, Steps, until

Array = np.ndarray[Any, Any]

SLOT = 256 * 1024  # bytes: what stays in the cache between being written and being read
PAYLOAD = 1024  # bytes that ride along with a record
SPINS = 400  # looks at a flag before the engine gets to see to other things
_PAGE = 4096
_STRIDE = _PAGE + 2 * SLOT
_RECORD = 128  # bytes from one record to the other; the flag comes after both
_OUTCOME_AT, _OUTCOME = 512, 256  # what rank 0's page alone holds: two that alternate
_FOLDER = "/dev/shm"


@functools.cache
def _fence() -> Callable[[], None]:
    """Return what keeps the memory accesses before it from being seen after those behind it.

    x86 keeps the order of stores, and that of loads, by itself.  MPI's word for it elsewhere is
    the synchronization of a window; one is enough for all groups.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    return MPI.Win.Create(None, comm=MPI.COMM_SELF).Sync


Shares = Generator[int, None, "NodeMemory | None"]


class NodeMemory:
    """The mapped file of one group, seen from one of its ranks."""

    def __init__(self, file: int, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._map = mmap.mmap(file, size * _STRIDE)
        self.words = memoryview(self._map).cast("q")
        self.bytes = memoryview(self._map)
        # A peer on a core of its own is there in a moment; on ours it needs the core.
        self._spins = range(SPINS if size <= len(os.sched_getaffinity(0)) else 0)
        self.peers = [r for r in range(size) if r != rank]
        whole = np.frombuffer(self._map, dtype=np.uint8)
        self._slots = [
            [whole[self._slot_at(r, side) :][:SLOT] for r in range(size)] for side in (0, 1)
        ]
        self._payloads = [
            [whole[r * _STRIDE + _PAYLOAD_AT + side * PAYLOAD :][:PAYLOAD] for r in range(size)]
            for side in (0, 1)
        ]
        self._left = [(r * _STRIDE + 2 * _RECORD) // 8 + 1 for r in range(size)]
        self._flags = [(r * _STRIDE + 2 * _RECORD) // 8 for r in range(size)]
        self.fence = _fence()

    @staticmethod
    def _slot_at(rank: int, side: int) -> int:
        return rank * _STRIDE + _PAGE + side * SLOT

    @staticmethod
    def record_at(rank: int, seq: int) -> int:
        """Return where a rank's record of call `seq` lies, in bytes."""
        return rank * _STRIDE + (seq & 1) * _RECORD

    @staticmethod
    def outcome_at(seq: int) -> int:
        """Return where rank 0 puts what its node hears of call `seq` from others, in bytes."""
        return _OUTCOME_AT + (seq & 1) * _OUTCOME

    def payloads(self, seq: int) -> list[Array]:
        """Return what rides along with the records of call `seq`, by rank."""
        return self._payloads[seq & 1]

    def slots(self, chunk: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return the slots that hold a chunk, by rank."""
        return [slot.view(dtype) for slot in self._slots[chunk & 1]]

    def leave(self, seq: int) -> None:
        """Mark that this rank takes part in no call from `seq` on."""
        self.words[self._left[self.rank]] = seq

    def has_left(self, rank: int, seq: int) -> bool:
        """Return whether a rank has marked that it takes no part in call `seq`."""
        return 0 < self.words[self._left[rank]] <= seq

    def announce(self, flag: int) -> None:
        """Raise this rank's flag: all that was written before is there for who sees it."""
        self.fence()
        self.words[self._flags[self.rank]] = flag

    def seen(self, rank: int, flag: int) -> Steps:
        """Wait until a rank has raised its flag at least to `flag`."""
        return self.reached(self._flags[rank], flag)

    def reached(self, word: int, value: int) -> Steps:
        """Wait until a control word is at least `value`."""
        words = self.words
        if words[word] < value:
            for _ in self._spins:
                if words[word] >= value:
                    break
            else:
                yield MOVED
                while words[word] < value:
                    yield IDLE
        self.fence()

    def all_seen(self, flag: int) -> Steps:
        """Wait until all others have raised their flags at least to `flag`."""
        for rank in self.peers:
            yield from self.seen(rank, flag)


_PAYLOAD_AT = _PAGE - 2 * PAYLOAD


def share(comm: MPI.Intracomm) -> Shares:
    """Map one file on all ranks of a communicator, or on none.

    None where the ranks don't share memory, or where there is no room for it.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    name = np.zeros(256, dtype=np.uint8)
    file, path, full = -1, "", False
    if rank == 0:
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="mpicoll-", dir=_FOLDER)
            try:
                os.posix_fallocate(file, 0, size * _STRIDE)
            except OSError:
                full = True
            said = path.encode()
            name[: len(said)] = np.frombuffer(said, dtype=np.uint8)
    yield from until(comm.Ibcast([name, MPI.BYTE], 0))
    if rank > 0 and name.any():
        with contextlib.suppress(OSError):
            file = os.open(name.tobytes().rstrip(b"\0"), os.O_RDWR | os.O_CLOEXEC)
    # The inode too: another node may hold a file of that name.
    inode = os.fstat(file).st_ino if file >= 0 else 0
    heard = np.array([inode if file >= 0 and not full else -1, -inode], dtype=np.int64)
    yield from until(comm.Iallreduce(MPI.IN_PLACE, [heard, MPI.INT64_T], MPI.MIN))
    if path:
        os.unlink(path)
    shared = None
    if heard[0] > 0 and heard[0] == -heard[1]:
        shared = NodeMemory(file, rank, size)
    elif full:
        warnings.warn(
            f"{_FOLDER} has no room for {size * _STRIDE >> 20} MiB: this group goes by MPI alone, "
            "which is slower inside a node",
            stacklevel=2,
        )
    if file >= 0:
        os.close(file)
    return shared


def whereabouts() -> int:
    """Return a number that differs between containers which share a host name but no memory."""
    try:
        return os.stat(_FOLDER).st_dev
    except OSError:
        return 0
