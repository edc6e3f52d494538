# Small calls of a group on one node, whole, in one go, a part of _native.pyx.
#
# It does the same as the general way, in the same memory and with the same bits, so the two can meet
# in one call.  It checks the arguments, writes the record and what travels beside it, looks at the
# peers' records, reads what they gave, and enters the call in the flight recorder.  What only moves
# and is larger goes through the slots (moves.pxi), once there are any.  A call that is not for it, or
# whose peers are late, is the general way's: then it returns None, a record that was posted stays
# posted, and a move that was begun goes on there.
#
# It runs under the interpreter's lock from end to end, runs no bytecode once anything is posted, and
# looks at no signals: so nothing can strike in the middle, and no other thread is in the engine unless
# it was before.

@cython.final
cdef class Core(Node):
    """What carries out the small calls of one group.

    Args:
        most: bytes that travel beside a record, at most; at_once: that go through the slots.
        group_state, arrival, ring, numbering: what is looked at and kept up to date.

    Attributes:
        moves: what moves through the slots; None: they are not there, or not for this.
    """

    cdef public Moves moves
    cdef Py_ssize_t _most, _most_reduced, _at_once
    cdef object _group_state, _arrival, _append, _numbering
    cdef int64_t _counted, _counts
    cdef int64_t _next, _owed, _owed_kind, _last, _kind
    cdef Entry _entry  # of the call that was posted last
    cdef bint _stale
    cdef char *_spare

    def __dealloc__(self):
        free(self._spare)

    def __init__(self, memory, layout, crowded, *, most, at_once, group_state, arrival, ring, numbering):
        self._most, self._most_reduced = min(most, self._payload), min(4 * most, self._payload)
        self._group_state, self._arrival, self._append = group_state, arrival, ring.append
        self._at_once, self._numbering = at_once, numbering
        self._counted = -1

    def checked(self, kind, arguments):
        """Return the call of some arguments, as the general way makes it."""
        return checks[kind](self._rank, self._size, *arguments)

    @property
    def owed(self):
        """The number of a call that was posted and left to the general way; 0: none."""
        return self._owed

    @property
    def finished(self):
        """Kind and number of the last call that went this way, or None."""
        return (kinds[self._kind], self._last) if self._last else None

    def take_over(self, kind):
        """Return the number of the call that was posted; 0 if that call came to nothing.

        An exception struck before the general way had it, and this is another call.
        """
        seq = self._owed
        self._owed = 0
        stale = self._stale or kinds[self._owed_kind] != kind
        self._stale = False
        return 0 if stale else seq

    # ---- the calls: None where one is not for this way ----

    cdef object allreduce(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(ALLREDUCE, tensor, op, timeout, -1, self._size)

    cdef object reduce(self, tensor, root, op, timeout):
        if self._is_indebted() or not self._is_rank(root):
            return None
        return self._reducing(REDUCE, tensor, op, timeout, root, self._size)

    cdef object scan(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(SCAN, tensor, op, timeout, -1, self._rank + 1)

    cdef object exscan(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(EXSCAN, tensor, op, timeout, -1, self._rank)

    cdef object _reducing(self, int kind, object tensor, object op, object timeout, int root, int upto):
        """Reduce what the first ranks give, into the array itself."""
        cdef Given a
        cdef bint lands = root < 0 or root == self._rank
        cdef object array = self._view(tensor, lands, &a)
        cdef int code = self._op(op)
        cdef const plan *p
        cdef int64_t seq
        cdef char *mine
        cdef char *kept
        cdef char *first
        cdef Py_ssize_t between
        if array is None:
            return None
        p = plan_of(a.dtype, code)
        if p is NULL or not self._fits(a.count * p.wire, True) or (code == AVG_OP and kind >= SCAN):
            return None
        if p.wire != p.width and self._spare is NULL:
            self._spare = <char *>malloc(self._payload)
            if self._spare is NULL:
                return None
        if not self._open(timeout):
            return None
        seq = self._next
        mine = self._given_by(self._rank, seq, a.count * p.wire)
        encode(p, mine, a.data, a.count)
        if not self._meet(seq, kind, &a, code, root, a.count, 0, a.count):
            return None
        if lands and upto:
            kept = self._keep(p, &a, mine)
            first, between = self._given_by(0, seq, a.count * p.wire), self._between(a.count * p.wire)
            if fold(p, a.data, first, between, upto, a.count, self._size, True, self._rank):
                memcpy(a.data, kept, a.nbytes)
                return None  # the general way makes the NaN
        return self._done((self, kind, tensor, root, op) if kind == REDUCE else (self, kind, tensor, op))

    cdef inline char *_keep(self, const plan *p, Given *a, char *mine):
        """Return where an array still is as it was, in case that a result is NaN.

        Which NaN it is must be the same on all ranks: the general way makes it, on each of them.
        """
        if p.wire == p.width:
            return mine
        memcpy(self._spare, a.data, a.nbytes)
        return self._spare

    cdef object reduce_scatter_single(self, output, input, op, timeout):
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef int code = self._op(op)
        cdef const plan *p
        cdef int64_t seq
        cdef char *mine
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or a.count != out.count * self._size:
            return None
        p = plan_of(a.dtype, code)
        if p is NULL or not self._fits(a.count * p.wire, True) or not self._apart(&out, &a):
            return None
        if not self._open(timeout):
            return None
        seq = self._next
        mine = self._given_by(self._rank, seq, a.count * p.wire)
        encode(p, mine, a.data, a.count)
        if not self._meet(seq, REDUCE_SCATTER_SINGLE, &a, code, -1, out.count, 0, a.count):
            return None
        if self._own_part(p, seq, &out):
            return None  # the general way makes the NaN
        return self._done((self, REDUCE_SCATTER_SINGLE, output, input, op))

    cdef inline int _own_part(self, const plan *p, int64_t seq, Given *out):
        """Reduce this rank's part into an array apart from what was given; return whether a result is NaN."""
        cdef Py_ssize_t part = out.count * p.wire, given = part * self._size
        cdef char *first = self._given_by(0, seq, given) + self._rank * part
        return fold(p, out.data, first, self._between(given), self._size, out.count, self._size, True, -1)

    cdef object reduce_scatter(self, output, input, op, timeout):
        cdef Given out
        cdef Given[16] parts
        cdef object into = self._view(output, True, &out)
        cdef int code = self._op(op), rank
        cdef const plan *p
        cdef int64_t seq, digest
        cdef char *mine
        cdef list sources
        if self._is_indebted() or into is None:
            return None
        p = plan_of(out.dtype, code)
        if p is NULL or not self._fits(out.count * self._size * p.wire, True):
            return None
        sources = self._views(input, &out, False, parts)
        if sources is None:
            return None
        digest = self._digest(out.count)  # which runs bytecode: before the group is looked at
        if not self._open(timeout):
            return None
        seq = self._next
        mine = self._given_by(self._rank, seq, out.count * self._size * p.wire)
        for rank in range(self._size):
            encode(p, mine + rank * out.count * p.wire, parts[rank].data, out.count)
        if not self._meet(
            seq, REDUCE_SCATTER, &parts[0], code, -1, out.count, digest, out.count * self._size
        ):
            return None
        if self._own_part(p, seq, &out):
            return None  # the general way makes the NaN
        return self._done((self, REDUCE_SCATTER, output, list(input), op))

    cdef object barrier(self, timeout):
        cdef int64_t seq
        if self._is_indebted():
            return None
        if not self._open(timeout):
            return None
        seq = self._next
        if not self._meet(seq, BARRIER, NULL, -1, -1, 0, 0, 0):
            return None
        return self._done((self, BARRIER))

    cdef object broadcast(self, tensor, root, timeout):
        cdef Given a
        cdef object array
        cdef int64_t seq
        cdef int rank
        cdef bint gives, moves
        if self._is_indebted() or not self._is_rank(root):
            return None
        gives = root == self._rank
        array = self._view(tensor, not gives, &a)
        if array is None or not self._goes(a.nbytes, &moves):
            return None
        if not self._open(timeout):
            return None
        seq = self._next
        if gives and not moves:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, BROADCAST, &a, -1, root, a.count, 0, a.count):
            return None
        if moves:
            for rank in range(self._size if gives else 0):
                self.moves._give(rank, a.data, a.nbytes)
            if not gives:
                self.moves._get(root, a.data, a.nbytes)
            if not self._moved(False, -1, False, a.nbytes, array):
                return None
        elif not gives:
            memcpy(a.data, self._room(root, seq), a.nbytes)
        return self._done((self, BROADCAST, tensor, root))

    cdef object all_gather_single(self, output, input, timeout):
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef int64_t seq
        cdef int rank
        cdef bint moves
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or out.count != a.count * self._size:
            return None
        if not self._goes(out.nbytes, &moves):
            return None
        if not self._apart(&out, &a) and a.data != out.data + self._rank * a.nbytes:
            return None
        if not self._open(timeout):
            return None
        seq = self._next
        if not moves:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, ALL_GATHER_SINGLE, &a, -1, -1, a.count, 0, out.count):
            return None
        for rank in range(self._size):
            if moves:
                self.moves._give(rank, a.data, a.nbytes)
                self.moves._get(rank, out.data + rank * a.nbytes, a.nbytes)
            else:
                memcpy(out.data + rank * a.nbytes, self._room(rank, seq), a.nbytes)
        if moves and not self._moved(False, -1, True, out.nbytes, (into, source)):
            return None
        return self._done((self, ALL_GATHER_SINGLE, output, input))

    cdef object all_to_all_single(self, output, input, output_sizes, input_sizes, timeout):
        """Where the rows are shared equally."""
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef Py_ssize_t nbytes
        cdef int64_t seq
        cdef int rank
        cdef bint moves
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or a.count != out.count:
            return None
        if not (self._even(output_sizes, &out) and self._even(input_sizes, &a)) or out.rows != a.rows:
            return None
        if not self._goes(a.nbytes, &moves) or not self._apart(&out, &a):
            return None
        if not self._open(timeout):
            return None
        seq, nbytes = self._next, a.nbytes // self._size
        if not moves:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, ALL_TO_ALL_SINGLE, &a, -1, -1, a.count // self._size, 0, a.count):
            return None
        for rank in range(self._size):
            if moves:
                self.moves._give(rank, a.data + rank * nbytes, nbytes)
                self.moves._get(rank, out.data + rank * nbytes, nbytes)
            else:
                memcpy(out.data + rank * nbytes, self._room(rank, seq) + self._rank * nbytes, nbytes)
        if moves and not self._moved(True, -1, True, a.nbytes, (into, source)):
            return None
        return self._done((self, ALL_TO_ALL_SINGLE, output, input, None, None))

    cdef object allgather(self, outputs, input, timeout):
        cdef Given a
        cdef Given[16] parts
        cdef object source = self._view(input, False, &a)
        cdef list into
        cdef int64_t seq, digest
        cdef int rank
        cdef bint moves
        if self._is_indebted():
            return None
        if source is None or not self._goes(a.nbytes * self._size, &moves):
            return None
        into = self._views(outputs, &a, True, parts)
        if into is None:
            return None
        digest = self._digest(a.count)  # which runs bytecode: before the group is looked at
        if not self._open(timeout):
            return None
        seq = self._next
        if not moves:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(
            seq, ALLGATHER, &a, -1, -1, a.count, digest, a.count * self._size
        ):
            return None
        for rank in range(self._size):
            if moves:
                self.moves._give(rank, a.data, a.nbytes)
                self.moves._get(rank, parts[rank].data, a.nbytes)
            else:
                memcpy(parts[rank].data, self._room(rank, seq), a.nbytes)
        if moves and not self._moved(False, -1, True, a.nbytes * self._size, (into, source)):
            return None
        return self._done((self, ALLGATHER, list(outputs), input))

    cdef object gather(self, outputs, input, root, timeout):
        cdef Given a
        cdef Given[16] parts
        cdef object source = self._view(input, False, &a)
        cdef list into = None
        cdef int64_t seq
        cdef int rank
        cdef bint lands, moves
        if self._is_indebted():
            return None
        if source is None or not self._is_rank(root) or not self._goes(a.nbytes * self._size, &moves):
            return None
        lands = root == self._rank
        if lands:
            into = self._views(outputs, &a, True, parts)
            if into is None:
                return None
        if not self._open(timeout):
            return None
        seq = self._next
        if not moves:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, GATHER, &a, -1, root, a.count, 0, a.count * self._size if lands else a.count):
            return None
        for rank in range(self._size):
            if moves:
                self.moves._give(rank, a.data, a.nbytes)
                if lands:
                    self.moves._get(rank, parts[rank].data, a.nbytes)
            elif lands:
                memcpy(parts[rank].data, self._room(rank, seq), a.nbytes)
        if moves and not self._moved(False, root, False, a.nbytes * self._size, (into, source)):
            return None
        return self._done((self, GATHER, list(outputs) if lands else [], input, root))

    cdef object scatter(self, output, inputs, root, timeout):
        cdef Given out
        cdef Given[16] parts
        cdef object into = self._view(output, True, &out)
        cdef list sources = None
        cdef int64_t seq
        cdef int rank
        cdef bint gives, moves
        if self._is_indebted():
            return None
        if into is None or not self._is_rank(root) or not self._goes(out.nbytes * self._size, &moves):
            return None
        gives = root == self._rank
        if gives:
            sources = self._views(inputs, &out, False, parts)
            if sources is None:
                return None
        if not self._open(timeout):
            return None
        seq = self._next
        if gives and not moves:
            for rank in range(self._size):
                memcpy(self._room(self._rank, seq) + rank * out.nbytes, parts[rank].data, out.nbytes)
        if not self._meet(
            seq, SCATTER, &out, -1, root, out.count, 0, out.count * self._size if gives else out.count
        ):
            return None
        if not moves:
            memcpy(out.data, self._room(root, seq) + self._rank * out.nbytes, out.nbytes)
        else:
            for rank in range(self._size if gives else 0):
                self.moves._give(rank, parts[rank].data, out.nbytes)
            self.moves._get(root, out.data, out.nbytes)
            if not self._moved(True, -1, True, out.nbytes * self._size, (into, sources)):
                return None
        return self._done((self, SCATTER, output, list(inputs) if gives else [], root))

    cdef object alltoall(self, outputs, inputs, timeout):
        cdef Given first
        cdef Given[16] parts, ins
        cdef list into, sources
        cdef int64_t seq
        cdef int rank, other
        cdef bint moves
        if self._is_indebted():
            return None
        into = self._views(outputs, NULL, True, parts)
        if into is None:
            return None
        first = parts[0]
        if not self._goes(first.nbytes * self._size, &moves):
            return None
        sources = self._views(inputs, &first, False, ins)
        if sources is None:
            return None
        for rank in range(self._size):
            for other in range(self._size):
                if not self._apart(&ins[rank], &parts[other]):
                    return None
        if not self._open(timeout):
            return None
        seq = self._next
        for rank in range(0 if moves else self._size):
            memcpy(self._room(self._rank, seq) + rank * first.nbytes, ins[rank].data, first.nbytes)
        if not self._meet(seq, ALLTOALL, &ins[0], -1, -1, first.count, 0, first.count * self._size):
            return None
        for rank in range(self._size):
            if moves:
                self.moves._give(rank, ins[rank].data, first.nbytes)
                self.moves._get(rank, parts[rank].data, first.nbytes)
            else:
                memcpy(parts[rank].data, self._room(rank, seq) + self._rank * first.nbytes, first.nbytes)
        if moves and not self._moved(True, -1, True, first.nbytes * self._size, (into, sources)):
            return None
        return self._done((self, ALLTOALL, list(outputs), list(inputs)))

    def objects(self, int kind, object obj, object root, object timeout):
        """Exchange objects; return the pickles that this rank gets, as a list.

        Else return `Pieces`, what this rank gives, or None: it is for the general way, which need
        not pickle once more.
        """
        cdef bint parted = kind == SCATTER_OBJECT
        cdef bint from_root = parted or kind == BROADCAST_OBJECT
        cdef Py_ssize_t total = 0
        cdef int64_t seq
        cdef int64_t *lengths
        cdef char *at
        cdef int rank, i, own = self._rank, to = -1
        cdef list given = []
        cdef list got = []
        if self._is_indebted():
            return None
        if kind != ALLGATHER_OBJECT:
            if not self._is_rank(root):
                return None
            to = root
        if not from_root or own == to:
            if parted and not (isinstance(obj, (list, tuple)) and len(obj) == self._size):
                return None
            try:
                given = [dumps(x, -1) for x in (obj if parted else (obj,))]
            except Exception:
                return None  # the general way says what is wrong
        for piece in given:
            total += 8 + len(<bytes>piece)
        left = pickled(given) if given else None
        if not self._fits(total, False):
            return left
        if not self._open(timeout):
            return left
        seq = self._next
        lengths = <int64_t *>self._room(own, seq)
        at = <char *>lengths + 8 * len(given)
        for rank in range(len(given)):
            lengths[rank] = len(<bytes>given[rank])
            memcpy(at, <char *><bytes>given[rank], lengths[rank])
            at += lengths[rank]
        if not self._meet(seq, kind, NULL, -1, to, 0, 0, total) or self._widest(seq) > self._most:
            return left
        if kind != GATHER_OBJECT or own == to:
            for rank in range(to if from_root else 0, to + 1 if from_root else self._size):
                lengths = <int64_t *>self._room(rank, seq)
                at = <char *>lengths + 8 * (self._size if parted else 1)
                for i in range(own if parted else 0):
                    at += lengths[i]
                got.append(at[:lengths[own if parted else 0]])
        self._done((self, kind))
        return got

    # ---- what they have in common ----

    cdef list _views(self, object given, Given *like, bint write, Given *parts):
        """View the arrays of a list, one per rank: alike, and apart from each other if written."""
        cdef list found = []
        cdef object array
        cdef tuple items
        cdef int rank, other
        if type(given) is not list or self._size > LISTED:
            return None
        items = tuple(given)  # a view may run bytecode, which may change the list
        if len(items) != self._size:
            return None
        for rank in range(self._size):
            array = self._view(items[rank], write, &parts[rank])
            if array is None or parts[rank].dtype != parts[0].dtype or parts[rank].count != parts[0].count:
                return None
            if write:
                for other in range(rank):
                    if not self._apart(&parts[rank], &parts[other]):
                        return None
            if like is not NULL:
                if parts[0].dtype != like.dtype or parts[0].count != like.count:
                    return None
                if not self._apart(&parts[rank], like):
                    return None
            found.append(array)
        return found

    cdef inline bint _apart(self, Given *a, Given *b):
        return a.data + a.nbytes <= b.data or b.data + b.nbytes <= a.data

    cdef inline bint _even(self, object sizes, Given *a):
        """Return whether an array's rows are shared equally."""
        if sizes is not None and (type(sizes) is not list or sizes):
            return False
        return a.rows > 0 and a.rows % self._size == 0

    cdef inline bint _fits(self, Py_ssize_t nbytes, bint reduces):
        """The rule of inline.py: what is decided here must be decided alike there."""
        if not reduces:
            return nbytes <= self._most
        return nbytes <= self._most_reduced and (self._size < read_from or nbytes * self._size <= read_most)

    cdef inline bint _goes(self, Py_ssize_t nbytes, bint *moves):
        """Return whether a call that only moves so much goes this way, and whether through the slots."""
        moves[0] = not self._fits(nbytes, False)
        return not moves[0] or (self.moves is not None and nbytes <= self._at_once)

    cdef bint _moved(self, bint parted, int only, bint even, Py_ssize_t nbytes, object arrays):
        """Move what was noted, and return whether that is over: else it goes on the general way.

        Until then the arrays are kept, whatever strikes: peers may read them.

        Uses of the slots are numbered in the transport, by which the general way knows this one, too.
        """
        cdef int64_t number = <int64_t>self._numbering.epoch + 1
        cdef Py_ssize_t before = 0
        self._numbering.epoch = number
        self.moves._prepare(number << ROUNDS, parted, only, even, nbytes)
        while not self.moves._go():
            if self.moves._error or self.moves._done() == before:
                self.moves._left, self.moves._arrays = True, arrays
                return False
            before = self.moves._done()
        store_release(self._word(self._rank), (number << ROUNDS) + ENDED)
        return True

    cdef inline bint _is_rank(self, object root):
        return type(root) is int and 0 <= root < self._size

    cdef int64_t _digest(self, Py_ssize_t count):
        """Return the digest of the same count for each rank."""
        if count != self._counted:
            self._counted, self._counts = count, digest_of(*((count,) * self._size))
        return self._counts

    cdef inline int _op(self, object op):
        cdef int code
        for code in range(8):
            if op is ops[code]:
                return code
        return -1

    cdef inline bint _is_indebted(self):
        """Return whether a call was posted that came to nothing: this one is not its continuation."""
        if self._owed:
            self._stale = True
        return self._owed != 0

    cdef bint _open(self, object timeout) except -1:
        """Return whether the group takes calls, and nothing is under way; the number of this one is `_next` then."""
        if over or not self._mapped or active or light:
            return False
        if timeout is not None and not ((type(timeout) is float or type(timeout) is int) and timeout > 0):
            return False
        if not takes_calls(self._group_state):
            return False
        self._next = <int64_t><object>slot(self._group_state, at_seq) + 1
        # Else the board would show what the others said the first time.
        return self._next > <int64_t><object>slot(self._arrival, at_last)

    cdef inline char *_room(self, int rank, int64_t seq):
        return self._page_of(rank) + self._page + (seq & 1) * self._payload

    cdef inline Line *_line(self, int rank, int64_t seq):
        return <Line *>(self._base + rank * self._block + (seq & 1) * LINE)

    cdef inline char *_given_by(self, int rank, int64_t seq, Py_ssize_t nbytes):
        """Return where a rank gives so many bytes that are reduced."""
        return &self._line(rank, seq).data[0] if nbytes <= room_in_line else self._room(rank, seq)

    cdef inline Py_ssize_t _between(self, Py_ssize_t nbytes):
        """Return how far it is from there to the next rank's."""
        return self._block if nbytes <= room_in_line else self._stride

    cdef bint _meet(
        self, int64_t seq, int kind, Given *shown, int op, int root, int64_t count, int64_t digest, int64_t extent
    ):
        """Post this rank's record, and return whether all others' are there soon and the same.

        From here to `_done` the call is owed: the general way goes on with it.

        Args:
            shown: whose dtype and shape the record and the flight recorder have; NULL: none.
        """
        cdef int64_t dtype = -1 if shown is NULL else shown.dtype
        cdef Record *record = <Record *>(self._page_of(self._rank) + (seq & 1) * self._record)
        cdef Line *mine = self._line(self._rank, seq)
        cdef Line *line
        cdef Entry entry
        cdef uint64_t mixed = 0
        cdef int rank
        cdef double until = 0
        record.fields[0], record.fields[1], record.fields[2], record.fields[3] = kind, dtype, op, root
        record.fields[4], record.fields[5], record.fields[6], record.extent = count, digest, 0, extent
        store_release(&record.number, seq)
        for rank in range(FIELDS):
            mixed += <uint64_t>record.fields[rank] * mixers[rank]
        mine.digest, mine.extent = <int64_t>mixed, extent
        store_release(&mine.number, seq)
        self._owed, self._owed_kind = seq, kind  # until it is done
        # What can be made ready now takes no time of its own: the peers see the record meanwhile.
        entry = self._entry = entry_of(seq, kind, shown, monotonic())
        entry.count, entry.op, entry.root = count, op, root
        if is_due(entry.called):  # the general way answers them
            return False
        for rank in range(self._size):
            line = self._line(rank, seq)
            if not self._reaches(&line.number, seq, &until) or line.number != seq or line.digest != mine.digest:
                return False
        for rank in range(self._size):
            if 0 < load_acquire(&self._line(rank, seq).left) <= seq:
                return False
        return True

    cdef Py_ssize_t _widest(self, int64_t seq):
        """Return the largest extent of all ranks, which have met."""
        cdef Py_ssize_t found = 0
        cdef int rank
        for rank in range(self._size):
            found = max(found, self._line(rank, seq).extent)
        return found

    cdef object _done(self, tuple given):
        """Note that a call is over, and return its Work.

        Args:
            given: this core, the call's kind, and its arguments.
        """
        cdef Entry entry = self._entry
        cdef object work, number = entry.seq
        give_slot(self._group_state, at_seq, number)
        give_slot(self._arrival, at_last, number)
        self._owed, self._last, self._kind = 0, entry.seq, entry.kind
        if self._mapped:  # a collection of garbage may have run what closes the group
            store_release(<int64_t *>(self._page_of(self._rank) + self._finished), entry.seq)
        entry.code, entry.ended = self._placed(&entry.at), monotonic()
        self._append(entry)
        work = new_instance(work_class)
        give_slot(work, at_number, number)
        give_slot(work, at_given, given)
        return work
