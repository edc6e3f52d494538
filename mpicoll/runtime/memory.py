"""The node's shared memory: a file that all ranks of a group have mapped.

Not an MPI window: windows are freed collectively, run out, and die of SIGBUS where /dev/shm is
full.  The file is reserved when it is made and unlinked as soon as all have opened it, so nothing
stays behind, whatever becomes of the processes.

Each rank owns a page of control words and two each of two kinds of room for data:

    page      two records that alternate (arrival.py), a flag, the call that the rank left, the
              last call that it finished, a notice about a call; on rank 0's two outcomes of
              arrivals across nodes
    payloads  one per record, of `payload` bytes: data that are there when the record is
    slots     `SLOT` bytes each, in turn written by the owner and read by the others

A rank writes only in its own page and slots.  What a flag announces is written before the flag.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import platform
import struct
import tempfile
import warnings
from collections.abc import Callable, Generator
from typing import Any

import numpy as np

from . import agreement
from .library import IDLE, MPI, PROGRESSED, Steps
from .settings import has_cores_for

Array = np.ndarray[Any, Any]

SLOT = 256 * 1024  # bytes: what stays in the cache between being written and being read
LARGEST, LEAST = 2**20, 2**13  # bytes of a room for what travels beside a record
_TOGETHER = 2**22  # bytes of all of a group's, but for the least
SPINS = 400  # looks at a flag before the engine gets to see to other things
_PAGE = 4096
_RECORD = 128  # bytes from one record to the other; the flag comes after both
_BODY = struct.Struct("8q")  # a record after its number, and the extent
_OUTCOME_AT, _OUTCOME = 512, 256  # what rank 0's page alone holds: two that alternate
_NOTICE_AT, _NOTICE = 1024, 2048  # its call, its length, and so many bytes
_FOLDER = "/dev/shm"
_NAME = 256  # bytes of the name of a file there, at most
_SEGMENTS = (f"{_FOLDER}/mpich_shm_", f"{_FOLDER}/sm_segment.")  # MPICH's, Open MPI's


@functools.cache
def _fence() -> Callable[[], None]:
    """Return what keeps the memory accesses before it from being seen after those behind it.

    x86 keeps the order of stores, and that of loads, by itself.  Elsewhere MPI does it
    when a window is synchronized; one window is enough for all groups.
    """
    if platform.machine() in ("x86_64", "AMD64"):
        return lambda: None
    return MPI.Win.Create(None, comm=MPI.COMM_SELF).Sync


Shares = Generator[int, None, "NodeMemory | None"]
Maps = Generator[int, None, "mmap.mmap | None"]


class NodeMemory:
    """The mapped file of one group, seen from one of its ranks.

    Args:
        file: given where each rank holds a lock on the byte of its number, which the system takes
            from it when it dies.  It stays open for as long as the memory is in use.
    """

    def __init__(self, room: mmap.mmap, rank: int, size: int, file: int | None = None) -> None:
        self.rank, self.size = rank, size
        self.payload = payload_room(size)
        self._stride = bytes_per_rank(size)
        self._map = room
        self._file = None if file is None else os.fdopen(file, "r+b", buffering=0)
        self.words = memoryview(self._map).cast("q")
        # A peer on a core of its own is there in a moment; one that shares our core needs it first.
        self._spins = range(SPINS if has_cores_for(size) else 0)
        self.peers = [r for r in range(size) if r != rank]
        self._whole = np.frombuffer(self._map, dtype=np.uint8)
        self._views: dict[np.dtype[Any], tuple[list[list[Array]], list[list[Array]]]] = {}
        self._starts = starts = range(0, size * self._stride, self._stride)
        self._flags = [(at + 2 * _RECORD) // 8 for at in starts]
        self._left = [(at + 2 * _RECORD) // 8 + 1 for at in starts]
        self.finished = [(at + 2 * _RECORD) // 8 + 2 for at in starts]  # words
        self.fence = _fence()

    @property
    def mapping(self) -> mmap.mmap:
        """The memory itself."""
        return self._map

    @property
    def crowded(self) -> bool:
        """Whether the ranks share cores, so that a peer may need this rank's."""
        return not self._spins

    @property
    def layout(self) -> tuple[int, ...]:
        """Return where in the mapping things lie, in bytes, as the compiled code wants it."""
        words = 8 * self._flags[0], 8 * self._left[0], 8 * self.finished[0]
        return self.rank, self.size, self._stride, _PAGE, _RECORD, self.payload, SLOT, *words

    def post(self, record: tuple[int, ...], extent: int) -> int:
        """Publish this rank's record of a call, and the extent of its data.

        Returns the largest extent of all ranks if the records of all others are there and the same,
        else -1; it waits for them for a moment only.  A record begins with the number of the call.
        The others look at that, so it is written last.
        """
        seq, body = record[0], _BODY.pack(*record[1:], extent)
        words, whole, stride = self.words, self._map, self._stride
        first = (seq & 1) * _RECORD
        at = self.rank * stride + first
        whole[at + 8 : at + 72] = body
        self.fence()
        words[at >> 3] = seq
        largest = extent
        for rank in self.peers:
            at = rank * stride + first
            word = at >> 3
            if words[word] != seq:
                for _ in self._spins:
                    if words[word] == seq:
                        break
                else:
                    return -1
            self.fence()
            theirs = whole[at + 8 : at + 72]
            if theirs != body:
                if theirs[:-8] != body[:-8]:
                    largest = -1
                elif largest >= 0:
                    largest = max(largest, words[word + 8])
        return largest

    def has_posted(self, rank: int, seq: int) -> bool:
        """Return whether a rank's record of call `seq` is there."""
        return self.words[self._record_at(rank, seq) >> 3] >= seq

    def has_skipped(self, rank: int, seq: int) -> bool:
        """Return whether a rank has gone on to a later call without call `seq`."""
        beyond = self.words[self._record_at(rank, seq + 1) >> 3] > seq
        self.fence()  # a rank writes its record of `seq` first
        return beyond and self.words[self._record_at(rank, seq) >> 3] < seq

    def arrived(self, rank: int, seq: int) -> Steps:
        """Wait until a rank's record of call `seq` is there."""
        return self.reached(self._record_at(rank, seq) >> 3, seq)

    def records(self, seq: int) -> list[list[int]]:
        """Return the records of call `seq`, by rank, each with the extent behind it."""
        starts = [self._record_at(r, seq) >> 3 for r in range(self.size)]
        return [self.words[at : at + 9].tolist() for at in starts]

    def _record_at(self, rank: int, seq: int) -> int:
        return rank * self._stride + (seq & 1) * _RECORD

    def outcome(self, seq: int) -> memoryview:
        """Return the room, after its number, for the outcome of call `seq` that rank 0 gets."""
        return self.words[self._outcome_at(seq) + 1 : self._outcome_at(seq) + _OUTCOME // 8]

    def conclude(self, seq: int) -> None:
        """Mark that the outcome of a call is there."""
        self.fence()
        self.words[self._outcome_at(seq)] = seq

    def concluded(self, seq: int) -> Steps:
        """Wait until the outcome of a call is there."""
        return self.reached(self._outcome_at(seq), seq)

    @staticmethod
    def _outcome_at(seq: int) -> int:
        return (_OUTCOME_AT + (seq & 1) * _OUTCOME) // 8

    def payloads(self, seq: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return what travels beside the records of call `seq`, by rank."""
        return (self._views.get(dtype) or self._view(dtype))[0][seq & 1]

    def slots(self, chunk: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return the slots that hold a chunk, by rank."""
        return (self._views.get(dtype) or self._view(dtype))[1][chunk & 1]

    def _view(self, dtype: np.dtype[Any]) -> tuple[list[list[Array]], list[list[Array]]]:
        # Kept, because slicing and viewing all of them takes longer than a small call.
        def rooms(first: int, room: int) -> list[list[Array]]:
            length = room - room % dtype.itemsize
            return [
                [self._whole[start + at :][:length].view(dtype) for start in self._starts]
                for at in (first, first + room)
            ]

        views = rooms(_PAGE, self.payload), rooms(_PAGE + 2 * self.payload, SLOT)
        self._views[dtype] = views
        return views

    def close(self, *, together: bool) -> None:
        """Let go of the mapping and of the file, which no step uses any more.

        Args:
            together: all ranks do so.  Otherwise a lock is kept, or this rank would seem to have
                died.
        """
        if self.locked and not together:
            return
        self._views.clear()
        del self.words, self._whole, self._map
        if self._file is not None:
            self._file.close()

    @property
    def locked(self) -> bool:
        """Whether each rank holds a lock for as long as it lives."""
        return self._file is not None

    def has_died(self, rank: int) -> bool:
        """Return whether a rank's lock was taken from it."""
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False  # the rank holds it, or another one is looking just now
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def leave(self, seq: int) -> None:
        """Mark that this rank takes part in no call from `seq` on."""
        self.words[self._left[self.rank]] = seq

    def has_left(self, rank: int, seq: int) -> bool:
        """Return whether a rank has marked that it takes no part in call `seq`."""
        return 0 < self.words[self._left[rank]] <= seq

    def any_left(self, seq: int) -> bool:
        """Return whether any rank has marked that it takes no part in call `seq`."""
        words = self.words
        return any([0 < words[word] <= seq for word in self._left])  # noqa: C419  (a list is faster)

    def post_notice(self, seq: int, text: bytes) -> bool:
        """Leave a notice about a call; return whether there was room for it."""
        if len(text) > _NOTICE:
            return False
        at = self.rank * self._stride + _NOTICE_AT
        words = self.words
        words[at >> 3] = 0
        self.fence()
        self._map[at + 16 : at + 16 + len(text)] = text
        words[(at >> 3) + 1] = len(text)
        self.fence()
        words[at >> 3] = seq
        return True

    def notice(self, rank: int, seq: int) -> bytes:
        """Return a rank's notice about a call; nothing if there is none."""
        at = rank * self._stride + _NOTICE_AT
        if self.words[at >> 3] != seq:
            return b""
        self.fence()
        text = self._map[at + 16 : at + 16 + self.words[(at >> 3) + 1]]
        self.fence()
        return text if self.words[at >> 3] == seq else b""

    def announce(self, flag: int) -> None:
        """Raise this rank's flag: whoever sees it sees what was written before."""
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
                yield PROGRESSED
                while words[word] < value:
                    yield IDLE
        self.fence()

    def all_seen(self, flag: int) -> Steps:
        """Wait until all others have raised their flags at least to `flag`."""
        for rank in self.peers:
            yield from self.seen(rank, flag)


def share(comm: MPI.Intracomm, *, locked: bool = False) -> Shares:
    """Share memory between all ranks of a communicator; None, with a warning, where it can't be.

    With `locked`, each rank holds a lock, which the system takes from it when it dies.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    room, file = yield from _map(comm, size * bytes_per_rank(size), rank if locked else None)
    return None if room is None else NodeMemory(room, rank, size, file)


def map_file(comm: MPI.Intracomm, nbytes: int) -> Maps:
    """Map one file on all ranks of a communicator, or on none.

    None where the ranks don't share memory, or where there is no room for it.
    """
    room, _ = yield from _map(comm, nbytes, None)
    return room


def _map(
    comm: MPI.Intracomm, nbytes: int, lock: int | None
) -> Generator[int, None, tuple[mmap.mmap | None, int | None]]:
    """Map a file; with `lock`, hold a lock on that byte, and return the open file, too."""
    rank = comm.Get_rank()
    file, path, full = -1, "", False
    if rank == 0:
        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="mpicoll-", dir=_FOLDER)
            try:
                os.posix_fallocate(file, 0, nbytes)
            except OSError:
                full = True
    name = (yield from agreement.bytes_of(comm, path.encode(), _NAME)).rstrip(b"\0")
    if rank > 0 and name:
        with contextlib.suppress(OSError):
            file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    if file >= 0 and lock is not None:
        fcntl.lockf(file, fcntl.LOCK_EX, 1, lock)
    # The inode too: another node may hold a file of that name.
    inode = os.fstat(file).st_ino if file >= 0 else 0
    mine = inode if file >= 0 and not full else -1, -inode
    lowest, minus_highest = (yield from agreement.reduced(comm, mine, MPI.MIN)).tolist()
    if path:
        with contextlib.suppress(FileNotFoundError):  # someone else tidied up: all have opened it
            os.unlink(path)
    room = None
    if lowest > 0 and lowest == -minus_highest:
        room = mmap.mmap(file, nbytes)
    elif full:
        warnings.warn(
            f"{_FOLDER} has no room for {nbytes / 2**20:.1f} MiB: these ranks go without shared "
            "memory, which is slower inside a node",
            stacklevel=2,
        )
    if room is not None and lock is not None:
        return room, file
    if file >= 0:
        os.close(file)
    return room, None


def unlink_segments() -> None:
    """Remove the MPI library's files in shared memory that this process has mapped.

    When a job is aborted, the library leaves them behind.  Only this job's ranks have mapped them.
    """
    with contextlib.suppress(OSError), open("/proc/self/maps") as maps:
        for path in {line.split(maxsplit=5)[-1].rstrip("\n") for line in maps}:
            if path.startswith(_SEGMENTS) and not path.endswith(" (deleted)"):
                with contextlib.suppress(OSError):
                    os.unlink(path)


def payload_room(size: int) -> int:
    """Return how many bytes may travel beside a record, where so many ranks share the memory.

    Each rank reads what all the others give: the more there are, the less may it be.
    """
    return max(min(LARGEST, _TOGETHER // (2 * size) // _PAGE * _PAGE), LEAST)


def bytes_per_rank(size: int) -> int:
    """Return how much of /dev/shm a group takes for each rank of a node that has so many."""
    return _PAGE + 2 * payload_room(size) + 2 * SLOT


def whereabouts() -> int:
    """Return a number that differs between containers which share a host name but no memory."""
    try:
        return os.stat(_FOLDER).st_dev
    except OSError:
        return 0
