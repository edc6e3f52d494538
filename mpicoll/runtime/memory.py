"""The node's shared memory: a file that all ranks of a group have mapped.

Not an MPI window: windows are freed collectively, run out, and die of SIGBUS where /dev/shm is
full.  The file is reserved when it is made and unlinked as soon as all have opened it, so nothing
stays behind, whatever becomes of the processes.

Each rank owns

    lines     two that alternate, which all others look at in each call: its number, a digest of
              its record, the extent of the data, the call that the rank left, and up to `IN_LINE`
              bytes of data; and one for each of two flags
    page      the two records themselves (arrival.py), the last call that it finished, a notice
              about a call; on rank 0's two outcomes of arrivals across nodes
    rooms     one per record, of `payload` bytes: data that are there when the record is
    slots     `SLOT` bytes each, in turn written by the owner and read by the others; in a file of
              their own, made when they are first needed

A rank writes only in what it owns, and reserves it, so that it lies near its own cores.  What a
line or a flag announces is written before its number.  All lines are next to each other: of many
ranks what is looked at most is one cache line of each.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import operator
import os
import platform
import struct
import warnings
from collections.abc import Callable, Generator, Sequence
from itertools import repeat
from typing import Any

import numpy as np

from . import agreement
from .library import IDLE, MPI, PROGRESSED, Steps
from .process import process
from .settings import has_cores_for

Array = np.ndarray[Any, Any]

SLOT = 256 * 1024  # bytes: what stays in the cache between being written and being read
LARGEST, LEAST = 2**20, 2**13  # bytes of a room for what travels beside a record
READ = 2**20  # bytes of such that a rank reads of all others, at most, but for the least
IN_LINE = 32  # bytes that a line has for data
FEW = 24  # ranks up to which it is faster to look at each than at an array of all
SPINS = 400  # looks at a flag before the engine gets to see to other things
_PAGE = 4096
_LINE = 64  # bytes of a cache line
_BLOCK = 4 * _LINE  # a rank's lines, and those of its flags
_DIGEST, _EXTENT, _LEFT, _DATA = range(1, 5)  # the words of a line after its number
_BETWEEN = 128  # bytes from one record to the other
_FINISHED = 2 * _BETWEEN  # where in a page the last call that was finished is
_RECORD = struct.Struct("9q")  # a record and the extent
# A record's digest is the sum of its fields after the number, each times one of these: the first
# numbers of SplitMix64, made odd.  No small multiples of them add up to 0, as fields are small.
MIX = (
    0xE220A8397B1DCDAF,
    0x6E789E6AA1B965F5,
    0x06C45D188009454F,
    0xF88BB8A8724C81ED,
    0x1B39896A51A8749B,
    0x53CB9F0C747EA2EB,
    0x2C829ABE1F4532E1,
)
_OUTCOME_AT, _OUTCOME = 512, 256  # what rank 0's page alone holds: two that alternate
_NOTICE_AT, _NOTICE = 1024, 2048  # its call, its length, and so many bytes
_NO_FILE, _FULL = -1, -2  # instead of the number of a file
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
        self._stride = _per_rank(size)
        self._map = room
        self.slots_mapping: mmap.mmap | None = None
        self._file = None if file is None else os.fdopen(file, "r+b", buffering=0)
        self.words = memoryview(self._map).cast("q")
        # A peer on a core of its own is there in a moment; one that shares our core needs it first.
        self._spins = range(SPINS if has_cores_for(size) and not process().is_thread else 0)
        self.peers = [r for r in range(size) if r != rank]
        self._whole = np.frombuffer(self._map, dtype=np.uint8)
        self._views: dict[tuple[str, np.dtype[Any]], list[list[Array]]] = {}
        self._pages = [_head(size) + r * self._stride for r in range(size)]
        blocks = self._whole[: size * _BLOCK].view(np.int64).reshape(size, _BLOCK // 8)
        self._lines = [  # by parity, where the ranks' are, in words; and the same as arrays
            [(r * _BLOCK + k * _LINE) // 8 for r in range(size)] for k in (0, 1)
        ]
        self._others = [[lines[r] for r in self.peers] for lines in self._lines]
        self._columns = [blocks[:, k * _LINE // 8 :][:, :_DATA].T for k in (0, 1)]
        self._flags = [(r * _BLOCK + 2 * _LINE) // 8 for r in range(size)]
        self.finished = [(at + _FINISHED) // 8 for at in self._pages]  # words
        self._said: tuple[int, ...] = ()  # what this rank's last record said, and its digest
        self._digest = 0
        self.fence = _fence()

    @property
    def mapping(self) -> mmap.mmap:
        """The memory itself, without the slots."""
        return self._map

    @property
    def crowded(self) -> bool:
        """Whether the ranks share cores, so that a peer may need this rank's."""
        return not self._spins

    @property
    def layout(self) -> tuple[int, ...]:
        """Return where things lie, in bytes, as the compiled code wants it."""
        lines = _BLOCK, _head(self.size)
        pages = self._stride, _PAGE, _BETWEEN, _FINISHED, self.payload
        return self.rank, self.size, *lines, *pages, SLOT

    def post(self, record: tuple[int, ...], extent: int) -> int:
        """Publish this rank's record of a call, and the extent of its data.

        Returns the largest extent of all ranks if the records of all others are there and the same,
        else -1; it waits for them for a moment only.  A record begins with the number of the call.
        The others look at that, so it is written last.
        """
        seq, said, words = record[0], record[1:], self.words
        if said != self._said:
            self._said, self._digest = said, digest_of(said)
        odd, digest = seq & 1, self._digest
        at = self._pages[self.rank] + odd * _BETWEEN
        # Not by `pack_into`, which writes zeros first: others may read what was posted before.
        self._map[at : at + _RECORD.size] = _RECORD.pack(*record, extent)
        line = self._lines[odd][self.rank]
        words[line + _DIGEST], words[line + _EXTENT] = digest, extent
        self.fence()
        words[line] = seq
        if self.size > FEW:
            late = any(map(self._is_late, self.missing(seq), repeat(seq)))
            return -1 if late else self.agreed(seq)
        largest = extent
        for line in self._others[odd]:  # the same without a step too many
            if words[line] != seq:
                for _ in self._spins:
                    if words[line] == seq:
                        break
                else:
                    return -1
            self.fence()
            if words[line + _DIGEST] != digest:
                return -1
            if words[line + _EXTENT] > largest:
                largest = words[line + _EXTENT]
        return largest

    def _is_late(self, rank: int, seq: int) -> bool:
        """Wait a moment for a rank's record; return whether it is not there."""
        words, line = self.words, self._lines[seq & 1][rank]
        return not any(words[line] == seq for _ in self._spins)

    def missing(self, seq: int) -> list[int]:
        """Return the ranks whose records of call `seq` are not there."""
        odd = seq & 1
        if self.size > FEW:
            found: list[int] = np.flatnonzero(self._columns[odd][0] != seq).tolist()
            return found
        words = self.words
        return [r for r, line in enumerate(self._lines[odd]) if words[line] != seq]

    def agreed(self, seq: int) -> int:
        """Return the largest extent if all say of call `seq` what this rank does, else -1."""
        self.fence()
        odd, digest = seq & 1, self._digest
        if self.size > FEW:
            numbers, digests, extents, _ = self._columns[odd]
            same = (digests == digest).all() and (numbers == seq).all()
            return int(extents.max()) if same else -1
        words, largest = self.words, 0
        for line in self._lines[odd]:
            if words[line + _DIGEST] != digest or words[line] != seq:
                return -1
            largest = max(largest, words[line + _EXTENT])
        return largest

    def has_posted(self, rank: int, seq: int) -> bool:
        """Return whether a rank's record of call `seq` is there."""
        return self.words[self._lines[seq & 1][rank]] >= seq

    def has_skipped(self, rank: int, seq: int) -> bool:
        """Return whether a rank has gone on to a later call without call `seq`."""
        beyond = self.words[self._lines[(seq + 1) & 1][rank]] > seq
        self.fence()  # a rank writes its record of `seq` first
        return beyond and not self.has_posted(rank, seq)

    def arrived(self, rank: int, seq: int) -> Steps:
        """Wait until a rank's record of call `seq` is there."""
        return self.reached(self._lines[seq & 1][rank], seq)

    def records(self, seq: int) -> list[list[int]]:
        """Return the records of call `seq`, by rank, each with the extent behind it."""
        starts = [(at + (seq & 1) * _BETWEEN) >> 3 for at in self._pages]
        return [self.words[at : at + 9].tolist() for at in starts]

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

    def _outcome_at(self, seq: int) -> int:
        return (self._pages[0] + _OUTCOME_AT + (seq & 1) * _OUTCOME) // 8

    def payloads(self, seq: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return what travels beside the records of call `seq`, by rank."""
        return (self._views.get(("rooms", dtype)) or self._view("rooms", dtype))[seq & 1]

    def in_lines(self, seq: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return what travels in the lines of call `seq`, by rank: `IN_LINE` bytes at most."""
        return (self._views.get(("lines", dtype)) or self._view("lines", dtype))[seq & 1]

    def slots(self, chunk: int, dtype: np.dtype[Any]) -> list[Array]:
        """Return the slots that hold a chunk, by rank."""
        return (self._views.get(("slots", dtype)) or self._view("slots", dtype))[chunk & 1]

    def _view(self, kind: str, dtype: np.dtype[Any]) -> list[list[Array]]:
        # Kept, because slicing and viewing all of them takes longer than a small call.
        whole, starts, between = self._whole, self._pages, self.payload
        first, room = _PAGE, self.payload
        if kind == "lines":
            starts, between = list(range(0, self.size * _BLOCK, _BLOCK)), _LINE
            first, room = 8 * _DATA, IN_LINE
        elif kind == "slots":
            assert self.slots_mapping is not None
            whole = np.frombuffer(self.slots_mapping, dtype=np.uint8)
            starts, between = list(range(0, slots_of(self.size), 2 * SLOT)), SLOT
            first, room = 0, SLOT
        length = room - room % dtype.itemsize
        views = [
            [whole[start + first + i * between :][:length].view(dtype) for start in starts]
            for i in (0, 1)
        ]
        self._views[kind, dtype] = views
        return views

    def add_slots(self, comm: MPI.Intracomm) -> Generator[int, None, bool]:
        """Make the slots, with all other ranks; return whether there is room for them."""
        self.slots_mapping = yield from map_file(comm, slots_of(self.size))
        return self.slots_mapping is not None

    def close(self, *, together: bool) -> None:
        """Let go of the mapping and of the file, which no step uses any more.

        Args:
            together: all ranks do so.  Otherwise a lock is kept, or this rank would seem to have
                died.
        """
        if self.locked and not together:
            return
        self._views.clear()
        del self.words, self._whole, self._map, self._columns, self.slots_mapping
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
        for lines in self._lines:
            self.words[lines[self.rank] + _LEFT] = seq

    def has_left(self, rank: int, seq: int) -> bool:
        """Return whether a rank has marked that it takes no part in call `seq`."""
        return 0 < self.words[self._lines[seq & 1][rank] + _LEFT] <= seq

    def leavers(self, seq: int) -> list[int]:
        """Return the other ranks that have marked that they take no part in call `seq`."""
        words, odd = self.words, seq & 1
        if self.size > FEW and not self._columns[odd][_LEFT].any():
            return []
        lines = self._lines[odd]
        return [r for r in self.peers if 0 < words[lines[r] + _LEFT] <= seq]

    def post_notice(self, seq: int, text: bytes) -> bool:
        """Leave a notice about a call; return whether there was room for it."""
        if len(text) > _NOTICE:
            return False
        at = self._pages[self.rank] + _NOTICE_AT
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
        at = self._pages[rank] + _NOTICE_AT
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
    room, file = yield from _map(comm, bytes_of(size), rank if locked else None)
    return None if room is None else NodeMemory(room, rank, size, file)


def alone() -> NodeMemory:
    """Return the memory of a group of one rank, which shares it with nobody."""
    return NodeMemory(mmap.mmap(-1, bytes_of(1)), 0, 1)


def map_file(comm: MPI.Intracomm, nbytes: int) -> Maps:
    """Map one file on all ranks of a communicator, or on none.

    None where the ranks don't share memory, or where there is no room for it.
    """
    room, _ = yield from _map(comm, nbytes, None)
    return room


def _map(
    comm: MPI.Intracomm, nbytes: int, lock: int | None
) -> Generator[int, None, tuple[mmap.mmap | None, int | None]]:
    """Map a file; with `lock`, hold a lock on that byte, and return the open file, too.

    Each rank reserves its share: the last of so many equal ones, the first rank what is before.
    """
    rank, size = comm.Get_rank(), comm.Get_size()
    file, path = -1, ""
    if rank == 0:
        import tempfile

        with contextlib.suppress(OSError):
            file, path = tempfile.mkstemp(prefix="mpicoll-", dir=_FOLDER)
    try:
        name = (yield from agreement.bytes_of(comm, path.encode(), _NAME)).rstrip(b"\0")
        if rank > 0 and name:
            with contextlib.suppress(OSError):
                file = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        if file >= 0 and lock is not None:
            fcntl.lockf(file, fcntl.LOCK_EX, 1, lock)
        # The inode: another node may hold a file of that name.
        found = os.fstat(file).st_ino if file >= 0 else _NO_FILE
        share = nbytes // size // _PAGE * _PAGE
        end = nbytes - (size - 1 - rank) * share
        start = end - share if rank else 0
        try:
            if file >= 0 and end > start:
                os.posix_fallocate(file, start, end - start)
        except OSError:
            found = _FULL
        mine = found, -os.fstat(file).st_ino if file >= 0 else 0
        lowest, minus_highest = (yield from agreement.reduced(comm, mine, MPI.MIN)).tolist()
    except BaseException:
        if file >= 0:
            os.close(file)
        raise
    finally:
        if path:  # all have opened it, or nobody will any more
            with contextlib.suppress(FileNotFoundError):  # someone else tidied up
                os.unlink(path)
    room = None
    if lowest > 0 and lowest == -minus_highest:
        room = mmap.mmap(file, nbytes)
    elif lowest == _FULL and rank == 0:
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
    return LARGEST if size <= 2 else max(READ // size // _PAGE * _PAGE, LEAST)


def digest_of(said: Sequence[int]) -> int:
    """Return the digest of a record's fields after the number."""
    mixed: int = sum(map(operator.mul, said, MIX))
    return (mixed + 2**63) % 2**64 - 2**63


def _head(size: int) -> int:
    """Return the bytes of all ranks' lines, in whole pages."""
    return -(-size * _BLOCK // _PAGE) * _PAGE


def _per_rank(size: int) -> int:
    """Return the bytes of a rank's page and rooms, where so many share the memory of a node."""
    return _PAGE + 2 * payload_room(size)


def bytes_of(size: int) -> int:
    """Return how much of /dev/shm a group takes on a node that has so many of its ranks.

    The slots come on top of it, once there are data for them.
    """
    return _head(size) + size * _per_rank(size)


def slots_of(size: int) -> int:
    """Return how much the slots of so many ranks take."""
    return 2 * SLOT * size


def whereabouts() -> int:
    """Return a number that differs between containers which share a host name but no memory."""
    try:
        return os.stat(_FOLDER).st_dev
    except OSError:
        return 0
