# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled core: a small call of a group on one node, whole, in one go; large reductions in chunks.

It does the same as the general way, in the same memory and with the same bits, so the two can meet
in one call.  `Core` checks the arguments, writes the record and what rides along with it, looks at
the peers' records, reads what they gave, and enters the call in the flight recorder.  A call that is
not for it, or whose peers are late, is the general way's: then it returns None, and a record that
was posted stays posted.

A `Core` runs under the interpreter's lock from end to end, runs no bytecode but a tensor's `numpy`,
before anything is posted, and looks at no signals: so nothing can strike in the middle, and no other
thread is in the engine unless it was before.
"""

from pickle import dumps
from sys import modules

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport int16_t, int32_t, int64_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy

cdef extern from "kernels.h" nogil:
    enum:
        DTYPES
        AVG_OP
    ctypedef struct plan:
        size_t width, wire
    void lay_plans()
    const plan *plan_of(int64_t dtype, int op)
    void encode(const plan *p, char *out, const void *src, size_t n)
    int fold(const plan *p, char *out, const char *first, size_t stride, int arrays, size_t n, int ranks, int encoded, int own)
    int64_t load_acquire(const int64_t *word)
    void store_release(int64_t *word, int64_t value)
    void relax()
    double monotonic()
    int sched_yield()

cdef extern from *:
    """
    #include <frameobject.h>
    #include <structmember.h>

    /* The offset of a slot in the instances of its class. */
    static Py_ssize_t slot_offset(PyObject *member) {
        if (!PyObject_TypeCheck(member, &PyMemberDescr_Type)) return -1;
        return ((PyMemberDescrObject *)member)->d_member->offset;
    }
    static PyObject *new_instance(PyObject *cls) { return ((PyTypeObject *)cls)->tp_alloc((PyTypeObject *)cls, 0); }
    static void give_slot(PyObject *self, Py_ssize_t offset, PyObject *value) {
        Py_INCREF(value);
        *(PyObject **)((char *)self + offset) = value;
    }

    #if PY_VERSION_HEX < 0x030B0000
    static int last_instruction(PyFrameObject *frame) { return frame->f_lasti * (int)sizeof(_Py_CODEUNIT); }
    #else
    #define last_instruction PyFrame_GetLasti
    #endif
    static PyObject *filename_of(PyCodeObject *code) { return code->co_filename; }
    """
    Py_ssize_t slot_offset(object member)
    object new_instance(object cls)
    void give_slot(object self, Py_ssize_t offset, object value)
    ctypedef struct PyFrameObject
    ctypedef struct PyCodeObject
    PyFrameObject *PyEval_GetFrame()
    PyFrameObject *PyFrame_GetBack(PyFrameObject *frame)
    PyCodeObject *PyFrame_GetCode(PyFrameObject *frame)
    int last_instruction(PyFrameObject *frame)
    PyObject *filename_of(PyCodeObject *code)
    void Py_DECREF(void *thing)
    int PyUnicode_Tailmatch(str text, str part, Py_ssize_t start, Py_ssize_t end, int direction)
    Py_ssize_t MOST "PY_SSIZE_T_MAX"

cdef extern from *:
    """
    /* The part of DLPack's interface between libraries of C that is used here (dlpack.h 1.3). */
    typedef struct {
        void *data;
        int32_t device_type, device_id, ndim;
        uint8_t code, bits;
        uint16_t lanes;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } Borrowed;
    typedef struct {
        uint32_t major, minor;
        void *before;
        void *allocate, *from_object, *to_object;
        int (*borrow)(void *object, Borrowed *out);
    } Exchange;
    """
    ctypedef struct Borrowed:
        char *data
        int device_type, ndim, code, bits, lanes
        int64_t *shape
        int64_t *strides
        size_t byte_offset
    ctypedef struct Exchange:
        int major
        int (*borrow)(void *object, Borrowed *out)

cnp.import_array()
lay_plans()

cdef enum:
    NUMBERS = 24  # NumPy's numbers of its own dtypes are lower
    BFLOAT16 = 17  # our code of it
    ON_CPU = 1  # DLPack's numbers
    BFLOAT = 4
    COMPLEX = 5
    TURN = 16  # chunks after which others have their turn
    LISTED = 16  # ranks up to which lists of arrays are looked through here
    # The codes of the calls, as in the records.
    ALLREDUCE = 0, BROADCAST, REDUCE, BARRIER, ALLGATHER, ALL_GATHER_SINGLE, GATHER, SCATTER
    REDUCE_SCATTER, REDUCE_SCATTER_SINGLE, ALLTOALL, ALL_TO_ALL_SINGLE, SCAN = 16, EXSCAN
    BROADCAST_OBJECT = 19, ALLGATHER_OBJECT, GATHER_OBJECT, SCATTER_OBJECT

cdef bint over = False  # this process is no rank any more


def cease():
    """Leave all calls to the general way from now on: this process is forked, or at its end."""
    global over
    over = True


cdef struct Record:
    int64_t[9] fields  # number, kind, dtype, op, root, count, digest, state, extent


cdef struct Given:  # a plain array of the user's
    char *data
    Py_ssize_t count, nbytes, rows  # of the first dimension; of no dimensions 0
    int64_t dtype


cdef class Node:
    """A group's shared memory, as its ranks of one node have it.

    Args:
        memory: the mapping.
        layout: rank, size; bytes per rank, of its page, of a record, of room for a payload, of a
            slot; where in a rank's part lie its flag, what it has left and what it has finished.
        crowded: the ranks share cores: a peer needs this one.
    """

    cdef object __weakref__
    cdef char *_base
    cdef Py_buffer _buffer
    cdef bint _mapped, _crowded
    cdef int _rank, _size
    cdef Py_ssize_t _stride, _page, _record, _payload, _slot, _flag, _left, _finished
    cdef double _patience  # seconds for which a peer is waited for here
    cdef object _code  # the user's code that called last

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

    cdef object _view(self, object given, bint write, Given *found):
        """Look at a plain array or tensor; return it, or an array over it, or None if it is not plain."""
        cdef object array = given
        cdef int64_t dtype = 0
        if type(given) is not cnp.ndarray:
            if tensor_class is None:
                _look_for_torch()
            if tensor_class is None or type(given) is not tensor_class:
                return None
            if exchange is not NULL:
                return given if _borrow(given, found) else None
            try:  # what is wrong with it is the general way's to say
                if given.dtype is torch.bfloat16:
                    array, dtype = given.view(torch.int16).numpy(), BFLOAT16
                else:
                    array = given.numpy()
            except Exception:
                return None
            if type(array) is not cnp.ndarray:
                return None
        if not cnp.PyArray_ISCARRAY_RO(array) or (write and not cnp.PyArray_ISWRITEABLE(array)):
            return None
        if not dtype:
            if cnp.PyArray_TYPE(array) >= NUMBERS:
                return None
            dtype = codes[cnp.PyArray_TYPE(array)]
        found.data, found.dtype = <char *>cnp.PyArray_DATA(array), dtype
        found.count, found.nbytes = cnp.PyArray_SIZE(array), cnp.PyArray_NBYTES(array)
        found.rows = cnp.PyArray_DIM(array, 0) if cnp.PyArray_NDIM(array) else 0
        return None if dtype < 0 or found.count == 0 else array

    cdef object _placed(self, int *at):
        """Return the code of the user's that called the group's method, and where in it; else None."""
        cdef PyFrameObject *frame = PyEval_GetFrame()  # the group's method
        cdef PyFrameObject *back
        cdef PyCodeObject *code
        if frame is not NULL:
            frame = PyFrame_GetBack(frame)
        while frame is not NULL:
            code = PyFrame_GetCode(frame)
            if <PyObject *>code is <PyObject *>self._code or not is_ours(<object>filename_of(code)):
                at[0] = last_instruction(frame)
                self._code = <object>code
                Py_DECREF(code)
                Py_DECREF(frame)
                return self._code
            Py_DECREF(code)
            back = PyFrame_GetBack(frame)
            Py_DECREF(frame)
            frame = back
        return None

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

    cdef char *_scratch

    def __init__(self, memory, layout, crowded):
        self._scratch = NULL  # until an array is reduced

    def __dealloc__(self):
        free(self._scratch)

    def knows(self, cnp.ndarray array, int64_t dtype, int op):
        """Return whether an array's elements, which have our code `dtype`, can be reduced here."""
        if not self._mapped or plan_of(dtype, op) is NULL or not cnp.PyArray_ISCARRAY(array):
            return False
        if self._scratch is NULL:
            self._scratch = <char *>malloc(self._slot)
        return self._scratch is not NULL

    cdef inline char *_of(self, int rank, Py_ssize_t c) noexcept nogil:
        return self._base + rank * self._stride + self._page + 2 * self._payload + (c & 1) * self._slot

    cdef inline int64_t *_word(self, int rank) noexcept nogil:
        return <int64_t *>(self._base + rank * self._stride + self._flag)

    cdef inline bint _others_reach(self, int64_t value) noexcept nogil:
        cdef double until = 0
        cdef int rank
        for rank in range(self._size):
            if rank != self._rank and not self._reaches(self._word(rank), value, &until):
                return False
        return True

    def fold(self, int64_t flag, cnp.ndarray array, int64_t dtype, int op, int upto, Py_ssize_t c):
        """Reduce the first ranks' arrays in place, from chunk `c` on; return how far it came.

        The chunk that it came to is to be done once more, from its begin: a peer is late, or a
        result is NaN; or it has come far enough for others to have their turn.
        """
        cdef const plan *p = plan_of(dtype, op)
        cdef Py_ssize_t room = self._slot // p.wire, count = cnp.PyArray_SIZE(array), last = c + TURN, n
        cdef char *data = <char *>cnp.PyArray_DATA(array)
        cdef char *here
        cdef char *kept
        with nogil:
            while c * room < count and c < last:
                here = data + c * room * p.width
                n = min(room, count - c * room)
                encode(p, self._of(self._rank, c), here, n)
                store_release(self._word(self._rank), flag + c + 1)
                if not self._others_reach(flag + c + 1):
                    break
                if upto:
                    kept = self._of(self._rank, c)
                    if p.wire != p.width:
                        kept = self._scratch
                        memcpy(kept, here, n * p.width)
                    if fold(p, here, self._of(0, c), self._stride, upto, n, self._size, True, self._rank):
                        memcpy(here, kept, n * p.width)
                        break
                c += 1
        return c

    def share(self, int64_t flag, cnp.ndarray array, int64_t dtype, int op, Py_ssize_t half):
        """Have each rank reduce its part of each chunk, and gather the parts; return how far it came.

        Half 2c of chunk c ends when all have written theirs, half 2c + 1 when all have reduced
        their parts and those are gathered.  A half that it came to is to be done once more.
        """
        cdef const plan *p = plan_of(dtype, op)
        cdef size_t width = p.width
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
                    if not self._others_reach(flag + half + 1):
                        break
                    low, high = part_begin(n, self._rank, self._size), part_begin(n, self._rank + 1, self._size)
                    if fold(
                        p, self._scratch, self._of(0, c) + low * width, self._stride, self._size, high - low,
                        self._size, False, -1,
                    ):
                        break
                    memcpy(mine + low * width, self._scratch, (high - low) * width)
                    half += 1
                    store_release(self._word(self._rank), flag + half + 1)
                if not self._others_reach(flag + half + 1):
                    break
                for rank in range(self._size):
                    low, high = part_begin(n, rank, self._size), part_begin(n, rank + 1, self._size)
                    memcpy(here + low * width, self._of(rank, c) + low * width, (high - low) * width)
                half += 1
        return half

    def reduce(self, int64_t flag, cnp.ndarray array, int64_t dtype, int op, int root, Py_ssize_t c):
        """Reduce into the root's array, from chunk `c` on; return how far it came, as `fold` does."""
        cdef const plan *p = plan_of(dtype, op)
        cdef Py_ssize_t room = self._slot // p.wire, count = cnp.PyArray_SIZE(array), last = c + TURN, n
        cdef char *data = <char *>cnp.PyArray_DATA(array)
        cdef char *here
        cdef double until
        with nogil:
            while c * room < count and c < last:
                here = data + c * room * p.width
                n = min(room, count - c * room)
                until = 0
                if self._rank != root and c >= 2 and not self._reaches(self._word(root), flag + c - 1, &until):
                    break
                encode(p, self._of(self._rank, c), here, n)
                if self._rank == root:
                    if not self._others_reach(flag + c + 1):
                        break
                    memcpy(self._scratch, here, n * p.width)
                    if fold(p, here, self._of(0, c), self._stride, self._size, n, self._size, True, self._rank):
                        memcpy(here, self._scratch, n * p.width)
                        break
                store_release(self._word(self._rank), flag + c + 1)
                c += 1
        return c

    def scatter(
        self, int64_t flag, cnp.ndarray array, int64_t dtype, int op, cnp.ndarray output, Py_ssize_t c
    ):
        """Reduce, and leave each rank one of the equal parts, from round `c` on; return how far it came.

        In a round each rank gives a piece of each part.
        """
        cdef const plan *p = plan_of(dtype, op)
        cdef size_t width = p.width
        cdef Py_ssize_t room = self._slot // width // self._size, count = cnp.PyArray_SIZE(output)
        cdef Py_ssize_t last = c + TURN, n
        cdef char *data = <char *>cnp.PyArray_DATA(array)
        cdef char *out = <char *>cnp.PyArray_DATA(output)
        cdef int rank
        with nogil:
            while c * room < count and c < last:
                n = min(room, count - c * room)
                for rank in range(self._size):
                    memcpy(
                        self._of(self._rank, c) + rank * room * width, data + (rank * count + c * room) * width, n * width
                    )
                store_release(self._word(self._rank), flag + c + 1)
                if not self._others_reach(flag + c + 1):
                    break
                if fold(
                    p, self._scratch, self._of(0, c) + self._rank * room * width, self._stride, self._size, n,
                    self._size, False, -1,
                ):
                    break
                memcpy(out + c * room * width, self._scratch, n * width)
                c += 1
        return c


cdef inline Py_ssize_t part_begin(Py_ssize_t n, int rank, int size) noexcept nogil:
    return n * rank // size


# What is the same for all groups of a process.
cdef object engine, poll, work_class, digest_of, pickled
cdef dict active, light, listed
cdef tuple kinds, ops, checks
cdef str library, commands  # where the library's code lies, and the part of it that uses it as anybody does


cdef inline bint is_ours(str file):
    """Return whether a file of code is the library's; without a step of bytecode."""
    return PyUnicode_Tailmatch(file, library, 0, MOST, -1) and not PyUnicode_Tailmatch(file, commands, 0, MOST, -1)


cdef int64_t[24] codes  # of dtypes, by NumPy's numbers
cdef Py_ssize_t at_seq, at_given, read_most


def configure(
    *, read, all_kinds, dtypes, all_dtypes, all_ops, the_engine, done_work, checkers, places, digest, pieces,
):
    """Tell the core, once, what it shares with the general way.

    Args:
        read: bytes that a rank reduces alone, at most.
        all_kinds: what calls there are, in the order of their codes; checkers: their checkers, likewise.
        dtypes: ours, by NumPy's number; all_dtypes: by their codes.
        all_ops: the operators, in the order of their codes.
        the_engine: whose state is looked at.
        done_work: the class of calls that are over.
        places: where the library's code lies, and that of its commands, which use it as anybody does.
        digest: condenses the counts of all ranks.
        pieces: the class of pickled objects.
    """
    global engine, poll, active, light, work_class, library, commands, digest_of, listed, kinds, ops, checks, at_seq, at_given, read_most
    global pickled
    cdef int number
    engine, poll, active, light = the_engine, the_engine._poll, the_engine._active, the_engine.light
    work_class, digest_of, listed, pickled = done_work, digest, all_dtypes, pieces
    library, commands = places
    kinds, ops, checks, read_most = tuple(all_kinds), tuple(all_ops), tuple(checkers), read
    for number in range(NUMBERS):
        codes[number] = dtypes[number].code if number in dtypes else -1
    for number in range(40):
        borrowed[number] = -1
    for number, dtype in dtypes.items():
        if dtype.storage.num == number and dtype.storage.itemsize <= 16:
            borrowed[5 * "iuf  cb".index(dtype.storage.kind) + dtype.storage.itemsize.bit_length() - 1] = dtype.code
    borrowed[5 * BFLOAT + 1] = BFLOAT16
    at_seq, at_given = slot_offset(work_class.seq), slot_offset(work_class._given)
    if at_seq < 0 or at_given < 0:
        raise TypeError("a Work's number and what it was given must be slots")


cdef object torch, tensor_class = None, is_neg, is_conj
cdef const Exchange *exchange = NULL  # functions that PyTorch has for other libraries, from 2.10 on
cdef int64_t[40] borrowed  # our codes of dtypes: five for each of DLPack's kinds, of 1, 2, 4, 8, 16 bytes


cdef _look_for_torch():
    """Note what is needed of PyTorch, if it is loaded."""
    global torch, tensor_class, is_neg, is_conj, exchange
    torch = modules.get("torch")
    tensor_class = getattr(torch, "Tensor", None)  # it may be half imported
    if tensor_class is None:
        return
    is_neg, is_conj = tensor_class.is_neg, tensor_class.is_conj
    capsule = getattr(tensor_class, "__dlpack_c_exchange_api__", None)
    if PyCapsule_IsValid(capsule, "dlpack_exchange_api"):
        exchange = <const Exchange *>PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if exchange.major != 1 or exchange.borrow is NULL:
            exchange = NULL


cdef bint _borrow(object tensor, Given *found):
    """Look at a tensor in host memory, without an object made of it; false where it is not plain."""
    cdef Borrowed seen
    cdef int i = 0
    cdef Py_ssize_t count = 1
    try:
        if tensor.requires_grad or is_neg(tensor):
            return False
        if exchange.borrow(<void *>tensor, &seen):
            PyErr_Clear()
            return False
        if seen.code == COMPLEX and is_conj(tensor):
            return False
    except Exception:
        return False
    while i < 5 and seen.bits != 8 << i:
        i += 1
    if seen.device_type != ON_CPU or seen.lanes != 1 or seen.code > 7 or i == 5:
        return False
    found.dtype, found.nbytes = borrowed[5 * seen.code + i], seen.bits // 8
    for i in range(seen.ndim - 1, -1, -1):
        if seen.shape[i] != 1 and seen.strides is not NULL and seen.strides[i] != count:
            return False
        count *= seen.shape[i]
    found.data, found.count, found.nbytes = seen.data + seen.byte_offset, count, count * found.nbytes
    found.rows = seen.shape[0] if seen.ndim else 0
    return found.dtype >= 0 and count > 0 and seen.data is not NULL


@cython.final
cdef class Core(Node):
    """What carries out the small calls of one group.

    Args:
        most: bytes that travel beside a record, at most.
        group_state, arrival, ring: what is looked at and kept up to date.
    """

    cdef Py_ssize_t _most
    cdef object _group_state, _arrival, _append
    cdef int64_t _counted, _counts
    cdef int64_t _next, _owed, _owed_kind, _last, _kind
    cdef bint _stale
    cdef char *_spare

    def __dealloc__(self):
        free(self._spare)

    def __init__(self, memory, layout, crowded, *, most, group_state, arrival, ring):
        self._most = min(most, self._payload)
        self._group_state, self._arrival, self._append = group_state, arrival, ring.append
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

    def allreduce(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(ALLREDUCE, tensor, op, timeout, -1, self._size, (tensor, op))

    def reduce(self, tensor, root, op, timeout):
        if self._is_indebted() or not self._is_rank(root):
            return None
        return self._reducing(REDUCE, tensor, op, timeout, root, self._size, (tensor, root, op))

    def scan(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(SCAN, tensor, op, timeout, -1, self._rank + 1, (tensor, op))

    def exscan(self, tensor, op, timeout):
        if self._is_indebted():
            return None
        return self._reducing(EXSCAN, tensor, op, timeout, -1, self._rank, (tensor, op))

    cdef object _reducing(self, int kind, object tensor, object op, object timeout, int root, int upto, tuple given):
        """Reduce what the first ranks give, into the array itself."""
        cdef Given a
        cdef bint lands = root < 0 or root == self._rank
        cdef object array = self._view(tensor, lands, &a)
        cdef int code = self._op(op)
        cdef const plan *p
        cdef int64_t seq
        cdef char *mine
        cdef char *kept
        cdef double now
        if array is None:
            return None
        p = plan_of(a.dtype, code)
        if p is NULL or not self._fits(a.count * p.wire, True) or (code == AVG_OP and kind >= SCAN):
            return None
        if p.wire != p.width and self._spare is NULL:
            self._spare = <char *>malloc(self._payload)
            if self._spare is NULL:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        mine = self._room(self._rank, seq)
        encode(p, mine, a.data, a.count)
        if not self._meet(seq, kind, a.dtype, code, root, a.count, 0, a.count):
            return None
        if lands and upto:
            kept = self._keep(p, &a, mine)
            if fold(p, a.data, self._room(0, seq), self._stride, upto, a.count, self._size, True, self._rank):
                memcpy(a.data, kept, a.nbytes)
                return None  # the general way makes the NaN
        return self._done(seq, kind, array, a.dtype, a.count, op, root, now, given, (given[0],))

    cdef inline char *_keep(self, const plan *p, Given *a, char *mine):
        """Return where an array still is as it was, in case that a result is NaN.

        Which NaN it is must be the same on all ranks: the general way makes it, on each of them.
        """
        if p.wire == p.width:
            return mine
        memcpy(self._spare, a.data, a.nbytes)
        return self._spare

    def reduce_scatter_single(self, output, input, op, timeout):
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef int code = self._op(op)
        cdef const plan *p
        cdef int64_t seq
        cdef char *mine
        cdef double now
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or a.count != out.count * self._size:
            return None
        p = plan_of(a.dtype, code)
        if p is NULL or not self._fits(a.count * p.wire, True) or not self._apart(&out, &a):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        mine = self._room(self._rank, seq)
        encode(p, mine, a.data, a.count)
        if not self._meet(seq, REDUCE_SCATTER_SINGLE, a.dtype, code, -1, out.count, 0, a.count):
            return None
        if self._own_part(p, seq, &out):
            return None  # the general way makes the NaN
        return self._done(seq, REDUCE_SCATTER_SINGLE, source, a.dtype, out.count, op, -1, now, (output, input, op), (output,))

    cdef inline int _own_part(self, const plan *p, int64_t seq, Given *out):
        """Reduce this rank's part into an array apart from what was given; return whether a result is NaN."""
        cdef char *first = self._room(0, seq) + self._rank * out.count * p.wire
        return fold(p, out.data, first, self._stride, self._size, out.count, self._size, True, -1)

    def reduce_scatter(self, output, input, op, timeout):
        cdef Given out
        cdef Given[16] parts
        cdef object into = self._view(output, True, &out)
        cdef int code = self._op(op), rank
        cdef const plan *p
        cdef int64_t seq, digest
        cdef char *mine
        cdef list sources
        cdef double now
        if self._is_indebted() or into is None:
            return None
        p = plan_of(out.dtype, code)
        if p is NULL or not self._fits(out.count * self._size * p.wire, True):
            return None
        sources = self._views(input, &out, False, parts)
        if sources is None:
            return None
        digest = self._digest(out.count)  # which runs bytecode: before the group is looked at
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        mine = self._room(self._rank, seq)
        for rank in range(self._size):
            encode(p, mine + rank * out.count * p.wire, parts[rank].data, out.count)
        if not self._meet(
            seq, REDUCE_SCATTER, out.dtype, code, -1, out.count, digest, out.count * self._size
        ):
            return None
        if self._own_part(p, seq, &out):
            return None  # the general way makes the NaN
        return self._done(seq, REDUCE_SCATTER, sources[0], out.dtype, out.count, op, -1, now, (output, list(input), op), (output,))

    def barrier(self, timeout):
        cdef double now
        cdef int64_t seq
        if self._is_indebted():
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        if not self._meet(seq, BARRIER, -1, -1, -1, 0, 0, 0):
            return None
        return self._done(seq, BARRIER, None, -1, 0, None, -1, now, (), ())

    def broadcast(self, tensor, root, timeout):
        cdef Given a
        cdef object array
        cdef int64_t seq
        cdef bint gives
        cdef double now
        if self._is_indebted() or not self._is_rank(root):
            return None
        gives = root == self._rank
        array = self._view(tensor, not gives, &a)
        if array is None or not self._fits(a.nbytes, False):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        if gives:
            memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, BROADCAST, a.dtype, -1, root, a.count, 0, a.count):
            return None
        if not gives:
            memcpy(a.data, self._room(root, seq), a.nbytes)
        return self._done(seq, BROADCAST, array, a.dtype, a.count, None, root, now, (tensor, root), (tensor,))

    def all_gather_single(self, output, input, timeout):
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef int64_t seq
        cdef int rank
        cdef double now
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or out.count != a.count * self._size:
            return None
        if not self._fits(out.nbytes, False):
            return None
        if not self._apart(&out, &a) and a.data != out.data + self._rank * a.nbytes:
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, ALL_GATHER_SINGLE, a.dtype, -1, -1, a.count, 0, out.count):
            return None
        for rank in range(self._size):
            memcpy(out.data + rank * a.nbytes, self._room(rank, seq), a.nbytes)
        return self._done(seq, ALL_GATHER_SINGLE, source, a.dtype, a.count, None, -1, now, (output, input), (output,))

    def all_to_all_single(self, output, input, output_sizes, input_sizes, timeout):
        """Where the rows are shared equally."""
        cdef Given out, a
        cdef object into = self._view(output, True, &out)
        cdef object source = self._view(input, False, &a)
        cdef Py_ssize_t nbytes
        cdef int64_t seq
        cdef int rank
        cdef double now
        if self._is_indebted():
            return None
        if into is None or source is None or a.dtype != out.dtype or a.count != out.count:
            return None
        if not (self._even(output_sizes, &out) and self._even(input_sizes, &a)) or out.rows != a.rows:
            return None
        if not self._fits(a.nbytes, False) or not self._apart(&out, &a):
            return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq, nbytes = self._next, a.nbytes // self._size
        memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, ALL_TO_ALL_SINGLE, a.dtype, -1, -1, a.count // self._size, 0, a.count):
            return None
        for rank in range(self._size):
            memcpy(out.data + rank * nbytes, self._room(rank, seq) + self._rank * nbytes, nbytes)
        return self._done(
            seq, ALL_TO_ALL_SINGLE, source, a.dtype, a.count // self._size, None, -1, now, (output, input, None, None),
            (output,),
        )

    def allgather(self, outputs, input, timeout):
        cdef Given a
        cdef Given[16] parts
        cdef object source = self._view(input, False, &a)
        cdef list into
        cdef int64_t seq, digest
        cdef int rank
        cdef double now
        if self._is_indebted():
            return None
        if source is None or not self._fits(a.nbytes * self._size, False):
            return None
        into = self._views(outputs, &a, True, parts)
        if into is None:
            return None
        digest = self._digest(a.count)  # which runs bytecode: before the group is looked at
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(
            seq, ALLGATHER, a.dtype, -1, -1, a.count, digest, a.count * self._size
        ):
            return None
        for rank in range(self._size):
            memcpy(parts[rank].data, self._room(rank, seq), a.nbytes)
        return self._done(seq, ALLGATHER, source, a.dtype, a.count, None, -1, now, (list(outputs), input), tuple(outputs))

    def gather(self, outputs, input, root, timeout):
        cdef Given a
        cdef Given[16] parts
        cdef object source = self._view(input, False, &a)
        cdef list into
        cdef int64_t seq
        cdef int rank
        cdef bint lands
        cdef double now
        if self._is_indebted():
            return None
        if source is None or not self._is_rank(root) or not self._fits(a.nbytes * self._size, False):
            return None
        lands = root == self._rank
        if lands:
            into = self._views(outputs, &a, True, parts)
            if into is None:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        memcpy(self._room(self._rank, seq), a.data, a.nbytes)
        if not self._meet(seq, GATHER, a.dtype, -1, root, a.count, 0, a.count * self._size if lands else a.count):
            return None
        if lands:
            for rank in range(self._size):
                memcpy(parts[rank].data, self._room(rank, seq), a.nbytes)
        return self._done(seq, GATHER, source, a.dtype, a.count, None, root, now,
            (list(outputs) if lands else [], input, root), tuple(outputs) if lands else ())

    def scatter(self, output, inputs, root, timeout):
        cdef Given out
        cdef Given[16] parts
        cdef object into = self._view(output, True, &out)
        cdef list sources
        cdef int64_t seq
        cdef int rank
        cdef bint gives
        cdef double now
        if self._is_indebted():
            return None
        if into is None or not self._is_rank(root) or not self._fits(out.nbytes * self._size, False):
            return None
        gives = root == self._rank
        if gives:
            sources = self._views(inputs, &out, False, parts)
            if sources is None:
                return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        if gives:
            for rank in range(self._size):
                memcpy(self._room(self._rank, seq) + rank * out.nbytes, parts[rank].data, out.nbytes)
        if not self._meet(
            seq, SCATTER, out.dtype, -1, root, out.count, 0, out.count * self._size if gives else out.count
        ):
            return None
        memcpy(out.data, self._room(root, seq) + self._rank * out.nbytes, out.nbytes)
        return self._done(seq, SCATTER, into, out.dtype, out.count, None, root, now,
            (output, list(inputs) if gives else [], root), (output,))

    def alltoall(self, outputs, inputs, timeout):
        cdef Given first
        cdef Given[16] parts, ins
        cdef list into, sources
        cdef int64_t seq
        cdef int rank, other
        cdef double now
        if self._is_indebted():
            return None
        into = self._views(outputs, NULL, True, parts)
        if into is None:
            return None
        first = parts[0]
        if not self._fits(first.nbytes * self._size, False):
            return None
        sources = self._views(inputs, &first, False, ins)
        if sources is None:
            return None
        for rank in range(self._size):
            for other in range(self._size):
                if not self._apart(&ins[rank], &parts[other]):
                    return None
        now = self._open(timeout)
        if now == 0:
            return None
        seq = self._next
        for rank in range(self._size):
            memcpy(self._room(self._rank, seq) + rank * first.nbytes, ins[rank].data, first.nbytes)
        if not self._meet(seq, ALLTOALL, first.dtype, -1, -1, first.count, 0, first.count * self._size):
            return None
        for rank in range(self._size):
            memcpy(parts[rank].data, self._room(rank, seq) + self._rank * first.nbytes, first.nbytes)
        return self._done(seq, ALLTOALL, sources[0], first.dtype, first.count, None, -1, now, (list(outputs), list(inputs)), tuple(outputs))

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
        cdef double now
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
        now = self._open(timeout)
        if now == 0:
            return left
        seq = self._next
        lengths = <int64_t *>self._room(own, seq)
        at = <char *>lengths + 8 * len(given)
        for rank in range(len(given)):
            lengths[rank] = len(<bytes>given[rank])
            memcpy(at, <char *><bytes>given[rank], lengths[rank])
            at += lengths[rank]
        if not self._meet(seq, kind, -1, -1, to, 0, 0, total) or self._widest(seq) > self._most:
            return left
        if kind != GATHER_OBJECT or own == to:
            for rank in range(to if from_root else 0, to + 1 if from_root else self._size):
                lengths = <int64_t *>self._room(rank, seq)
                at = <char *>lengths + 8 * (self._size if parted else 1)
                for i in range(own if parted else 0):
                    at += lengths[i]
                got.append(at[:lengths[own if parted else 0]])
        self._done(seq, kind, None, -1, 0, None, to, now, (), ())
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
        return nbytes <= self._most and (not reduces or nbytes * self._size <= read_most)

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

    cdef double _open(self, object timeout) except -1:
        """Return the time if the group takes calls, and nothing is under way; else 0."""
        cdef double now, due
        if over or not self._mapped or active or light:
            return 0
        if timeout is not None and not ((type(timeout) is float or type(timeout) is int) and timeout > 0):
            return 0
        if engine._struck or self._group_state.broken is not None or self._group_state.closed or self._group_state.failures:
            return 0
        self._next = self._group_state.seq + 1
        if self._next <= <int64_t>self._arrival._last:
            return 0  # the board would show what the others said the first time
        now, due = monotonic(), poll.next
        return 0 if now >= due else now  # peers' questions are to be answered

    cdef inline char *_room(self, int rank, int64_t seq):
        return self._base + rank * self._stride + self._page + (seq & 1) * self._payload

    cdef bint _meet(
        self, int64_t seq, int kind, int64_t dtype, int64_t op, int64_t root, int64_t count, int64_t digest, int64_t extent
    ):
        """Post this rank's record, and return whether all others' are there soon and the same.

        From here to `_done` the call is owed: the general way goes on with it.
        """
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
        self._owed, self._owed_kind = seq, kind  # until it is done
        for rank in range(self._size):
            theirs = <Record *>(self._base + rank * self._stride + at)
            if not self._reaches(&theirs.fields[0], seq, &until) or theirs.fields[0] != seq:
                return False
            if memcmp(&theirs.fields[1], &mine.fields[1], 56):  # all but the extent, which follows from it
                return False
        for rank in range(self._size):
            left = load_acquire(<int64_t *>(self._base + rank * self._stride + self._left))
            if 0 < left <= seq:
                return False
        return True

    cdef Py_ssize_t _widest(self, int64_t seq):
        """Return the largest extent of all ranks, which have met."""
        cdef Py_ssize_t found = 0
        cdef int rank
        for rank in range(self._size):
            found = max(found, (<Record *>(self._base + rank * self._stride + (seq & 1) * self._record)).fields[8])
        return found

    cdef object _done(
        self, int64_t seq, int kind, object array, int64_t dtype, int64_t count, object op, int root, double now,
        tuple given, tuple outputs,
    ):
        """Note that a call is over, and return its Work."""
        cdef int at = 0
        cdef object work, place
        cdef object called = now, number = seq
        self._group_state.seq = number
        self._arrival._last = number
        self._owed, self._last, self._kind = 0, seq, kind
        if self._mapped:  # a collection of garbage may have run what closes the group
            store_release(<int64_t *>(self._base + self._rank * self._stride + self._finished), seq)
        place = self._placed(&at)
        self._append([
            number, kinds[kind], None if array is None else listed[dtype], count,
            None if array is None else array.shape, op, root, -1, 0, called, monotonic(), None, place, at,
        ])
        work = new_instance(work_class)
        give_slot(work, at_seq, number)
        give_slot(work, at_given, (self, kind, given, outputs))
        return work


include "moves.pxi"
include "rings.pxi"
