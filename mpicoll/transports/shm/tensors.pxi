# How a tensor of PyTorch's is looked at without making an object of it, a part of _native.pyx.

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
    if seen.device_type != ON_CPU or seen.lanes != 1 or seen.code > 7 or i == 5 or seen.ndim > SHOWN:
        return False
    found.dtype, found.nbytes = borrowed[5 * seen.code + i], seen.bits // 8
    for i in range(seen.ndim - 1, -1, -1):
        if seen.shape[i] != 1 and seen.strides is not NULL and seen.strides[i] != count:
            return False
        count *= seen.shape[i]
        found.shape[i] = seen.shape[i]
    found.data, found.count, found.nbytes = seen.data + seen.byte_offset, count, count * found.nbytes
    found.rows, found.dimensions = seen.shape[0] if seen.ndim else 0, seen.ndim
    return found.dtype >= 0 and count > 0 and seen.data is not NULL
