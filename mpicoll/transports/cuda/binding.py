"""A communicator of NCCL by way of nccl4py.  What may wait for a peer is done aside, in a thread.

Making a communicator, splitting it, giving it back, and the first call of a kind and size, which
connects the ranks, may each block for as long as a peer does not come.  So a thread makes these
calls, and `settled` returns whether they are over.  Until then the communicator is asked for
nothing else, but it can be aborted, so that a deadline holds whatever a peer does.  All other calls
only put work on a stream.

(NCCL's own non-blocking communicators start a thread in *every* call: docs/decisions.md.)  The only
module that imports nccl4py, when the first group that may use NCCL is made.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ...errors import TransportError, UnsupportedError, interrupts
from ...runtime.library import IDLE, Steps
from .gpu import Gpu

_SUCCESS, _IN_PROGRESS = 0, 7  # of ncclResult_t
_ON_HOST = 1  # ncclScalarHostImmediate: the factor is read before the call returns
_REALS = {7: np.float32, 8: np.float64}  # by NCCL's number of the type


def load() -> Any:
    """Return nccl4py's binding.

    Raises:
        UnsupportedError: it can't be imported, or finds no NCCL.
    """
    try:
        binding = importlib.import_module("nccl.bindings.nccl")
        binding.get_version()
    except Exception as error:  # it has classes of its own for a library that is not there
        raise UnsupportedError(
            f"nccl4py, by which NCCL is called, can't be used ({type(error).__name__}: {error}): "
            "pip install 'mpicoll[cuda12]' or 'mpicoll[cuda13]' brings it"
        ) from error
    return binding


def version() -> int:
    """Return NCCL's version as NCCL writes it, such as 23007.

    Raises:
        UnsupportedError: there is none.
    """
    return int(load().get_version())


def unique_id() -> bytes:
    """Return a new name for a communicator, which one rank gives to all."""
    return bytes(load().get_unique_id())


def join(gpu: Gpu, size: int, name: bytes, rank: int) -> Communicator:
    """Begin to make a communicator, as all its ranks do: it is made when it is `settled`."""
    binding = load()
    config = binding.Config()
    config.launch_order_implicit = 1

    def make() -> Any:
        unique = binding.UniqueId.from_buffer(name)
        return binding.comm_init_rank_config(size, unique, rank, config)

    return Communicator(binding, gpu, make)


class _Aside(threading.Thread):
    """A call of NCCL that may block, in a thread of its own; the GPU is the current one there."""

    def __init__(self, gpu: Gpu, call: Callable[[], Any]) -> None:
        super().__init__(name="mpicoll NCCL", daemon=True)
        self._gpu, self._call = gpu, call
        self.over = False
        self.value: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        """Make the call."""
        try:
            with self._gpu.active():  # NCCL takes the GPU that is current
                self.value = self._call()
        except Exception as error:
            self.error = error
        self.over = True


_given_up: set[Communicator] = set()  # those that NCCL is about to take back after an abort


class Communicator:
    """Keeps `cuda.nccl.Nccl`: the addresses, counts and numbers are NCCL's own.

    Args:
        make: makes NCCL's communicator, aside.
    """

    def __init__(self, binding: Any, gpu: Gpu, make: Callable[[], Any]) -> None:
        self._binding, self._gpu = binding, gpu
        self._handle: Any = None
        self._aborted = False
        self._warm: set[Hashable] = set()
        self._aside: _Aside | None = _Aside(gpu, make)
        self._then: Callable[[Any], None] = self._made

    def _made(self, handle: Any) -> None:
        self._handle = handle

    def is_quiet(self) -> bool:
        """Return whether no communicator of this process is being given up."""
        return not _given_up

    def knows(self, like: Hashable) -> bool:
        """Return whether such operations were performed before."""
        return like in self._warm

    def settled(self) -> bool:
        """Return whether what was asked of it is done.

        Raises:
            TransportError: it failed.
        """
        if self._aborted:
            raise TransportError("NCCL failed: its communicator was aborted.")
        aside = self._aside
        if aside is not None:
            if not aside.over:
                return False
            self._aside = None
            if aside.error is not None:
                raise self._failed(aside.error) from aside.error
            self._then(aside.value)
        if self._handle:
            status = int(self._binding.comm_get_async_error(self._handle))
            if status not in (_SUCCESS, _IN_PROGRESS):
                raise self._failed(self._binding.get_error_string(status), status)
        return True

    def perform(self, operations: Sequence[Callable[[], None]], like: Hashable) -> bool:
        """Put operations on a stream, as one; return whether that is done, or goes on aside.

        Args:
            like: equal for operations that find the ranks connected once one of them was performed.

        Raises:
            TransportError: NCCL failed.
        """
        if like not in self._warm:
            self._aside = _Aside(self._gpu, partial(self._perform, operations))
            self._then = lambda _: self._warm.add(like)
            return False
        try:
            self._perform(operations)
        except Exception as error:  # of NCCL, in a class of its own
            if interrupts(error):
                raise
            raise self._failed(error) from error
        return True

    def _perform(self, operations: Sequence[Callable[[], None]]) -> None:
        if len(operations) == 1:  # a group of one costs some microseconds more
            operations[0]()
        elif operations:
            self._binding.group_start()
            try:
                for operation in operations:
                    operation()
            finally:
                self._binding.group_end()

    def _failed(self, why: object, status: int = 0) -> TransportError:
        detail = self._binding.get_last_error(self._handle) if self._handle else ""
        return TransportError(
            f"NCCL failed: {why}. {detail}".rstrip(". ") + ".",
            code=status or int(getattr(why, "status", 0)),
        )

    def split(self, color: int, key: int) -> Communicator:
        """Begin to make a part of it, as all its ranks do: it is made when it is `settled`.

        Ranks of color -1 are in no part: theirs is good for nothing else.
        """
        split = partial(self._binding.comm_split, self._handle, color, key, 0)
        return Communicator(self._binding, self._gpu, split)

    def close(self) -> Steps:
        """Give it back; all its ranks do so now."""
        self._aside = _Aside(self._gpu, partial(self._binding.comm_finalize, self._handle))
        self._then = lambda _: None
        while not self.settled():
            yield IDLE
        handle, self._handle = self._handle, None  # all ranks have done with it
        self._aside = _Aside(self._gpu, partial(self._binding.comm_destroy, handle))
        while not self.settled():
            yield IDLE

    def abort(self) -> None:
        """Give it up: its kernels, which wait for the peers, end.  Returns at once."""
        if self._aborted or sys.is_finalizing() or not threading.main_thread().is_alive():
            return  # the end of the process sets the GPU free, and no thread can be started
        self._aborted = True
        if self._handle:
            _given_up.add(self)
        try:
            _Aside(self._gpu, partial(self._give_up, None if self._handle else self._aside))
        except RuntimeError:  # for want of threads
            _given_up.discard(self)
            raise

    def _give_up(self, making: _Aside | None) -> None:
        if making is not None:  # NCCL gives nothing to abort before it is made
            making.join()
        handle = self._handle or (making and making.value)
        if handle:
            _given_up.add(self)
            try:
                self._binding.comm_abort(handle)
            finally:
                _given_up.discard(self)

    # ---- what is put on a stream ----

    def all_reduce(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None:
        self._binding.all_reduce(src, dst, n, kind, op, self._handle, stream)

    def reduce(
        self, src: int, dst: int, n: int, kind: int, op: int, root: int, stream: int
    ) -> None:
        self._binding.reduce(src, dst, n, kind, op, root, self._handle, stream)

    def broadcast(self, src: int, dst: int, n: int, kind: int, root: int, stream: int) -> None:
        self._binding.broadcast(src, dst, n, kind, root, self._handle, stream)

    def reduce_scatter(self, src: int, dst: int, n: int, kind: int, op: int, stream: int) -> None:
        self._binding.reduce_scatter(src, dst, n, kind, op, self._handle, stream)

    def all_gather(self, src: int, dst: int, n: int, kind: int, stream: int) -> None:
        self._binding.all_gather(src, dst, n, kind, self._handle, stream)

    def send(self, src: int, n: int, kind: int, peer: int, stream: int) -> None:
        self._binding.send(src, n, kind, peer, self._handle, stream)

    def recv(self, dst: int, n: int, kind: int, peer: int, stream: int) -> None:
        self._binding.recv(dst, n, kind, peer, self._handle, stream)

    def premul_sum(self, kind: int, factor: float) -> int:
        """Make an operator: the sum of each rank's elements times its factor."""
        scalar = np.array(factor, _REALS[kind])
        return int(
            self._binding.red_op_create_pre_mul_sum(
                scalar.ctypes.data, kind, _ON_HOST, self._handle
            )
        )

    def drop(self, op: int) -> None:
        """Give an operator back, once the calls that take it were made."""
        self._binding.red_op_destroy(op, self._handle)
