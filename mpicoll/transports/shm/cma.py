"""One copy out of another process's memory, where the system permits it.

Linux calls it cross-memory attach, `process_vm_readv`.  It asks for the right to trace the other
process, which containers and hardened systems may refuse: so try it before you rely on it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("length", ctypes.c_size_t))


@functools.cache
def _readv() -> Any:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    span, number = ctypes.POINTER(_Span), ctypes.c_ulong
    function.argtypes = (ctypes.c_int, span, number, span, number, number)
    function.restype = ctypes.c_ssize_t
    return function


def read(process: int, address: int, into: Array) -> None:
    """Fill a contiguous array from an address of another process.

    Raises:
        OSError: the system doesn't permit it, or the process is gone.
    """
    here, left = into.ctypes.data, into.nbytes
    while left:
        mine, theirs = _Span(here, left), _Span(address, left)
        done = _readv()(process, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
        if done <= 0:
            error = ctypes.get_errno()
            raise OSError(error, f"process_vm_readv from process {process}: {os.strerror(error)}")
        here, address, left = here + done, address + done, left - done


def can_read(process: int, address: int, expected: int) -> bool:
    """Return whether another process's 64-bit word can be read, and is what was expected.

    The same process number may mean another process in another container: hence the word.
    """
    word = np.zeros(1, dtype=np.int64)
    try:
        read(process, address, word)
    except (OSError, AttributeError):  # not permitted; or the system has no such call
        return False
    return int(word[0]) == expected
