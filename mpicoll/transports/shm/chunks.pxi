# Large arrays, reduced chunk by chunk in slots that alternate, a part of _native.pyx; transport.py says how.

@cython.final
cdef class Chunks(Node):
    """What carries out the chunks of one reduction after the other, as far as the peers have come."""

    cdef char *_scratch

    def __init__(self, memory, layout, crowded, slot_memory):
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
        return self._own_slots(rank) + (c & 1) * self._slot

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
                    if fold(p, here, self._of(0, c), 2 * self._slot, upto, n, self._size, True, self._rank):
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
                        p, self._scratch, self._of(0, c) + low * width, 2 * self._slot, self._size, high - low,
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
                    if fold(p, here, self._of(0, c), 2 * self._slot, self._size, n, self._size, True, self._rank):
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
                    p, self._scratch, self._of(0, c) + self._rank * room * width, 2 * self._slot, self._size, n,
                    self._size, False, -1,
                ):
                    break
                memcpy(out + c * room * width, self._scratch, n * width)
                c += 1
        return c


cdef inline Py_ssize_t part_begin(Py_ssize_t n, int rank, int size) noexcept nogil:
    return n * rank // size
