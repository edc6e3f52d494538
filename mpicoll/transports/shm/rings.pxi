# Messages of a group on one node, a part of _native.pyx; rings.py says how they go.
#
# Each ordered pair of ranks has a ring of lines in shared memory.  A message begins a line: a header,
# the first bytes of what follows it, and the rest in the next lines.  Its first word, written last, is
# the number of the line plus one, counted from the ring's begin.  Before it is written, that of the
# line behind the message is cleared, so nothing that was there before can be taken for a header.
#
# A larger payload stays where it is: the receiver reads it from the sender's memory, and writes the
# message's first word into the pair's slot that the header names.  Then the send is over.  Where ranks
# may not read one another's memory, the header names the tag under which MPI brings the payload.
#
# A receive is matched here, in the order in which receives were posted, whoever looks.  One that was
# posted the direct way is `light`: the engine does not know it until something but `wait` and another
# message touches it.  Then it is adopted: its Work becomes a task like any other.

cdef extern from *:
    """
    static void prefetch_to_write(const void *line) { __builtin_prefetch(line, 1); }
    """
    void prefetch_to_write(const void *line) nogil
    int PyDict_Next(dict d, Py_ssize_t *at, PyObject **key, PyObject **value)

cdef enum:
    HEAD = 40  # of them a header
    SEND = 30, RECV  # the codes of the calls
    ANYONE = -1
    LIGHTS = 128  # messages that the engine does not know, at most
    TEXT = 132  # bytes of the name of a dtype, at most
    IN_TURN = 64  # messages from one rank before others have their turn
    PIECE = 1 << 26  # bytes that are read at a time
    BRIEF = 1 << 16  # bytes for the reading of which the interpreter's lock is kept

cdef enum:  # the states of a message, in their order
    NEW, WAITING, COMING, OVER, WRONG, FAILED, DROPPED, APART

cdef enum:  # what stands in place of a slot
    BEHIND = -1  # the payload is behind the header
    BY_MPI = -2

cdef struct Head:
    int64_t serial
    int32_t tag
    int16_t slot
    int16_t text  # bytes of the dtype's name
    int64_t dtype, count, nbytes

cdef struct Kept:  # a message that no receive was posted for
    Kept *next
    Head head
    int source
    uint64_t address  # or the tag of MPI
    char *payload  # NULL: it is still where its sender has it
    char[132] text

cdef struct Link:  # to and from one rank
    int64_t written, taken, sent  # lines of the ring there, and messages
    int64_t read, received  # of the ring here
    int64_t process
    uint64_t slots  # that are free


@cython.final
@cython.freelist(32)
@cython.trashcan(True)
cdef class Posted:
    """One send or receive, from its call until it is over."""

    cdef readonly Rings rings
    cdef readonly int kind, source
    cdef readonly double called, timeout
    cdef readonly object given
    cdef readonly Entry entry
    cdef public bint filled  # its Work has all that a task has
    cdef readonly int peer
    cdef readonly int64_t tag
    cdef int state, slot
    cdef bint light, adopted, busy
    cdef int64_t dtype, serial
    cdef uint64_t address  # of a payload that is read, or its tag
    cdef Py_ssize_t comes  # bytes of the payload that MPI brings
    cdef char *data
    cdef char *copy  # of what the receiver could not read
    cdef Py_ssize_t count, nbytes, got
    cdef object array  # which the memory belongs to
    cdef bytes text
    cdef Posted next, before  # among the receives that wait for a message
    cdef tuple found  # what has come in place of what is wanted: dtype, count and the dtype's name
    cdef int error

    def __dealloc__(self):
        free(self.copy)

    # ---- the general way ----

    def advance(self):
        """Begin it, if that was not done; look for what there is to do; return whether it is over."""
        cdef Rings rings = self.rings
        if not rings._mapped:
            return self.state >= OVER
        if self.state == NEW:
            rings._begin(self)
            if self.state == WAITING:
                rings._advance(False)
        elif self.state < OVER:
            rings._advance(True)
        return self.state >= OVER

    def cancel(self):
        """Take it back; return whether that could be: nothing of it has come, or was written."""
        cdef Rings rings = self.rings
        if self.state == NEW or self.state == DROPPED:
            self.state = DROPPED
            return True
        if self.state != WAITING:
            return False
        if self.kind == RECV:
            rings._unlink(self)
        elif self.slot == BEHIND:
            (<list>rings._queues[self.peer]).remove(self)
            rings._queued -= 1
        else:
            return False  # its receiver may be reading it
        self.state = DROPPED
        return True

    def abandon(self):
        """Have nothing more written into its memory."""
        if not self.cancel() and self.state == COMING:
            self.rings._coming.remove(self)
            self.state = DROPPED

    def complete(self):
        """Read the rest of a message that has begun to come."""
        while self.state == COMING and self.rings._mapped:
            self.rings._fetch(self)

    @property
    def begun(self):
        """Whether it moves."""
        return self.state == COMING

    @property
    def wrong(self):
        """Code, count and name of the dtype that has come in place of what is wanted; or None."""
        return self.found

    @property
    def apart(self):
        """Tag and bytes of the payload that MPI is to bring; or None."""
        return (self.address, self.comes) if self.slot == BY_MPI else None

    @property
    def failed(self):
        """The system's number of the error by which the payload could not be read, or 0."""
        return self.error

    # ---- the direct way ----

    def adopt(self):
        """Leave it to the general way; return whether that has something to do."""
        if self.light:
            self.adopted = True
        return self.adopted

    def wait(self):
        """Return whether it is over, and well; it is waited for here for a moment only."""
        cdef Rings rings = self.rings
        cdef double until = 0
        cdef int looks = 0, source
        if self.adopted or over:
            return False
        while self.state < OVER and rings._mapped:
            if self.state == COMING:
                rings._fetch(self)
                if self.state == COMING:
                    break  # there is more: signals are to be looked at
                continue
            if self.kind == SEND:
                rings._look_at(self)
            elif self.peer >= 0:
                rings._deliver(self.peer)
            else:
                for source in range(rings._size):
                    rings._deliver(source)
            looks += 1
            if looks & 15 == 0 and self.state == WAITING:
                rings._advance(True)
            if looks & 63 or self.state != WAITING:
                relax()
                continue
            if until == 0:
                until = monotonic() + rings._patience
            elif monotonic() > until:
                break
            if rings._crowded:
                sched_yield()
        return self.state == OVER

    def look(self):
        """Return whether it is over, and well, now."""
        if self.adopted or over:
            return False
        if self.state < OVER and self.rings._mapped:
            self.rings._advance(True)
        return self.state == OVER


@cython.final
cdef class Rings(Node):
    """The messages of a group whose ranks share one node's memory.

    Args:
        memory: the mapping.
        layout: rank and size, and zeros.
        crowded: the ranks share cores.
        ring, slots: bytes of a ring, and how many of its larger messages may be under way.
        packed: bytes of a payload that goes through the ring, at most.
        processes: of the ranks, by the system's numbers.
        highest_tag: of messages.
        reads: they may read one another's memory.
    """

    cdef public object group_state, steps, append
    cdef public double limit  # seconds that a message may take where it doesn't say otherwise
    cdef Link *_links
    cdef Kept *_kept
    cdef Kept *_last_kept
    cdef Posted _first, _last  # of the receives that wait
    cdef list _queues  # of the sends that wait for room, by receiver
    cdef list _offers  # the sends that their receivers have to read
    cdef list _coming  # the receives that read
    cdef int _queued
    cdef Py_ssize_t _ring, _pair, _lines, _packed
    cdef int _slots
    cdef int64_t _highest_tag
    cdef bint _reads

    def __init__(self, memory, layout, crowded, *, ring, slots, packed, processes, highest_tag, reads):
        cdef int rank
        self._reads = reads
        self._ring, self._slots, self._packed, self._highest_tag = ring, slots, packed, highest_tag
        self._lines = ring // LINE
        self._pair = LINE + (slots * 8 + LINE - 1) // LINE * LINE + ring
        self._links = <Link *>calloc(self._size, sizeof(Link))
        if self._links is NULL:
            raise MemoryError()
        for rank in range(self._size):
            self._links[rank].process = processes[rank]
            self._links[rank].slots = ~<uint64_t>0 if slots == 64 else (<uint64_t>1 << slots) - 1
        self._queues = [[] for _ in range(self._size)]
        self._offers, self._coming = [], []
        self.limit = 1e9

    def __dealloc__(self):
        self._forget()
        free(self._links)

    cdef void _forget(self):
        cdef Kept *kept
        while self._kept is not NULL:
            kept = self._kept
            self._kept = kept.next
            free(kept.payload)
            free(kept)
        self._last_kept = NULL

    def close(self):
        """Let go of the memory, and of what nobody has received."""
        cdef Posted posted = self._first, following
        self._let_go()
        self._forget()
        self._first = self._last = None
        while posted is not None:
            following = posted.next
            posted.next = posted.before = None
            posted = following

    @property
    def sent(self):
        """How many messages were sent, by receiver."""
        return [self._links[rank].sent for rank in range(self._size)]

    @property
    def received(self):
        """How many messages were received, or dropped, by sender; but for what is left to MPI."""
        return [self._links[rank].received for rank in range(self._size)]

    # ---- the direct way: None where a message is not for it ----

    cdef object send(self, tensor, dst, tag, timeout):
        cdef Given a
        cdef object array = self._view(tensor, False, &a)
        cdef Posted posted
        cdef double now
        if array is None or type(dst) is not int or not 0 <= dst < self._size:
            return None
        now = self._open(tag, timeout)
        if now == 0 or (light and not self._is_free(&a, False)) or self._queues[dst]:
            return None
        if not self._reads and a.nbytes > self._packed:
            return None
        posted = self._new(SEND, &a, dst, tag)
        posted.array, posted.given = array, tensor
        if not self._write(posted):
            return None
        self._links[posted.peer].sent += 1
        return self._work(posted, &a, timeout, now)

    cdef object recv(self, tensor, src, tag, timeout):
        cdef Given a
        cdef object array = self._view(tensor, True, &a)
        cdef Posted posted
        cdef double now
        cdef int source = ANYONE, turn = 0
        if array is None:
            return None
        if src is not any_source:
            if type(src) is not int or not 0 <= src < self._size:
                return None
            source = src
        now = self._open(tag, timeout)
        if now == 0 or (light and not self._is_free(&a, True)):
            return None
        posted = self._new(RECV, &a, source, tag)
        posted.array, posted.given = array, tensor
        self._begin(posted)
        if source >= 0:
            while turn < IN_TURN and posted.state == WAITING and self._deliver(source):
                turn += 1
        return self._work(posted, &a, timeout, now)

    cdef object _work(self, Posted posted, Given *shown, object timeout, double now):
        """Enter a message in the flight recorder, and return its Work."""
        cdef Entry entry = entry_of(0, posted.kind, shown, now)
        cdef object work
        cdef bint done = posted.state == OVER
        entry.count, entry.peer, entry.tag = posted.count, posted.peer, posted.tag
        entry.code = self._placed(&entry.at)
        if done:
            entry.ended = monotonic()
        posted.called = now
        posted.timeout = self.limit if timeout is None else timeout
        posted.entry = entry
        self.append(entry)
        work = new_instance(message_class)
        give_slot(work, at_posted, posted)
        if not done:
            posted.light = True
            light[posted] = work
        return work

    cdef double _open(self, object tag, object timeout) except -1:
        """Return the time if messages can go the direct way; else 0."""
        cdef double now
        if over or not self._mapped or active or alarms:
            return 0
        if type(tag) is not int or not 0 <= tag <= self._highest_tag:
            return 0
        if timeout is not None and not ((type(timeout) is float or type(timeout) is int) and timeout > 0):
            return 0
        if not takes_calls(self.group_state):
            return 0
        now = monotonic()
        return 0 if is_due(now) else now

    cdef bint _is_free(self, Given *a, bint write):
        """Return whether no light message is in the way of a call that reads or writes some memory."""
        cdef Py_ssize_t at = 0
        cdef PyObject *key
        cdef Posted other
        if len(light) >= LIGHTS:
            return False
        while PyDict_Next(light, &at, &key, NULL):
            other = <Posted>key
            if (write or other.kind == RECV) and a.data < other.data + other.nbytes and other.data < a.data + a.nbytes:
                return False
        return True

    cdef Posted _new(self, int kind, Given *a, int peer, int64_t tag):
        cdef Posted posted = Posted.__new__(Posted)
        posted.rings, posted.kind, posted.peer, posted.tag = self, kind, peer, tag
        posted.source, posted.slot = peer, BEHIND
        posted.data, posted.dtype, posted.count, posted.nbytes = a.data, a.dtype, a.count, a.nbytes
        return posted

    # ---- the general way ----

    def message(
        self, int kind, cnp.ndarray array, int64_t dtype, Py_ssize_t count, bytes text, int peer, int64_t tag,
        int64_t apart,
    ):
        """Return a send, or a receive from a rank or (-1) from any, that is yet to begin.

        Args:
            array: the memory, contiguous.
            dtype, count, text: code, elements, and the name of the dtype where the code is not known everywhere.
            apart: the tag under which MPI brings the payload, if it is large and can't be read.
        """
        cdef Given a
        cdef Posted posted
        a.data, a.dtype, a.count, a.nbytes = <char *>cnp.PyArray_DATA(array), dtype, count, cnp.PyArray_NBYTES(array)
        posted = self._new(kind, &a, peer, tag)
        posted.array, posted.text = array, text[:TEXT] or None
        if kind == SEND and not self._reads:
            posted.address = apart
        return posted

    def advance(self):
        """Take what has come, and send what waits for room."""
        if self._mapped:
            self._advance(True)

    def probe(self, int peer, int64_t tag):
        """Return source, dtype's code, count and name of the message that a receive would take, or None.

        The message is taken whole, unless MPI brings it: its sender needs to wait no longer.
        """
        cdef Kept *kept
        if not self._mapped:
            return None
        self._advance(True)
        kept = self._find(peer, tag)
        if kept is NULL or not self._hold(kept):
            return None
        return kept.source, kept.head.dtype, kept.head.count, kept.text[:kept.head.text]

    def drop(self):
        """Drop the oldest message that no receive waits for; return what it was, or None.

        That is source, tag, dtype's code, count; and tag and bytes of the payload that MPI brings, or 0 and 0.
        """
        cdef Kept *kept
        if not self._mapped:
            return None
        self._advance(True)
        kept = self._kept
        if kept is NULL:
            return None
        self._pick(kept)
        if kept.payload is NULL and kept.head.slot >= 0:
            self._acknowledge(kept.source, &kept.head)
        self._links[kept.source].received += 1
        told = kept.source, kept.head.tag, kept.head.dtype, kept.head.count, 0, 0
        if kept.head.slot == BY_MPI:
            told = told[:4] + (kept.address, kept.head.nbytes)
        free(kept.payload)
        free(kept)
        return told

    # ---- in C ----

    cdef inline char *_pair_at(self, int sender, int receiver) noexcept nogil:
        return self._base + (receiver * <Py_ssize_t>self._size + sender) * self._pair

    cdef inline char *_ring_at(self, int sender, int receiver) noexcept nogil:
        return self._pair_at(sender, receiver) + self._pair - self._ring

    cdef inline int64_t *_slot_at(self, int sender, int receiver, int slot) noexcept nogil:
        return <int64_t *>(self._pair_at(sender, receiver) + LINE) + slot

    cdef void _begin(self, Posted posted):
        """Send a message, or have it wait for room; or take one that has come, or wait for it."""
        cdef Kept *kept
        posted.state = WAITING
        if posted.kind == SEND:
            self._links[posted.peer].sent += 1
            if self._queues[posted.peer] or not self._write(posted):
                (<list>self._queues[posted.peer]).append(posted)
                self._queued += 1
            return
        kept = self._find(posted.peer, posted.tag)
        if kept is NULL:
            posted.before, posted.next = self._last, None
            if self._last is None:
                self._first = posted
            else:
                self._last.next = posted
            self._last = posted
            return
        self._pick(kept)
        if self._matches(posted, kept.source, &kept.head, kept.text):
            if kept.payload is not NULL:
                memcpy(posted.data, kept.payload, posted.nbytes)
                self._end_receive(posted, OVER)
            elif kept.head.slot == BY_MPI:
                self._leave_to_mpi(posted, &kept.head, kept.address, APART)
            else:
                self._read_from(posted, &kept.head, kept.address)
        elif kept.head.slot == BY_MPI:
            self._leave_to_mpi(posted, &kept.head, kept.address, WRONG)
        else:
            if kept.payload is NULL and kept.head.slot >= 0:
                self._acknowledge(kept.source, &kept.head)
            self._end_receive(posted, WRONG)
        free(kept.payload)
        free(kept)

    cdef void _unlink(self, Posted posted):
        """Take a receive out of those that wait."""
        if posted.before is None:
            self._first = posted.next
        else:
            posted.before.next = posted.next
        if posted.next is None:
            self._last = posted.before
        else:
            posted.next.before = posted.before
        posted.next = posted.before = None

    cdef void _advance(self, bint read):
        """Look for all that there is to do; `read`: and read what its senders still have."""
        cdef Posted posted
        cdef int source, turn
        cdef list queue
        if self._offers:
            for posted in list(self._offers):
                self._look_at(posted)
        if self._queued:
            for queue in self._queues:
                while queue and self._mapped:
                    posted = queue[0]
                    if not self._write(posted):
                        break
                    del queue[0]
                    self._queued -= 1
        if read and self._coming:
            for posted in list(self._coming):
                self._fetch(posted)
        for source in range(self._size):
            turn = 0
            while turn < IN_TURN and self._deliver(source):
                turn += 1

    # ---- as the sender ----

    cdef bint _write(self, Posted posted):
        """Write a message into its ring, and return whether there was room for it."""
        cdef Link *link = &self._links[posted.peer]
        cdef char *ring = self._ring_at(self._rank, posted.peer)
        cdef char *line = ring + (link.written & (self._lines - 1)) * LINE
        cdef Head *head = <Head *>line
        cdef bint packed = posted.nbytes <= self._packed
        cdef Py_ssize_t text = 0 if posted.text is None else len(posted.text)
        cdef Py_ssize_t behind = text + (posted.nbytes if packed else 8)
        cdef int64_t lines = lines_of(behind), following
        cdef int slot = BEHIND if packed else BY_MPI
        if not self._mapped:
            return False
        if link.written + lines + 1 - link.taken > self._lines:
            link.taken = load_acquire(<int64_t *>self._pair_at(self._rank, posted.peer))
            if link.written + lines + 1 - link.taken > self._lines:
                return False
        if not packed and self._reads:
            if link.slots == 0:
                return False
            if posted.address == 0:
                posted.address = self._readable(posted)
            slot = 0
            while not link.slots >> slot & 1:
                slot += 1
            link.slots &= ~(<uint64_t>1 << slot)
        posted.slot, posted.serial = slot, link.written + 1
        head.tag, head.slot, head.text = posted.tag, slot, text
        head.dtype, head.count, head.nbytes = posted.dtype, posted.count, posted.nbytes
        if text:
            self._put(ring, link.written, 0, posted.text, text)
        if packed:
            self._put(ring, link.written, text, posted.data, posted.nbytes)
        else:
            self._put(ring, link.written, text, <char *>&posted.address, 8)
        following = link.written + lines
        (<int64_t *>(ring + (following & (self._lines - 1)) * LINE))[0] = 0
        store_release(&head.serial, posted.serial)
        link.written = following
        prefetch_to_write(ring + ((following + 1) & (self._lines - 1)) * LINE)
        if slot < 0:
            posted.state = OVER
            self._settle(posted)
        else:
            posted.state = WAITING
            self._offers.append(posted)
        return True

    cdef uint64_t _readable(self, Posted posted) except 0:
        """Return where the receiver can read a payload: if need be, in a copy.

        No process may read what drivers have mapped, as CUDA's pinned memory, nor its own this way.
        """
        cdef char byte
        cdef int64_t own = self._links[self._rank].process
        cdef uint64_t first = <uint64_t>posted.data, last = first + posted.nbytes - 1
        if read_memory(own, &byte, first, 1) == 1 and read_memory(own, &byte, last, 1) == 1:
            return first
        posted.copy = <char *>malloc(posted.nbytes)
        if posted.copy is NULL:
            raise MemoryError()
        memcpy(posted.copy, posted.data, posted.nbytes)
        return <uint64_t>posted.copy

    cdef void _put(self, char *ring, int64_t line, Py_ssize_t at, const char *data, Py_ssize_t n) noexcept:
        """Write what follows a header, from byte `at` on."""
        cdef Py_ssize_t offset, part
        if at < LINE - HEAD and n:
            part = min(n, LINE - HEAD - at)
            memcpy(ring + (line & (self._lines - 1)) * LINE + HEAD + at, data, part)
            data, at, n = data + part, at + part, n - part
        if n:
            offset = (((line + 1) & (self._lines - 1)) * LINE + at - (LINE - HEAD)) & (self._ring - 1)
            part = min(n, self._ring - offset)
            memcpy(ring + offset, data, part)
            memcpy(ring, data + part, n - part)

    cdef void _look_at(self, Posted posted):
        """Look whether the receiver has read what it was offered."""
        cdef Link *link = &self._links[posted.peer]
        if posted.state != WAITING or posted.slot < 0 or not self._mapped:
            return
        if load_acquire(self._slot_at(self._rank, posted.peer, posted.slot)) == posted.serial:
            link.slots |= <uint64_t>1 << posted.slot
            self._offers.remove(posted)
            posted.state = OVER
            self._settle(posted)

    # ---- as the receiver ----

    cdef bint _deliver(self, int source):
        """Take the next message of a ring, and return whether there was one."""
        cdef Link *link = &self._links[source]
        cdef char *ring
        cdef Head head
        cdef Head *written
        cdef Posted posted
        cdef Kept *kept
        cdef char[132] text
        cdef uint64_t address = 0
        cdef int64_t line = link.read
        if not self._mapped:
            return False
        ring = self._ring_at(source, self._rank)
        written = <Head *>(ring + (line & (self._lines - 1)) * LINE)
        if load_acquire(&written.serial) != line + 1:
            return False
        head = written[0]
        posted = self._first
        while posted is not None and not (posted.tag == head.tag and (posted.peer < 0 or posted.peer == source)):
            posted = posted.next
        if head.text:
            self._get(ring, line, 0, text, head.text)
        if head.slot != BEHIND:
            self._get(ring, line, head.text, <char *>&address, 8)
        if posted is None:
            kept = <Kept *>malloc(sizeof(Kept))
            if kept is NULL:
                return False
            kept.next, kept.head, kept.source, kept.address, kept.payload = NULL, head, source, address, NULL
            memcpy(kept.text, text, head.text)
            if head.slot == BEHIND:
                kept.payload = <char *>malloc(head.nbytes + 1)
                if kept.payload is NULL:
                    free(kept)
                    return False
                self._get(ring, line, head.text, kept.payload, head.nbytes)
            if self._last_kept is NULL:
                self._kept = kept
            else:
                self._last_kept.next = kept
            self._last_kept = kept
            self._has_taken(source, &head)
            return True
        self._unlink(posted)
        if head.slot == BY_MPI:
            self._has_taken(source, &head)
            self._leave_to_mpi(
                posted, &head, address, APART if self._matches(posted, source, &head, text) else WRONG
            )
        elif not self._matches(posted, source, &head, text):
            self._has_taken(source, &head)
            if head.slot >= 0:
                self._acknowledge(source, &head)
            self._end_receive(posted, WRONG)
        elif head.slot == BEHIND:
            self._get(ring, line, head.text, posted.data, posted.nbytes)
            self._has_taken(source, &head)
            self._end_receive(posted, OVER)
        else:
            self._has_taken(source, &head)
            self._read_from(posted, &head, address)
        return True

    cdef void _has_taken(self, int source, Head *head) noexcept:
        """Leave the lines of a message to the next ones."""
        cdef Link *link = &self._links[source]
        link.read += lines_of(head.text + (head.nbytes if head.slot == BEHIND else 8))
        if self._mapped:  # a collection of garbage may have run what closes the group
            store_release(<int64_t *>self._pair_at(source, self._rank), link.read)

    cdef void _get(self, char *ring, int64_t line, Py_ssize_t at, char *into, Py_ssize_t n) noexcept:
        """Read what follows a header, from byte `at` on."""
        cdef Py_ssize_t offset, part
        if at < LINE - HEAD and n:
            part = min(n, LINE - HEAD - at)
            memcpy(into, ring + (line & (self._lines - 1)) * LINE + HEAD + at, part)
            into, at, n = into + part, at + part, n - part
        if n:
            offset = (((line + 1) & (self._lines - 1)) * LINE + at - (LINE - HEAD)) & (self._ring - 1)
            part = min(n, self._ring - offset)
            memcpy(into, ring + offset, part)
            memcpy(into + part, ring, n - part)

    cdef bint _matches(self, Posted posted, int source, Head *head, char *text):
        """Note whose message a receive gets, and return whether it is of its array's dtype and size."""
        posted.source = source
        if head.dtype == posted.dtype and head.count == posted.count and head.nbytes == posted.nbytes:
            return True
        posted.found = head.dtype, head.count, text[:head.text]
        return False

    cdef void _read_from(self, Posted posted, Head *head, uint64_t address):
        """Have a payload read from its sender's memory, but not before this rank waits.

        Where two ranks exchange payloads, the second one is to send before it reads.
        """
        posted.address, posted.slot, posted.serial, posted.state = address, head.slot, head.serial, COMING
        self._coming.append(posted)

    cdef void _leave_to_mpi(self, Posted posted, Head *head, uint64_t tag, int state):
        """Have a payload received by MPI, where it is wanted and where it is not."""
        posted.address, posted.comes, posted.slot, posted.state = tag, head.nbytes, BY_MPI, state

    cdef void _fetch(self, Posted posted):
        """Read a piece of a payload."""
        cdef Py_ssize_t at = posted.got, n = min(posted.nbytes - at, <Py_ssize_t>PIECE), done
        cdef int64_t process = self._links[posted.source].process
        cdef char *into = posted.data + at
        cdef uint64_t address = posted.address + at
        cdef Head head
        if posted.state != COMING:
            return
        if posted.busy:  # another thread is at it
            with nogil:
                sched_yield()
            return
        if n > BRIEF:
            posted.busy = True
            with nogil:
                done = read_memory(process, into, address, n)
            posted.busy = False
            if posted.state != COMING or not self._mapped:
                return  # it was abandoned meanwhile
        else:
            done = read_memory(process, into, address, n)
        if done < 0:
            posted.error = -done
            self._coming.remove(posted)
            self._end_receive(posted, FAILED)
            return
        posted.got += done
        if posted.got == posted.nbytes:
            self._coming.remove(posted)
            head.slot, head.serial = posted.slot, posted.serial
            self._acknowledge(posted.source, &head)
            self._end_receive(posted, OVER)

    cdef void _acknowledge(self, int source, Head *head) noexcept:
        """Let the sender know that its payload was read, or is not wanted."""
        if self._mapped:
            store_release(self._slot_at(source, self._rank, head.slot), head.serial)

    cdef void _end_receive(self, Posted posted, int state):
        self._links[posted.source].received += 1
        posted.state = state
        if state == OVER:
            self._settle(posted)

    cdef void _settle(self, Posted posted):
        """Note the end of a message; the engine need not know of one that went the direct way."""
        if posted.light and not posted.adopted:
            posted.light = False
            posted.entry.ended = monotonic()
            del light[posted]  # last: it may be all that has kept the Work

    cdef Kept *_find(self, int peer, int64_t tag) noexcept:
        """Return the first of the messages kept that a receive would take."""
        cdef Kept *kept = self._kept
        while kept is not NULL and not (kept.head.tag == tag and (peer < 0 or peer == kept.source)):
            kept = kept.next
        return kept

    cdef void _pick(self, Kept *kept) noexcept:
        """Take one of the messages kept out."""
        cdef Kept *before = NULL
        cdef Kept *at = self._kept
        while at is not kept:
            before, at = at, at.next
        if before is NULL:
            self._kept = kept.next
        else:
            before.next = kept.next
        if self._last_kept is kept:
            self._last_kept = before

    cdef bint _hold(self, Kept *kept):
        """Have a payload here, and return whether that could be."""
        cdef Py_ssize_t got = 0, done
        if kept.payload is not NULL or kept.head.slot == BY_MPI:
            return True
        kept.payload = <char *>malloc(kept.head.nbytes + 1)
        if kept.payload is NULL:
            return False
        while got < kept.head.nbytes:
            done = read_memory(
                self._links[kept.source].process, kept.payload + got, kept.address + got, kept.head.nbytes - got
            )
            if done < 0:
                free(kept.payload)
                kept.payload = NULL
                return False
            got += done
        self._acknowledge(kept.source, &kept.head)
        return True


cdef inline int64_t lines_of(Py_ssize_t behind) noexcept nogil:
    """Return how many lines a message takes of which so many bytes follow the header."""
    return 1 + (max(behind - (LINE - HEAD), 0) + LINE - 1) // LINE


cdef object any_source, message_class
cdef dict alarms
cdef Py_ssize_t at_posted


def configure_messages(*, the_engine, any_source_of, message_work):
    """Tell the rings, once, what they share with the general way.

    Args:
        the_engine: whose state is looked at.
        any_source_of: what stands for any source.
        message_work: the class of the messages that go the direct way.
    """
    global alarms, any_source, message_class, at_posted
    alarms, any_source, message_class = the_engine.alarms, any_source_of, message_work
    at_posted = slot_offset(message_class._posted)
    if at_posted < 0:
        raise TypeError("what a message's Work was made of must be a slot")
