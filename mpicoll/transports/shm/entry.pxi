# A call in the flight recorder, a part of _native.pyx: what the general way keeps as a list.

cdef enum:  # the fields of that list (engine/recorder.py) which change
    ENDED_AT = 10
    ERROR


@cython.final
@cython.no_gc  # what it holds holds nothing else; so making one never runs the collector, and bytecode
@cython.freelist(8)
cdef class Entry:
    """One call; it keeps no array alive."""

    cdef int64_t seq, count, tag
    cdef int kind, dtype, op, root, peer, at, dimensions
    cdef double called, ended  # -1: it is under way
    cdef object code, error
    cdef Py_ssize_t[SHOWN] shape

    def __getitem__(self, int field):
        """Return a field of the list."""
        shape = None if self.dimensions < 0 else tuple([self.shape[i] for i in range(self.dimensions)])
        return (
            self.seq, kinds[self.kind], listed.get(self.dtype), self.count, shape, None if self.op < 0 else ops[self.op],
            self.root, self.peer, self.tag, self.called, None if self.ended < 0 else self.ended, self.error, self.code, self.at,
        )[field]

    def __setitem__(self, int field, value):
        """Set the time of the end, or the error."""
        if field == ENDED_AT:
            self.ended = value
        elif field == ERROR:
            self.error = value
        else:
            raise IndexError(field)


cdef Entry entry_of(int64_t seq, int kind, Given *shown, double now):
    """Return the entry of a call made at `now`; its count is 0, and it has no operator, root or peer.

    Args:
        shown: the array whose dtype and shape it has; NULL: none.
    """
    cdef Entry entry = Entry.__new__(Entry)
    cdef int i
    entry.called, entry.ended = now, -1
    entry.seq, entry.kind, entry.dtype, entry.dimensions = seq, kind, -1, -1
    entry.count, entry.op, entry.root, entry.peer, entry.tag = 0, -1, -1, -1, 0
    if shown is not NULL:
        entry.dtype, entry.dimensions = shown.dtype, shown.dimensions
        for i in range(shown.dimensions):
            entry.shape[i] = shown.shape[i]
    return entry
