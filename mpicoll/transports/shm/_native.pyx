# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, freethreading_compatible=False
"""The compiled core: a small call of a group on one node, whole, in one go.

It checks the arguments, writes the record and what rides along with it, looks at the peers'
records, reads what they gave, and enters the call in the flight recorder, in the same memory and
with the same bits as the general way does.  A call that is not for it, or whose peers are late, is
the general way's: then `None` is returned, and a record that was posted stays posted.

It runs under the interpreter's lock from end to end, runs no bytecode and looks at no signals: so
nothing can strike in the middle, and no other thread is in the engine unless it was before.
"""

from sys import modules

cimport cython
cimport numpy as cnp
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy

cdef extern from "kernels.h" nogil:
    enum:
        SUM, PROD, MIN, MAX, BAND, BOR, BXOR, LOR, LAND, LXOR
        I8, U8, I16, U16, I32, U32, I64, U64, F32, F64
    ctypedef int (*kernel)(void *, const void *, const void *, size_t)
    const size_t WIDTHS[10]
    const int OPERATORS_OF[3][8]
    kernel kernel_of(int element, int operator_)
    int fold(kernel k, char *out, const char *first, size_t stride, int arrays, size_t n, size_t width)
    void encode_f32(void *out, const void *src, size_t n, int highest)
    void encode_f64(void *out, const void *src, size_t n, int highest)
    void decode_f32(void *out, const void *src, size_t n, int highest)
    void decode_f64(void *out, const void *src, size_t n, int highest)
    void divide_f32(void *out, size_t n, int divisor)
    void divide_f64(void *out, size_t n, int divisor)
    int64_t load_acquire(const int64_t *word)
    void store_release(int64_t *word, int64_t value)
    void relax()
    double monotonic()
    int sched_yield()

cdef extern from *:
    """
    #include <frameobject.h>
    #include <structmember.h>

    /* The offset of a slot in its instances. */
    static Py_ssize_t slot_offset(PyObject *member) {
        if (!PyObject_TypeCheck(member, &PyMemberDescr_Type)) return -1;
        return ((PyMemberDescrObject *)member)->d_member->offset;
    }
    static PyObject *new_instance(PyObject *cls) { return ((PyTypeObject *)cls)->tp_alloc((PyTypeObject *)cls, 0); }
    static void give_slot(PyObject *self, Py_ssize_t offset, PyObject *value) { *(PyObject **)((char *)self + offset) = value; }

    #if PY_VERSION_HEX < 0x030B0000
    static int last_instruction(PyFrameObject *frame) { return frame->f_lasti * (int)sizeof(_Py_CODEUNIT); }
    #else
    #define last_instruction PyFrame_GetLasti
    #endif
    static PyObject *filename_of(PyCodeObject *code) { return code->co_filename; }
    """
    Py_ssize_t slot_offset(object member)
    object new_instance(object cls)
    void give_slot(object self, Py_ssize_t offset, PyObject *value)
    ctypedef struct PyFrameObject
    ctypedef struct PyCodeObject
    PyFrameObject *PyEval_GetFrame()
    PyFrameObject *PyFrame_GetBack(PyFrameObject *frame)
    PyCodeObject *PyFrame_GetCode(PyFrameObject *frame)
    int last_instruction(PyFrameObject *frame)
    PyObject *filename_of(PyCodeObject *code)
    void Py_DECREF(void *thing)

cnp.import_array()

cdef enum:
    PLAIN, DIVIDED, ORDERED  # what is done to the elements before and after they are reduced

cdef struct Plan:
    kernel reduce
    int how
    int element
    int highest

cdef enum:
    DTYPES = 24  # NumPy's own, which have low numbers

cdef Plan[24][8] plans  # by NumPy's number of the dtype, and by operator
cdef enum:
    AVG = 1  # ReduceOp's code of it
    TURN = 16  # chunks after which others have their turn
    LISTED = 16  # ranks up to which lists of arrays are looked through here
    # The codes of the calls, as in the records.
    ALLREDUCE = 0, BROADCAST, REDUCE, BARRIER, ALLGATHER, ALL_GATHER_SINGLE, GATHER, SCATTER
    REDUCE_SCATTER, REDUCE_SCATTER_SINGLE, ALLTOALL, ALL_TO_ALL_SINGLE, SCAN = 16, EXSCAN


cdef void lay(int number, int element, int of):
    cdef int op, operator_
    for op in range(8):
        operator_ = OPERATORS_OF[of][op]
        if operator_ < 0:
            continue
        plans[number][op].element = element
        plans[number][op].how = PLAIN
        if element >= F32 and (operator_ == MIN or operator_ == MAX):
            plans[number][op].how = ORDERED
            plans[number][op].highest = operator_ == MAX
            plans[number][op].reduce = kernel_of(I32 if element == F32 else I64, operator_)
            continue
        if op == AVG:
            plans[number][op].how = DIVIDED
        plans[number][op].reduce = kernel_of(element, operator_)


def lay_all():
    elements = {"i1": I8, "u1": U8, "i2": I16, "u2": U16, "i4": I32, "u4": U32, "i8": I64, "u8": U64}
    for number in range(cnp.NPY_BYTE, cnp.NPY_ULONGLONG + 1):
        lay(number, elements[cnp.PyArray_DescrFromType(number).str[1:]], 0)
    lay(cnp.NPY_BOOL, U8, 1)
    lay(cnp.NPY_FLOAT, F32, 2)
    lay(cnp.NPY_DOUBLE, F64, 2)


lay_all()

cdef bint over = False  # this process is no rank any more


def cease():
    """Leave all calls to the general way from now on: this process is forked, or at its end."""
    global over
    over = True


cdef struct Record:
    int64_t[9] fields  # number, kind, dtype, op, root, count, digest, state, extent


cdef class Node:
    """A group's shared memory, as its ranks of one node have it.

    Args:
        memory: the mapping.
        layout: rank, size; bytes per rank, of its page, of a record, of room for a payload, of a
            slot; where in its part lie its flag, what it has left and what it has finished.
        crowded: the ranks share cores: a peer needs this one.
    """

    cdef object __weakref__
    cdef char *_base
    cdef Py_buffer _buffer
    cdef bint _mapped, _crowded
    cdef int _rank, _size
    cdef Py_ssize_t _stride, _page, _record, _payload, _slot, _flag, _left, _finished
    cdef double _patience  # seconds for which a peer is waited for here

    def __cinit__(self, memory, layout, crowded, *args, **kwargs):
        self._mapped = False
        PyObject_GetBuffer(memory, &self._buffer, PyBUF_WRITABLE)
        self._mapped = True
        self._base = <char *>self._buffer.buf
        (
            self._rank, self._size, self._stride, self._page, self._record, self._payload, self._slot, self._flag,
            self._left, self._finished,
        ) = layout
        self._crowded = crowded
        self._patience = 100e-6 if crowded else 30e-6

    def __dealloc__(self):
        self._let_go()

    cdef void _let_go(self):
        if self._mapped:
            self._mapped = False
            PyBuffer_Release(&self._buffer)

    def close(self):
        """Let go of the memory: no call goes this way any more."""
        self._let_go()

    cdef inline bint _reaches(self, int64_t *word, int64_t value, double *until) noexcept nogil:
        """Wait until a word is at least a value, and return whether it is; for a moment in all."""
        cdef int looks = 0
        while load_acquire(word) < value:
            looks += 1
            if looks & 63:
                relax()
                continue
            if until[0] == 0:
                until[0] = monotonic() + self._patience
            elif monotonic() > until[0]:
                return False
            if self._crowded:
                sched_yield()
        return True


@cython.final
cdef class Chunks(Node):
    """What reduces large arrays chunk by chunk, in slots that alternate; see transport.py."""

    cdef int64_t[24] _codes
    cdef char *_scratch

    def __init__(self, memory, layout, crowded, codes):
        cdef int number
        for number in range(DTYPES):
            self._codes[number] = codes.get(number, -1)
        self._scratch = <char *>malloc(2 * (self._slot // self._size + 64))

    def __dealloc__(self):
        free(self._scratch)

    def knows(self, cnp.ndarray array, int64_t dtype, int op):
        """Return whether an array's elements can be reduced here."""
        cdef int number = cnp.PyArray_TYPE(array)
        return (
            self._mapped and 0 <= number < DTYPES and self._codes[number] == dtype and 0 <= op < 8
            and plans[number][op].reduce is not NULL and cnp.PyArray_ISCARRAY(array)
        )

    cdef inline char *_of(self, int rank, Py_ssize_t c) noexcept nogil:
        return self._base + rank * self._stride + self._page + 2 * self._payload + (c & 1) * self._slot

    cdef inline int64_t *_word(self, int rank) noexcept nogil:
        return <int64_t *>(self._base + rank * self._stride + self._flag)

    cdef inline bint _all_reach(self, int64_t value) noexcept nogil:
        cdef double until = 0
        cdef int rank
        for rank in range(self._size):
            if not self._reaches(self._word(rank), value, &until):
                return False
        return True

    def fold(self, int64_t flag, cnp.ndarray array, int op, int upto, Py_ssize_t c):
        """Reduce the first ranks' arrays in place, from chunk `c` on; return how far it came.

        The chunk that it came to is to be done once more, from its begin: a peer is late, or a
        result is NaN; or it has come far enough for others to have their turn.
        """
        cdef Plan *plan = &plans[cnp.PyArray_TYPE(array)][op]
        cdef size_t width = WIDTHS[plan.element]
        cdef Py_ssize_t room = self._slot // width, count = cnp.PyArray_SIZE(array), last = c + TURN, n
        cdef char *data = <char *>cnp.PyArray_DATA(array)
        cdef char *here
        with nogil:
            while c * room < count and c < last:
                here = data + c * room * width
                n = min(room, count - c * room)
                if plan.how == ORDERED:
                    encode(plan, self._of(self._rank, c), here, n)
                else:
                    memcpy(self._of(self._rank, c), here, n * width)
                store_release(self._word(self._rank), flag + c + 1)
                if not self._all_reach(flag + c + 1):
                    break
                if upto:
                    if fold(plan.reduce, here, self._of(0, c), self._stride, upto, n, width):
                        memcpy(here, self._of(self._rank, c), n * width)
                        break
                    finish(plan, here, n, self._size)
                c += 1
        return c

    def share(self, int64_t flag, cnp.ndarray array, int op, Py_ssize_t half):
        """Have each rank reduce its part of each chunk, and gather the parts; return how far it came.

        Half 2c of chunk c ends when all have written theirs, half 2c + 1 when all have reduced
        their parts and those are gathered.  A half that it came to is to be done once more.
        """
        cdef Plan *plan = &plans[cnp.PyArray_TYPE(array)][op]
        cdef size_t width = WIDTHS[plan.element]
        cdef Py_ssize_t room = self._slot // width, count = cnp.PyArray_SIZE(array), last = half + 2 * TURN
        cdef Py_ssize_t c, n, low, high
        cdef char *data = <char *>cnp.PyArray_DATA(array)
        cdef char *here
        cdef char *mine
        cdef int rank
        with nogil:
            while (half >> 1) * room < count and half < last:
                c = half >> 1
                here = data + c * room * width
                n = min(room, count - c * room)
                mine = self._of(self._rank, c)
                if not half & 1:
                    memcpy(mine, here, n * width)
                    store_release(self._word(self._rank), flag + half + 1)
                    if not self._all_reach(flag + half + 1):
                        break
                    low, high = part_begin(n, self._rank, self._size), part_begin(n, self._rank + 1, self._size)
                    if not self._reduce_part(plan, c, low * width, high - low):
                        break
                    memcpy(mine + low * width, self._scratch, (high - low) * width)
                    half += 1
                    store_release(self._word(self._rank), flag + half + 1)
                if not self._all_reach(flag + half + 1):
                    break
                for rank in range(self._size):
                    low, high = part_begin(n, rank, self._size), part_begin(n, rank + 1, self._size)
                    memcpy(here + low * width, self._of(rank, c) + low * width, (high - low) * width)
                half += 1
        return half

    cdef bint _reduce_part(self, Plan *plan, Py_ssize_t c, Py_ssize_t at, Py_ssize_t n) noexcept nogil:
        """Reduce a part of all slots into the scratch; return whether that is done."""
        cdef char *spare = self._scratch + self._slot // self._size + 64
        cdef int rank
        if plan.how != ORDERED:
            if fold(plan.reduce, self._scratch, self._of(0, c) + at, self._stride, self._size, n, WIDTHS[plan.element]):
                return False
        else:
            encode(plan, self._scratch, self._of(0, c) + at, n)
            for rank in range(1, self._size):
                encode(plan, spare, self._of(rank, c) + at, n)
                plan.reduce(self._scratch, self._scratch, spare, n)
        finish(plan, self._scratch, n, self._size)
        return True


cdef inline Py_ssize_t part_begin(Py_ssize_t n, int rank, int size) noexcept nogil:
    return n * rank // size


cdef inline void encode(Plan *plan, char *room, const void *data, Py_ssize_t count) noexcept nogil:
    """Write elements as they are reduced."""
    if plan.how != ORDERED:
        memcpy(room, data, count * WIDTHS[plan.element])
    elif plan.element == F32:
        encode_f32(room, data, count, plan.highest)
    else:
        encode_f64(room, data, count, plan.highest)


cdef inline void finish(Plan *plan, char *out, Py_ssize_t count, int size) noexcept nogil:
    """Make of reduced elements what the user gets."""
    if plan.how == DIVIDED:
        if plan.element == F32:
            divide_f32(out, count, size)
        else:
            divide_f64(out, count, size)
    elif plan.how == ORDERED:
        if plan.element == F32:
            decode_f32(out, out, count, plan.highest)
        else:
            decode_f64(out, out, count, plan.highest)


@cython.final
cdef class Core(Node):
    """What carries out the small calls of one group.

    Args:
        read: bytes that a rank reduces alone, at most.
        kinds: the calls' names, in the order of their codes; dtypes: ours by NumPy's number; ops: in their order.
        engine, lane, arrival, ring: what is looked at and kept up to date.
        work: the class of calls that are over; checks: what makes a checked call of what it was
            given, by name.
        ours: whether a file of code is the library's; digest: condenses the counts of all ranks.
    """

    cdef Py_ssize_t _read
    cdef object _lane, _engine, _poll, _arrival, _work, _tensor, _ours, _digests, _append
    cdef dict _active
    cdef tuple _ops, _names
    cdef list _dtypes, _checks
    cdef int64_t[24] _codes
    cdef int64_t _counted, _counts
    cdef Py_ssize_t _at_seq, _at_given
    cdef object _code  # the user's code that called last
    cdef int64_t _owed, _owed_kind, _last, _kind
    cdef bint _stale

    def __init__(
        self, memory, layout, crowded, read, kinds, dtypes, ops, engine, lane, arrival, ring, work, checks, ours, digest
    ):
        cdef int number
        self._read = read
        self._names = tuple(kinds)
        self._dtypes = [dtypes.get(number) for number in range(DTYPES)]
        for number in range(DTYPES):
            self._codes[number] = -1 if number not in dtypes else dtypes[number].code
        self._ops = tuple(ops)
        self._engine, self._lane, self._arrival = engine, lane, arrival
        self._checks = [checks.get(kind) for kind in kinds]
        self._active, self._poll = engine._active, engine._poll
        self._append = ring.append
        self._work, self._ours, self._digests = work, ours, digest
        self._counted = -1
        self._at_seq = slot_offset(work.seq)
        self._at_given = slot_offset(work._given)

    @property
    def owed(self):
        """The number of a call that was posted and left to the general way; 0: none."""
        return self._owed

    @property
    def finished(self):
        """Kind and number of the last call that went this way."""
        return (self._names[self._kind], self._last) if self._last else ("", 0)

    def take_over(self, kind):
        """Return the number of the call that was posted; 0 if that call came to nothing.

        An exception struck before the general way had it, and this is another call.
        """
        seq = self._owed
        self._owed = 0
        stale = self._stale or self._names[self._owed_kind] != kind
        self._stale = False
        return 0 if stale else seq

    # ---- the calls: None where one is not for this way ----

    def allreduce(self, tensor, op, timeout):
        return self._reducing(ALLREDUCE, tensor, op, timeout, -1, self._size, (tensor, op))

    def reduce(self, tensor, root, op, timeout):
        if not self._is_rank(root):
            return None
        return self._reducing(REDUCE, tensor, op, timeout, root, self._size, (tensor, root, op))

    def scan(self, tensor, op, timeout):
        return self._reducing(SCAN, tensor, op, timeout, -1, self._rank + 1, (tensor, op))

    def exscan(self, tensor, op, timeout):
        return self._reducing(EXSCAN, tensor, op, timeout, -1, self._rank, (tensor, op))

    cdef object _reducing(self, int kind, object tensor, object op, object timeout, int root, int upto, tuple given):
        """Reduce what the first ranks give, into the array itself."""
        cdef bint lands = root < 0 or root == self._rank
        cdef cnp.ndarray array = self._array(tensor, lands)
        cdef Plan *plan = self._plan(array, op)
        cdef int64_t seq
        cdef Py_ssize_t count
        cdef int code
        cdef double now
        if plan is NULL or not self._fits(cnp.PyArray_NBYTES(array), True):
            return None
        code = self._op(op)
        if code == AVG and (kind == SCAN or kind == EXSCAN):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count = self._lane.seq + 1, cnp.PyArray_SIZE(array)
        encode(plan, self._room(self._rank, seq), <void *>cnp.PyArray_DATA(array), count)
        if not self._meet(seq, kind, self._code_of(array), code, root, count, 0, count):
            return None
        if lands and upto and not self._fold(plan, seq, <char *>cnp.PyArray_DATA(array), 0, count, upto):
            return self._undo(seq, kind, array)
        return self._done(seq, kind, array, count, op, root, now, given)

    def reduce_scatter_single(self, output, input, op, timeout):
        cdef cnp.ndarray out = self._array(output, True)
        cdef cnp.ndarray source = self._array(input, False)
        cdef Plan *plan = self._plan(source, op)
        cdef int64_t seq
        cdef Py_ssize_t count
        cdef double now
        if plan is NULL or not self._pair(out, source) or not self._fits(cnp.PyArray_NBYTES(source), True):
            return None
        count = cnp.PyArray_SIZE(out)
        if cnp.PyArray_SIZE(source) != count * self._size or not self._apart(out, source, source):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._lane.seq + 1
        encode(plan, self._room(self._rank, seq), <void *>cnp.PyArray_DATA(source), count * self._size)
        if not self._meet(
            seq, REDUCE_SCATTER_SINGLE, self._code_of(out), self._op(op), -1, count, 0, count * self._size
        ):
            return None
        if not self._fold(plan, seq, <char *>cnp.PyArray_DATA(out), self._rank * count, count, self._size):
            if not self._apart(out, source, None):
                self._undo(seq, REDUCE_SCATTER_SINGLE, source)
            self._owe(seq, REDUCE_SCATTER_SINGLE)
            return None
        return self._done(seq, REDUCE_SCATTER_SINGLE, source, count, op, -1, now, (output, input, op))

    def reduce_scatter(self, output, input, op, timeout):
        cdef cnp.ndarray out = self._array(output, True)
        cdef cnp.ndarray part
        cdef list sources = self._arrays(input, out, False)
        cdef Plan *plan = self._plan(out, op)
        cdef int64_t seq
        cdef Py_ssize_t count
        cdef char *mine
        cdef int rank
        cdef double now
        if plan is NULL or sources is None or not self._fits(cnp.PyArray_NBYTES(out) * self._size, True):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count = self._lane.seq + 1, cnp.PyArray_SIZE(out)
        mine = self._room(self._rank, seq)
        for rank in range(self._size):
            part = sources[rank]
            encode(plan, mine + rank * cnp.PyArray_NBYTES(out), <void *>cnp.PyArray_DATA(part), count)
        if not self._meet(
            seq, REDUCE_SCATTER, self._code_of(out), self._op(op), -1, count, self._digest(count), count * self._size
        ):
            return None
        if not self._fold(plan, seq, <char *>cnp.PyArray_DATA(out), self._rank * count, count, self._size):
            self._owe(seq, REDUCE_SCATTER)
            return None
        return self._done(seq, REDUCE_SCATTER, sources[0], count, op, -1, now, (output, input, op))

    def barrier(self, timeout):
        cdef double now = self._open(timeout)
        cdef int64_t seq
        if now == 0:
            return None
        seq = self._lane.seq + 1
        if not self._meet(seq, BARRIER, -1, -1, -1, 0, 0, 0):
            return None
        return self._done(seq, BARRIER, None, 0, None, -1, now, ())

    def broadcast(self, tensor, root, timeout):
        cdef cnp.ndarray array
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef double now
        if not self._is_rank(root):
            return None
        array = self._array(tensor, root != self._rank)
        if array is None or not self._fits(cnp.PyArray_NBYTES(array), False):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count, nbytes = self._lane.seq + 1, cnp.PyArray_SIZE(array), cnp.PyArray_NBYTES(array)
        if root == self._rank:
            memcpy(self._room(self._rank, seq), cnp.PyArray_DATA(array), nbytes)
        if not self._meet(seq, BROADCAST, self._code_of(array), -1, root, count, 0, count):
            return None
        if root != self._rank:
            memcpy(cnp.PyArray_DATA(array), self._room(root, seq), nbytes)
        return self._done(seq, BROADCAST, array, count, None, root, now, (tensor, root))

    def all_gather_single(self, output, input, timeout):
        cdef cnp.ndarray out = self._array(output, True)
        cdef cnp.ndarray source = self._array(input, False)
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef int rank
        cdef char *into
        cdef double now
        if not self._pair(out, source) or not self._fits(cnp.PyArray_NBYTES(out), False):
            return None
        count, nbytes = cnp.PyArray_SIZE(source), cnp.PyArray_NBYTES(source)
        if cnp.PyArray_SIZE(out) != count * self._size or not self._apart(out, source, out):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._lane.seq + 1
        memcpy(self._room(self._rank, seq), cnp.PyArray_DATA(source), nbytes)
        if not self._meet(seq, ALL_GATHER_SINGLE, self._code_of(out), -1, -1, count, 0, count * self._size):
            return None
        into = <char *>cnp.PyArray_DATA(out)
        for rank in range(self._size):
            memcpy(into + rank * nbytes, self._room(rank, seq), nbytes)
        return self._done(seq, ALL_GATHER_SINGLE, source, count, None, -1, now, (output, input))

    def all_to_all_single(self, output, input, output_sizes, input_sizes, timeout):
        """Where the rows are shared equally."""
        cdef cnp.ndarray out = self._array(output, True)
        cdef cnp.ndarray source = self._array(input, False)
        cdef Py_ssize_t count, nbytes, rows
        cdef int64_t seq
        cdef int rank
        cdef char *into
        cdef double now
        if not (self._even(output_sizes) and self._even(input_sizes)):
            return None
        if not self._pair(out, source) or not self._fits(cnp.PyArray_NBYTES(out), False):
            return None
        if cnp.PyArray_NDIM(out) < 1 or cnp.PyArray_NDIM(source) < 1 or cnp.PyArray_SIZE(out) != cnp.PyArray_SIZE(source):
            return None
        rows = cnp.PyArray_DIM(out, 0)
        if rows != cnp.PyArray_DIM(source, 0) or rows % self._size or not self._apart(out, source, None):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count = self._lane.seq + 1, cnp.PyArray_SIZE(out) // self._size
        nbytes = cnp.PyArray_NBYTES(out) // self._size
        memcpy(self._room(self._rank, seq), cnp.PyArray_DATA(source), nbytes * self._size)
        if not self._meet(seq, ALL_TO_ALL_SINGLE, self._code_of(out), -1, -1, count, 0, count * self._size):
            return None
        into = <char *>cnp.PyArray_DATA(out)
        for rank in range(self._size):
            memcpy(into + rank * nbytes, self._room(rank, seq) + self._rank * nbytes, nbytes)
        return self._done(seq, ALL_TO_ALL_SINGLE, source, count, None, -1, now, (output, input, None, None))

    def allgather(self, outputs, input, timeout):
        cdef cnp.ndarray source = self._array(input, False)
        cdef list into = self._arrays(outputs, source, True)
        cdef cnp.ndarray part
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef int rank
        cdef double now
        if into is None:
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count, nbytes = self._lane.seq + 1, cnp.PyArray_SIZE(source), cnp.PyArray_NBYTES(source)
        memcpy(self._room(self._rank, seq), cnp.PyArray_DATA(source), nbytes)
        if not self._meet(
            seq, ALLGATHER, self._code_of(source), -1, -1, count, self._digest(count), count * self._size
        ):
            return None
        for rank in range(self._size):
            part = into[rank]
            memcpy(cnp.PyArray_DATA(part), self._room(rank, seq), nbytes)
        return self._done(seq, ALLGATHER, source, count, None, -1, now, (outputs, input))

    def gather(self, outputs, input, root, timeout):
        cdef cnp.ndarray source = self._array(input, False)
        cdef list into = None
        cdef cnp.ndarray part
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef int rank
        cdef bint lands
        cdef double now
        if source is None or not self._is_rank(root) or not self._fits(cnp.PyArray_NBYTES(source) * self._size, False):
            return None
        lands = root == self._rank
        if lands:
            into = self._arrays(outputs, source, True)
            if into is None:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count, nbytes = self._lane.seq + 1, cnp.PyArray_SIZE(source), cnp.PyArray_NBYTES(source)
        memcpy(self._room(self._rank, seq), cnp.PyArray_DATA(source), nbytes)
        if not self._meet(
            seq, GATHER, self._code_of(source), -1, root, count, 0, count * self._size if lands else count
        ):
            return None
        if lands:
            for rank in range(self._size):
                part = into[rank]
                memcpy(cnp.PyArray_DATA(part), self._room(rank, seq), nbytes)
        return self._done(seq, GATHER, source, count, None, root, now, (outputs, input, root))

    def scatter(self, output, inputs, root, timeout):
        cdef cnp.ndarray out = self._array(output, True)
        cdef list sources = None
        cdef cnp.ndarray part
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef int rank
        cdef bint gives
        cdef double now
        if out is None or not self._is_rank(root) or not self._fits(cnp.PyArray_NBYTES(out) * self._size, False):
            return None
        gives = root == self._rank
        if gives:
            sources = self._arrays(inputs, out, False)
            if sources is None:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count, nbytes = self._lane.seq + 1, cnp.PyArray_SIZE(out), cnp.PyArray_NBYTES(out)
        if gives:
            for rank in range(self._size):
                part = sources[rank]
                memcpy(self._room(self._rank, seq) + rank * nbytes, cnp.PyArray_DATA(part), nbytes)
        if not self._meet(seq, SCATTER, self._code_of(out), -1, root, count, 0, count * self._size if gives else count):
            return None
        memcpy(cnp.PyArray_DATA(out), self._room(root, seq) + self._rank * nbytes, nbytes)
        return self._done(seq, SCATTER, out, count, None, root, now, (output, inputs, root))

    def alltoall(self, outputs, inputs, timeout):
        cdef list into, sources
        cdef cnp.ndarray part, first
        cdef Py_ssize_t count, nbytes
        cdef int64_t seq
        cdef int rank
        cdef double now
        if type(outputs) is not list or not outputs:
            return None
        first = self._array(outputs[0], True)
        sources = self._arrays(inputs, first, False)
        if sources is None:
            return None
        for part in sources:
            into = self._arrays(outputs, part, True)
            if into is None:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, count, nbytes = self._lane.seq + 1, cnp.PyArray_SIZE(first), cnp.PyArray_NBYTES(first)
        for rank in range(self._size):
            part = sources[rank]
            memcpy(self._room(self._rank, seq) + rank * nbytes, cnp.PyArray_DATA(part), nbytes)
        if not self._meet(seq, ALLTOALL, self._code_of(first), -1, -1, count, 0, count * self._size):
            return None
        for rank in range(self._size):
            part = into[rank]
            memcpy(cnp.PyArray_DATA(part), self._room(rank, seq) + self._rank * nbytes, nbytes)
        return self._done(seq, ALLTOALL, sources[0], count, None, -1, now, (outputs, inputs))

    # ---- what they have in common ----

    cdef cnp.ndarray _array(self, object given, bint write):
        """Return a plain array over what was given, or None."""
        cdef cnp.ndarray array
        if type(given) is cnp.ndarray:
            array = given
        elif self._is_tensor(given):
            try:
                array = given.numpy()
            except Exception:  # its dtype, its device, its gradient: the general way says what of it
                return None
        else:
            return None
        if not cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_TYPE(array) >= DTYPES or cnp.PyArray_SIZE(array) == 0:
            return None
        if self._codes[cnp.PyArray_TYPE(array)] < 0 or (write and not cnp.PyArray_ISWRITEABLE(array)):
            return None
        return array

    cdef bint _is_tensor(self, object given):
        if self._tensor is None:
            torch = modules.get("torch")
            self._tensor = getattr(torch, "Tensor", None)  # it may be half imported
        return self._tensor is not None and type(given) is self._tensor

    cdef list _arrays(self, object given, cnp.ndarray like, bint write):
        """Return the arrays of a list, one per rank, each like another and apart from it and each other."""
        cdef cnp.ndarray array, other
        cdef list found = []
        cdef int rank
        if type(given) is not list or len(<list>given) != self._size or self._size > LISTED or like is None:
            return None
        if not self._fits(cnp.PyArray_NBYTES(like) * self._size, False):
            return None
        for rank in range(self._size):
            array = self._array((<list>given)[rank], write)
            if not self._pair(array, like) or cnp.PyArray_SIZE(array) != cnp.PyArray_SIZE(like):
                return None
            if not self._apart(array, like, None):
                return None
            if write:
                for other in found:
                    if not self._apart(array, other, None):
                        return None
            found.append(array)
        return found

    cdef inline bint _pair(self, cnp.ndarray a, cnp.ndarray b):
        return a is not None and b is not None and self._code_of(a) == self._code_of(b)

    cdef inline bint _apart(self, cnp.ndarray a, cnp.ndarray b, cnp.ndarray whole):
        """Return whether two arrays share no memory, or one is this rank's own part of the whole."""
        cdef char *first = <char *>cnp.PyArray_DATA(a)
        cdef char *second = <char *>cnp.PyArray_DATA(b)
        cdef cnp.ndarray part
        if first + cnp.PyArray_NBYTES(a) <= second or second + cnp.PyArray_NBYTES(b) <= first:
            return True
        if whole is None:
            return False
        part = b if whole is a else a
        return <char *>cnp.PyArray_DATA(part) == <char *>cnp.PyArray_DATA(whole) + self._rank * cnp.PyArray_NBYTES(part)

    cdef inline bint _fits(self, Py_ssize_t nbytes, bint reduces):
        """The rule of inline.py: what is decided here must be decided alike there."""
        return nbytes <= self._payload and (not reduces or nbytes * self._size <= self._read)

    cdef inline bint _even(self, object sizes):
        return sizes is None or (type(sizes) is list and not sizes)

    cdef inline bint _is_rank(self, object root):
        return type(root) is int and 0 <= root < self._size

    cdef inline int64_t _code_of(self, cnp.ndarray array):
        return self._codes[cnp.PyArray_TYPE(array)]

    cdef int64_t _digest(self, Py_ssize_t count):
        """Return the digest of the same count for each rank."""
        if count != self._counted:
            self._counted, self._counts = count, self._digests(*((count,) * self._size))
        return self._counts

    cdef inline int _op(self, object op):
        cdef int code
        for code in range(8):
            if op is self._ops[code]:
                return code
        return -1

    cdef inline Plan *_plan(self, cnp.ndarray array, object op):
        """Return how an array is reduced; NULL: not here."""
        cdef int code = self._op(op)
        cdef Plan *plan
        if array is None or code < 0:
            return NULL
        plan = &plans[cnp.PyArray_TYPE(array)][code]
        return NULL if plan.reduce is NULL else plan

    cdef double _open(self, object timeout) except -1:
        """Return the time if the group takes calls, and nothing is under way; else 0."""
        cdef double now, due
        if over or not self._mapped or self._active:
            return 0
        if self._owed:
            self._stale = True
            return 0
        if timeout is not None and not ((type(timeout) is float or type(timeout) is int) and timeout > 0):
            return 0
        if self._engine._struck or self._lane.broken is not None or self._lane.closed or self._lane.failures:
            return 0
        now, due = monotonic(), self._poll.next
        return 0 if now >= due else now  # peers' questions are to be answered

    cdef inline char *_room(self, int rank, int64_t seq):
        return self._base + rank * self._stride + self._page + (seq & 1) * self._payload

    cdef inline bint _fold(self, Plan *plan, int64_t seq, char *out, Py_ssize_t start, Py_ssize_t count, int upto):
        """Reduce what the first ranks gave, from an element on; return whether it is done.

        Not where a result is NaN: the general way does that once more, so that all ranks have one.
        """
        cdef size_t width = WIDTHS[plan.element]
        if fold(plan.reduce, out, self._room(0, seq) + start * width, self._stride, upto, count, width):
            return False
        finish(plan, out, count, self._size)
        return True

    cdef object _undo(self, int64_t seq, int kind, cnp.ndarray given):
        """Leave a call to the general way, with the array that was given as it was."""
        memcpy(cnp.PyArray_DATA(given), self._room(self._rank, seq), cnp.PyArray_NBYTES(given))
        self._owe(seq, kind)

    cdef bint _meet(
        self, int64_t seq, int kind, int64_t dtype, int64_t op, int64_t root, int64_t count, int64_t digest, int64_t extent
    ):
        """Post this rank's record, and return whether all others' are there soon and the same."""
        cdef char *own = self._base + self._rank * self._stride
        cdef Py_ssize_t at = (seq & 1) * self._record
        cdef Record *mine = <Record *>(own + at)
        cdef Record *theirs
        cdef int64_t left
        cdef int rank
        cdef double until = 0
        mine.fields[1], mine.fields[2], mine.fields[3], mine.fields[4] = kind, dtype, op, root
        mine.fields[5], mine.fields[6], mine.fields[7], mine.fields[8] = count, digest, 0, extent
        store_release(&mine.fields[0], seq)
        for rank in range(self._size):
            theirs = <Record *>(self._base + rank * self._stride + at)
            if not self._reaches(&theirs.fields[0], seq, &until) or theirs.fields[0] != seq:
                return self._owe(seq, kind)
            if memcmp(&theirs.fields[1], &mine.fields[1], 56):  # all but the extent, which follows from it
                return self._owe(seq, kind)
        for rank in range(self._size):
            left = load_acquire(<int64_t *>(self._base + rank * self._stride + self._left))
            if 0 < left <= seq:
                return self._owe(seq, kind)
        return True

    cdef bint _owe(self, int64_t seq, int kind):
        self._owed, self._owed_kind = seq, kind
        return False

    cdef object _done(
        self, int64_t seq, int kind, cnp.ndarray array, int64_t count, object op, int root, double now, tuple given
    ):
        """Note that a call is over, and return its Work."""
        cdef PyFrameObject *frame
        cdef PyFrameObject *back
        cdef PyCodeObject *code
        cdef int at = 0
        cdef object work, place = None
        cdef object called = now, number_of = seq
        self._last, self._kind = seq, kind
        self._lane.seq = number_of
        self._arrival._last = number_of
        store_release(<int64_t *>(self._base + self._rank * self._stride + self._finished), seq)
        frame = PyEval_GetFrame()  # the group's method
        if frame is not NULL:
            frame = PyFrame_GetBack(frame)
        while frame is not NULL:
            code = PyFrame_GetCode(frame)
            if <PyObject *>code is <PyObject *>self._code or not self._ours[<object>filename_of(code)]:
                at = last_instruction(frame)
                place = <object>code
                self._code = place
                Py_DECREF(code)
                Py_DECREF(frame)
                break
            Py_DECREF(code)
            back = PyFrame_GetBack(frame)
            Py_DECREF(frame)
            frame = back
        self._append([
            number_of, self._names[kind], None if array is None else self._dtypes[cnp.PyArray_TYPE(array)],
            count, None if array is None else (<object>array).shape, op, root, -1, 0,
            called, monotonic(), None, place, at,
        ])
        work = new_instance(self._work)
        Py_INCREF(number_of)
        give_slot(work, self._at_seq, <PyObject *>number_of)
        place = (self._checks[kind], given)
        Py_INCREF(place)
        give_slot(work, self._at_given, <PyObject *>place)
        return work
