# What only moves, through the slots of a node, a part of _native.pyx.
#
# Each rank's two slots are one ring of places.  In round c a rank writes a piece of what it gives into
# place c, and raises its flag; and it reads the pieces of round c from the places of those that give it
# something, and raises its second flag.  A place is written again when all that read it have done so.
# Pieces are small, so they stay in the caches between the cores, and writing, reading and waiting overlap.
# What a rank keeps of its own it copies piece by piece, too: the piece it has just written is in its cache,
# and while nothing has come it need not wait.
#
# Where all ranks are as busy as each other, what is large takes one copy instead: each rank shows where
# its blocks lie, reads what it gets from the others' memory, if the system permits that, and stays until
# all have read.  Where one rank gives or takes it all the others have their hands free, and two copies,
# made by two ranks at a time, are as fast.
#
# Only this code goes so: where a rank of the group is not compiled, none of them does.

cdef enum:
    PLACE = 32768  # bytes of a place, where there are few ranks
    LEAST = 8192  # bytes of a piece, where what is given has a block for each rank
    LARGE = 1 << 20  # bytes of a move above which both are twice as large: fewer turns of flags
    ONE_COPY = 4 << 20  # bytes of a move above which it takes one copy, if it is for that
    PULLED = 1 << 22  # bytes of such a copy at a time
    STREAMED = 12 << 20  # bytes of a move above which what comes is written past the caches
    TURN_BYTES = 1 << 23  # bytes after which others have their turn
    ROUNDS = 24  # bits of a flag that count rounds
    ENDED = (1 << ROUNDS) - 1  # the last round of all primitives


cdef struct Block:
    char *data
    Py_ssize_t nbytes


@cython.final
cdef class Moves(Node):
    """What carries out one move after the other, as far as the peers have come."""

    cdef Block *_gives  # one, or one for each rank
    cdef Block *_takes  # one from each rank
    cdef char *_readers  # whether a rank reads what this one gives
    cdef object _arrays  # which are kept until it is over
    cdef int64_t _number
    cdef int64_t *_processes  # the system's numbers of all ranks; NULL: their memory can't be read
    cdef int _error  # of the system, in reading it
    cdef bint _parted, _left, _streams, _pulls
    cdef Py_ssize_t _pulled, _at_source  # bytes: in all, and of the block that is being read
    cdef Py_ssize_t _place, _depth, _room, _written, _writes, _read, _reads, _kept, _keeps
    cdef int _next  # of the ranks that are read from in this round, the next

    def __init__(self, memory, layout, crowded, slot_memory, *, processes):
        """`processes`: the ranks', if they may read one another's memory; else None."""
        cdef int rank
        self._gives = <Block *>calloc(self._size, sizeof(Block))
        self._takes = <Block *>calloc(self._size, sizeof(Block))
        self._readers = <char *>calloc(self._size, 1)
        if self._gives is NULL or self._takes is NULL or self._readers is NULL:
            raise MemoryError()
        if processes is not None:
            self._processes = <int64_t *>calloc(self._size, sizeof(int64_t))
            if self._processes is NULL:
                raise MemoryError()
            for rank in range(self._size):
                self._processes[rank] = processes[rank]

    def __dealloc__(self):
        free(self._processes)
        free(self._gives)
        free(self._takes)
        free(self._readers)

    def begin(self, int64_t flag, list gives, list takes, bint parted, int only, bint even, Py_ssize_t nbytes):
        """Note what this rank gives and takes.

        Args:
            flag: of the primitive, without rounds.
            gives: arrays of bytes: none, one for all, or (`parted`) one for each rank.
            takes: one for each rank; None: nothing comes from there.  What a rank gives itself
                comes to it as well, unless it is there already.
            only: the rank that gets it all, or -1: all do.
            even: all ranks have about as much to do.
            nbytes: of the call's largest array, alike on all ranks.
        """
        cdef int rank
        cdef cnp.ndarray array
        self._arrays = [gives, takes]
        for rank in range(self._size):
            if len(gives):
                array = gives[rank if parted else 0]
                self._give(rank, <char *>cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))
            if takes[rank] is not None:
                array = takes[rank]
                self._get(rank, <char *>cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))
        self._prepare(flag, parted, only, even, nbytes)

    def goes_on(self):
        """Return whether the core has left a move under way: it is not to be begun once more."""
        cdef bint left = self._left
        self._left = False
        return left

    cdef void _clear(self) noexcept nogil:
        """Forget what was noted: the next move notes what it has, and nothing else."""
        cdef int rank
        for rank in range(self._size):
            self._gives[rank].nbytes = self._takes[rank].nbytes = 0

    cdef inline void _give(self, int rank, char *data, Py_ssize_t nbytes) noexcept:
        self._gives[rank].data, self._gives[rank].nbytes = data, nbytes

    cdef inline void _get(self, int rank, char *data, Py_ssize_t nbytes) noexcept:
        self._takes[rank].data, self._takes[rank].nbytes = data, nbytes

    cdef void _prepare(self, int64_t flag, bint parted, int only, bint even, Py_ssize_t nbytes) noexcept:
        """Make ready to move what was noted."""
        cdef int rank
        cdef int times = 2 if nbytes > LARGE else 1
        self._number, self._parted = flag, parted
        self._place = times * PLACE
        if parted:
            while self._place < times * LEAST * self._size and self._place < self._slot:
                self._place *= 2
        self._depth = 2 * self._slot // self._place
        self._room = self._place // self._size // 64 * 64 if parted else self._place
        self._written = self._writes = self._read = self._reads = self._kept = self._keeps = 0
        self._next = 1
        if self._gives[self._rank].data != self._takes[self._rank].data:
            self._keeps = self._rounds(min(self._gives[self._rank].nbytes, self._takes[self._rank].nbytes))
        for rank in range(self._size):
            self._readers[rank] = rank != self._rank and (only < 0 or only == rank)
            if self._readers[rank]:
                self._writes = max(self._writes, self._rounds(self._gives[rank].nbytes))
            if rank != self._rank:
                self._reads = max(self._reads, self._rounds(self._takes[rank].nbytes))
        self._pulled = self._at_source = self._error = 0
        self._pulls = even and nbytes > ONE_COPY and self._processes is not NULL
        self._streams = nbytes > STREAMED and not self._pulls  # whose other half the system writes, not so
        if self._pulls:
            self._writes, self._reads = 0, 1 if self._reads else 0
            for rank in range(self._size):
                self._addresses(self._rank)[rank] = <int64_t>self._gives[rank].data
        self._tell_read()
        if self._pulls:
            store_release(self._word(self._rank), self._number + 1)

    cdef inline int64_t *_addresses(self, int rank) noexcept nogil:
        """Where a rank shows the addresses of its blocks, by the rank that reads them."""
        return <int64_t *>self._own_slots(rank)

    cdef inline Py_ssize_t _rounds(self, Py_ssize_t nbytes) noexcept:
        return (nbytes + self._room - 1) // self._room

    cdef inline char *_at(self, int rank, Py_ssize_t c) noexcept nogil:
        return self._own_slots(rank) + c % self._depth * self._place

    cdef bint _may_write(self) noexcept nogil:
        """Return whether all have read what is where the next piece goes."""
        cdef int64_t wanted = self._number + self._written - self._depth + 1
        cdef int rank
        if self._written < self._depth:
            return True
        for rank in range(self._size):
            if self._readers[rank] and load_acquire(self._word(rank) + LINE // 8) < wanted:
                return False
        return True

    cdef void _write(self) noexcept nogil:
        """Write the next round's pieces."""
        cdef Py_ssize_t start = self._written * self._room
        cdef char *place = self._at(self._rank, self._written)
        cdef Block *block
        cdef int rank
        for rank in range(self._size):
            block = &self._gives[rank]
            if self._readers[rank] and start < block.nbytes:
                memcpy(place + (rank * self._room if self._parted else 0), block.data + start, min(self._room, block.nbytes - start))
                if not self._parted:
                    break
        self._written += 1
        store_release(self._word(self._rank), self._number + self._written)

    cdef bint _take(self) noexcept nogil:
        """Read the next piece of this round, if it is there; begin with the neighbour's."""
        cdef Py_ssize_t start = self._read * self._room
        cdef Block *block
        cdef char *place
        cdef int rank
        cdef bint moved = False
        while self._next < self._size:
            rank = (self._rank + self._next) % self._size
            block = &self._takes[rank]
            if start < block.nbytes:
                if load_acquire(self._word(rank)) < self._number + self._read + 1:
                    return moved
                place = self._at(rank, self._read) + (self._rank * self._room if self._parted else 0)
                self._copy(block.data + start, place, min(self._room, block.nbytes - start))
                moved = True
            self._next += 1
        self._next = 1
        self._read += 1
        self._tell_read()
        return True

    cdef bint _pull(self) noexcept nogil:
        """Read some more from the others' memory, if they are there; begin with the neighbour's."""
        cdef Block *block
        cdef int rank
        cdef Py_ssize_t found
        while self._next < self._size:
            rank = (self._rank + self._next) % self._size
            block = &self._takes[rank]
            if self._at_source < block.nbytes:
                if load_acquire(self._word(rank)) < self._number + 1:
                    return False
                found = read_memory(
                    self._processes[rank], block.data + self._at_source,
                    <uint64_t>(self._addresses(rank)[self._rank] + self._at_source),
                    min(<Py_ssize_t>PULLED, block.nbytes - self._at_source),
                )
                if found < 0:
                    if found != -ESRCH:  # it is gone: who waits for it will hear that it died
                        self._error = <int>-found
                    return False
                self._at_source += found
                self._pulled += found
                return True
            self._next += 1
            self._at_source = 0
        self._read = 1
        self._tell_read()
        return True

    cdef bint _is_needed(self) noexcept nogil:
        """Return whether somebody may still read this rank's memory."""
        cdef int rank
        for rank in range(self._size if self._pulls else 0):
            if self._readers[rank] and self._gives[rank].nbytes:
                if load_acquire(self._word(rank) + LINE // 8) < self._number + ENDED:
                    return True
        return False

    cdef void _keep(self) noexcept nogil:
        """Copy the next piece of what this rank gives itself."""
        cdef Py_ssize_t start = self._kept * self._room
        cdef Block *given = &self._gives[self._rank]
        self._copy(self._takes[self._rank].data + start, given.data + start, min(self._room, given.nbytes - start))
        self._kept += 1

    cdef inline void _copy(self, char *into, const char *source, Py_ssize_t nbytes) noexcept nogil:
        if self._streams:
            stream(into, source, nbytes)
        else:
            memcpy(into, source, nbytes)

    cdef inline bint _is_over(self) noexcept nogil:
        return (
            self._written >= self._writes and self._read >= self._reads and self._kept >= self._keeps
            and not self._is_needed()
        )

    cdef inline Py_ssize_t _done(self) noexcept nogil:
        """The rounds that are behind it, of all that it does."""
        return self._written + self._read + self._kept + self._pulled // self._place

    cdef inline void _tell_read(self) noexcept nogil:
        """Raise the second flag: at the end of the reading for good, whatever is still to be written."""
        store_release(
            self._word(self._rank) + LINE // 8, self._number + (self._read if self._read < self._reads else ENDED)
        )

    def advance(self):
        """Go on as far as the peers let it; return -1 if it is over, else whether anything moved.

        It waits for them for a moment only, and others have their turn where it is long.
        """
        cdef Py_ssize_t begin = self._done()
        cdef bint over
        cdef int rank
        if not self._mapped:
            return -1
        with nogil:
            over = self._go()
        if self._error:
            rank = (self._rank + self._next) % self._size
            raise OSError(self._error, f"process_vm_readv from process {self._processes[rank]}: {strerror(self._error)}")
        if not over:
            return self._done() > begin
        self._arrays = None
        return -1

    cdef bint _go(self) noexcept nogil:
        """Go on as far as the peers let it; return whether it is over."""
        cdef Py_ssize_t end = self._done() + TURN_BYTES // self._place
        cdef double until = 0
        cdef int looks = 0
        cdef bint moved
        while not self._is_over() and self._done() < end:
            moved = False
            if self._written < self._writes and self._may_write():
                self._write()
                moved = True
            if self._read < self._reads and (self._pull() if self._pulls else self._take()):
                moved = True
            if self._error:
                break
            if self._kept < self._keeps and (self._kept < self._written or not moved):
                self._keep()
                moved = True
            if moved:
                looks, until = 0, 0
                continue
            looks += 1
            if looks & 63:
                relax()
            elif until == 0:
                until = monotonic() + self._patience
            elif monotonic() > until:
                break
            elif self._crowded:
                sched_yield()
        if not self._is_over():
            return False
        self._clear()
        return True
