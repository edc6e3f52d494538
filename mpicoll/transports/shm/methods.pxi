# A group's methods that the core knows, a part of _native.pyx.
#
# Such a method asks the core, and where that returns None, the method of this name that the class has in
# Python.  A call of it makes no frame, so the flight recorder finds the user's at once.

cdef extern from *:
    """
    /* Whether the core does a call; where it doesn't, what else to call. */
    typedef PyObject *(*asker)(PyObject *method, PyObject **args, size_t given, PyObject *names, PyObject **general);
    static asker ask_first;

    /* Not in Cython's code: that would enter it in the tracebacks of what the general way raises. */
    static PyObject *call_method(PyObject *method, PyObject *const *args, size_t given, PyObject *names) {
        PyObject *general, *done = ask_first(method, (PyObject **)args, PyVectorcall_NARGS(given), names, &general);
        if (done != NULL || PyErr_Occurred()) return done;
        return PyObject_Vectorcall(general, args, given, names);
    }
    static void make_callable(PyObject *given, Py_ssize_t offset) {
        PyTypeObject *cls = (PyTypeObject *)given;
        cls->tp_vectorcall_offset = offset;
        cls->tp_call = PyVectorcall_Call;
        cls->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL | Py_TPFLAGS_METHOD_DESCRIPTOR;
        PyType_Modified(cls);
    }
    """
    ctypedef PyObject *(*asker)(PyObject *, PyObject **, size_t, PyObject *, PyObject **) except? NULL
    asker ask_first
    void *call_method
    void make_callable(PyObject *cls, Py_ssize_t offset)
    object PyMethod_New(object function, object self)

cdef enum:
    ARGUMENTS = 5  # of a method, at most

cdef dict ASKED = {
    "allreduce": ALLREDUCE, "broadcast": BROADCAST, "reduce": REDUCE, "barrier": BARRIER, "allgather": ALLGATHER,
    "all_gather_single": ALL_GATHER_SINGLE, "gather": GATHER, "scatter": SCATTER, "reduce_scatter": REDUCE_SCATTER,
    "reduce_scatter_single": REDUCE_SCATTER_SINGLE, "alltoall": ALLTOALL, "all_to_all_single": ALL_TO_ALL_SINGLE,
    "scan": SCAN, "exscan": EXSCAN, "send": SEND, "recv": RECV,
}
cdef type group_class = None
cdef Py_ssize_t at_core, at_rings


@cython.final
cdef class Method:
    """A method of the group's class; it looks like the one in Python, which it wraps."""

    cdef void *_called
    cdef dict __dict__
    cdef object _general
    cdef int _kind, _count
    cdef tuple _names, _defaults

    def __init__(self, general, kind):
        code = general.__code__
        self._called, self._general, self._kind = call_method, general, kind
        self._names = code.co_varnames[1:code.co_argcount]
        self._count, self._defaults = len(self._names), general.__defaults__ or ()
        if self._count > ARGUMENTS:
            raise TypeError(f"{general} has more arguments than {ARGUMENTS}")
        update_wrapper(self, general)

    def __get__(self, group, cls):
        return self if group is None else PyMethod_New(self, group)

    def __repr__(self):
        return repr(self._general)


cdef PyObject *ask(
    PyObject *asked, PyObject **given, size_t count, PyObject *names, PyObject **general
) except? NULL:
    """Return what the core makes of a call, or NULL."""
    cdef Method method = <Method>asked
    cdef PyObject *a[ARGUMENTS]
    cdef Py_ssize_t i, k, known = <Py_ssize_t>count - 1, first = method._count - len(method._defaults)
    cdef object done
    general[0] = <PyObject *>method._general
    if known < 0 or known > method._count or not isinstance(<object>given[0], group_class):
        return NULL
    for i in range(method._count):
        a[i] = given[i + 1] if i < known else NULL
    if names is not NULL:
        for k in range(len(<tuple>names)):
            i = known
            while i < method._count and method._names[i] is not (<tuple>names)[k]:
                i += 1
            if i == method._count:
                return NULL
            a[i] = given[count + k]
    for i in range(known, method._count):
        if a[i] is NULL:
            if i < first:
                return NULL
            a[i] = <PyObject *>method._defaults[i - first]
    done = answer(method._kind, slot(<object>given[0], at_core), slot(<object>given[0], at_rings), a)
    if done is None:
        return NULL
    Py_INCREF(done)
    return <PyObject *>done


cdef object answer(int kind, PyObject *of_calls, PyObject *of_messages, PyObject **a):
    cdef Core core
    cdef Rings rings
    if kind == SEND or kind == RECV:
        if of_messages is NULL or of_messages is Py_None:
            return None
        rings = <Rings>of_messages
        if kind == SEND:
            return rings.send(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
        return rings.recv(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    if of_calls is NULL or of_calls is Py_None:
        return None
    core = <Core>of_calls
    if kind == ALLREDUCE:
        return core.allreduce(<object>a[0], <object>a[1], <object>a[2])
    elif kind == BROADCAST:
        return core.broadcast(<object>a[0], <object>a[1], <object>a[2])
    elif kind == REDUCE:
        return core.reduce(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    elif kind == BARRIER:
        return core.barrier(<object>a[0])
    elif kind == ALLGATHER:
        return core.allgather(<object>a[0], <object>a[1], <object>a[2])
    elif kind == ALL_GATHER_SINGLE:
        return core.all_gather_single(<object>a[0], <object>a[1], <object>a[2])
    elif kind == GATHER:
        return core.gather(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    elif kind == SCATTER:
        return core.scatter(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    elif kind == REDUCE_SCATTER:
        return core.reduce_scatter(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    elif kind == REDUCE_SCATTER_SINGLE:
        return core.reduce_scatter_single(<object>a[0], <object>a[1], <object>a[2], <object>a[3])
    elif kind == ALLTOALL:
        return core.alltoall(<object>a[0], <object>a[1], <object>a[2])
    elif kind == ALL_TO_ALL_SINGLE:
        return core.all_to_all_single(<object>a[0], <object>a[1], <object>a[2], <object>a[3], <object>a[4])
    elif kind == SCAN:
        return core.scan(<object>a[0], <object>a[1], <object>a[2])
    else:
        return core.exscan(<object>a[0], <object>a[1], <object>a[2])


def direct(cls):
    """Have the methods of a group's class ask its core first."""
    global group_class, at_core, at_rings
    cdef Method method
    group_class, at_core, at_rings = cls, slot_offset(cls._core), slot_offset(cls._rings)
    if at_core < 0 or at_rings < 0:
        raise TypeError("a group's core must be a slot")
    for name, kind in ASKED.items():
        method = Method(vars(cls)[name], kind)
        setattr(cls, name, method)
    make_callable(<PyObject *>Method, <char *>&method._called - <char *><void *>method)


ask_first = ask
