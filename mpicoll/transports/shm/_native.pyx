# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""The compiled core: what is done in C for a group whose ranks share one node's memory.

`Node` is that memory, as all that follows sees it; core.pxi has the small calls, rings.pxi the messages,
chunks.pxi the large reductions, moves.pxi what only moves.  Where there is no compiler the general way
does the same.  Messages and moves go this way only where all ranks of the group are compiled.
"""

from functools import update_wrapper
from os import strerror
from pickle import dumps
from sys import modules

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.errno cimport ESRCH
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
    void stream(char *into, const char *source, size_t n)
    void relax()
    double monotonic()
    int sched_yield()

cdef extern from *:
    """
    #define _GNU_SOURCE 1
    #include <errno.h>
    #include <sys/uio.h>

    #if defined(__linux__)
    /* Read another process's memory; return how much was read, or minus the error's number. */
    static Py_ssize_t read_memory(int64_t process, char *into, uint64_t address, size_t n) {
        struct iovec mine = {into, n}, theirs = {(void *)(uintptr_t)address, n};
        Py_ssize_t done = process_vm_readv((pid_t)process, &mine, 1, &theirs, 1, 0);
        return done > 0 ? done : done == 0 ? -EFAULT : -(Py_ssize_t)errno;
    }
    #else
    static Py_ssize_t read_memory(int64_t process, char *into, uint64_t address, size_t n) { return -ENOSYS; }
    #endif
    """
    Py_ssize_t read_memory(int64_t process, char *into, uint64_t address, size_t n) nogil

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
    static PyObject *slot(PyObject *self, Py_ssize_t offset) { return *(PyObject **)((char *)self + offset); }
    static void give_slot(PyObject *self, Py_ssize_t offset, PyObject *value) {
        PyObject **place = (PyObject **)((char *)self + offset), *before = *place;
        Py_INCREF(value);
        *place = value;
        Py_XDECREF(before);
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
    PyObject *slot(object self, Py_ssize_t offset)  # borrowed; the slots that are read are never empty
    void give_slot(object self, Py_ssize_t offset, object value)
    ctypedef struct PyFrameObject
    ctypedef struct PyCodeObject
    PyFrameObject *PyEval_GetFrame()
    PyFrameObject *PyFrame_GetBack(PyFrameObject *frame)
    PyCodeObject *PyFrame_GetCode(PyFrameObject *frame)
    int last_instruction(PyFrameObject *frame)
    PyObject *filename_of(PyCodeObject *code)
    void Py_DECREF(void *thing)
    void Py_XINCREF(void *thing)
    PyObject *Py_None
    PyObject *Py_False
    Py_ssize_t Py_SIZE(PyObject *thing)
    Py_ssize_t PyUnicode_GET_LENGTH(PyObject *text)
    Py_ssize_t PyUnicode_Find(str text, str part, Py_ssize_t start, Py_ssize_t end, int direction)
    int PyUnicode_Tailmatch(str text, str part, Py_ssize_t start, Py_ssize_t end, int direction)
    Py_ssize_t MOST "PY_SSIZE_T_MAX"

cnp.import_array()
lay_plans()

cdef enum:
    NUMBERS = 24  # NumPy's numbers of its own dtypes are lower
    BFLOAT16 = 17  # our code of it
    ON_CPU = 1  # DLPack's numbers
    BFLOAT = 4
    COMPLEX = 5
    LINE = 64  # bytes of a cache line
    FIELDS = 7  # of a record, after its number
    TURN = 16  # chunks after which others have their turn
    LISTED = 16  # ranks up to which lists of arrays are looked through here
    SHOWN = 8  # dimensions of the arrays that are for this way
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
    int64_t number
    int64_t[FIELDS] fields  # kind, dtype, op, root, count, digest, state
    int64_t extent


cdef struct Line:  # of a rank, in every other call
    int64_t number, digest, extent, left
    char[32] data


cdef struct Given:  # a plain array of the user's
    char *data
    Py_ssize_t count, nbytes, rows  # of the first dimension; of no dimensions 0
    int64_t dtype
    int dimensions
    Py_ssize_t[SHOWN] shape


cdef class Node:
    """A group's shared memory, as its ranks of one node have it.

    Args:
        memory: the mapping.
        layout: rank, size; bytes of a rank's lines, of all ranks'; of what else a rank has there,
            of its page, from one record to the other, in a page before the last call that was
            finished, of room for a payload; of a slot.
        crowded: the ranks share cores: a peer needs this one.
        slot_memory: the mapping of the slots, for what goes through them.
    """

    cdef object __weakref__
    cdef char *_base
    cdef char *_slots
    cdef Py_buffer _buffer, _slots_buffer
    cdef bint _mapped, _crowded
    cdef int _rank, _size
    cdef Py_ssize_t _block, _head, _stride, _page, _record, _finished, _payload, _slot
    cdef double _patience  # seconds for which a peer is waited for here
    cdef object _code  # the user's code that called last

    def __cinit__(self, memory, layout, crowded, slot_memory=None, **kwargs):
        self._mapped = False
        PyObject_GetBuffer(memory, &self._buffer, PyBUF_WRITABLE)
        self._mapped = True
        self._base, self._slots = <char *>self._buffer.buf, NULL
        if slot_memory is not None:
            PyObject_GetBuffer(slot_memory, &self._slots_buffer, PyBUF_WRITABLE)
            self._slots = <char *>self._slots_buffer.buf
        (
            self._rank, self._size, self._block, self._head, self._stride, self._page, self._record, self._finished,
            self._payload, self._slot,
        ) = layout
        self._crowded = crowded
        self._patience = 100e-6 if crowded else 200e-6

    def __dealloc__(self):
        self._let_go()

    cdef void _let_go(self):
        if self._mapped:
            self._mapped = False
            PyBuffer_Release(&self._buffer)
            if self._slots is not NULL:
                PyBuffer_Release(&self._slots_buffer)

    def close(self):
        """Let go of the memory: no call goes this way any more."""
        self._let_go()

    cdef object _view(self, object given, bint write, Given *found):
        """Look at a plain array or tensor; return it, or an array over it, or None if it is not plain."""
        cdef object array = given
        cdef int64_t dtype = 0
        cdef int i
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
        found.dimensions = cnp.PyArray_NDIM(array)
        if found.dimensions > SHOWN:
            return None
        for i in range(found.dimensions):
            found.shape[i] = cnp.PyArray_DIM(array, i)
        return None if dtype < 0 or found.count == 0 else array

    cdef object _placed(self, int *at):
        """Return the code of the user's that called the group's method, and where in it; else None."""
        cdef PyFrameObject *frame = PyEval_GetFrame()
        cdef PyFrameObject *back
        cdef PyCodeObject *code
        Py_XINCREF(frame)
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

    cdef inline int64_t *_word(self, int rank) noexcept nogil:
        """The flag of a rank."""
        return <int64_t *>(self._base + rank * self._block + 2 * LINE)

    cdef inline char *_own_slots(self, int rank) noexcept nogil:
        """The two slots of a rank."""
        return self._slots + 2 * rank * self._slot

    cdef inline char *_page_of(self, int rank) noexcept nogil:
        return self._base + self._head + rank * self._stride

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


# What is the same for all groups of a process.
cdef object engine, poll, work_class, digest_of, pickled
cdef dict active, light, listed
cdef tuple kinds, ops, checks
cdef str library, commands, pytorch  # where the library's code lies, the part that uses it as anybody does, PyTorch's


cdef inline bint takes_calls(object state):
    """Return whether nothing is wrong with a group, nor with the engine."""
    return (
        slot(engine, at_struck) is Py_False
        and slot(state, at_broken) is Py_None
        and PyUnicode_GET_LENGTH(slot(state, at_closed)) == 0
        and Py_SIZE(slot(state, at_failures)) == 0
    )


cdef inline bint is_due(double now):
    """Return whether peers' questions are to be answered."""
    return now >= <double><object>slot(poll, at_due)


cdef inline bint is_ours(str file):
    """Return whether a file of code is the library's, or PyTorch's; without a step of bytecode."""
    if PyUnicode_Tailmatch(file, library, 0, MOST, -1):
        return not PyUnicode_Tailmatch(file, commands, 0, MOST, -1)
    return PyUnicode_Find(file, pytorch, 0, MOST, 1) >= 0


cdef int64_t[24] codes  # of dtypes, by NumPy's numbers
cdef uint64_t[FIELDS] mixers  # of a record's digest
cdef Py_ssize_t read_most, read_from, room_in_line
# Where the slots of Python's objects are that are looked at in every call.
cdef Py_ssize_t at_number, at_given, at_struck, at_due, at_seq, at_broken, at_closed, at_failures, at_last


def configure(
    *, read, all_kinds, dtypes, all_dtypes, all_ops, the_engine, done_work, group_state, arrival, checkers, places, digest,
    pieces, mix, in_line,
):
    """Tell the core, once, what it shares with the general way.

    Args:
        read: bytes that a rank reduces alone, at most, and the number of ranks from which that holds.
        all_kinds: what calls there are, in the order of their codes; checkers: their checkers, likewise.
        dtypes: ours, by NumPy's number; all_dtypes: by their codes.
        all_ops: the operators, in the order of their codes.
        the_engine: whose state is looked at.
        done_work, group_state, arrival: the classes of calls that are over, of groups' states, of their arrivals.
        places: where the library's code lies, that of its commands, which use it as anybody does, and PyTorch's.
        digest: condenses the counts of all ranks.
        pieces: the class of pickled objects.
        mix: by what the fields of a record are multiplied for its digest.
        in_line: bytes of data that a line has room for.
    """
    global engine, poll, active, light, work_class, library, commands, pytorch, digest_of, listed, kinds, ops, checks, read_most
    global pickled, read_from, room_in_line
    global at_number, at_given, at_struck, at_due, at_seq, at_broken, at_closed, at_failures, at_last
    cdef int number
    engine, poll, active, light = the_engine, the_engine._poll, the_engine._active, the_engine.light
    work_class, digest_of, listed, pickled = done_work, digest, all_dtypes, pieces
    library, commands, pytorch = places
    kinds, ops, checks, read_most = tuple(all_kinds), tuple(all_ops), tuple(checkers), read[0]
    read_from, room_in_line = read[1], in_line
    for number in range(FIELDS):
        mixers[number] = mix[number]
    for number in range(NUMBERS):
        codes[number] = dtypes[number].code if number in dtypes else -1
    for number in range(40):
        borrowed[number] = -1
    for number, dtype in dtypes.items():
        if dtype.storage.num == number and dtype.storage.itemsize <= 16:
            borrowed[5 * "iuf  cb".index(dtype.storage.kind) + dtype.storage.itemsize.bit_length() - 1] = dtype.code
    borrowed[5 * BFLOAT + 1] = BFLOAT16
    found = [slot_offset(member) for member in (
        done_work.seq, done_work._given, type(engine)._struck, type(poll).next, arrival.last,
        group_state.seq, group_state.broken, group_state.closed, group_state.failures,
    )]
    if min(found) < 0:
        raise TypeError("what is looked at in every call must be slots")
    at_number, at_given, at_struck, at_due, at_last, at_seq, at_broken, at_closed, at_failures = found


include "tensors.pxi"
include "chunks.pxi"
include "moves.pxi"
include "entry.pxi"
include "core.pxi"
include "rings.pxi"
include "methods.pxi"
