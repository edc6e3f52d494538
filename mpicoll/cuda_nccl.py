"""A communicator of NCCL by way of nccl4py, made so that nothing asked of it blocks.

A call returns at once.  Until `settled` says that it is done (the first ones between two ranks
connect them, which takes both), the communicator may be asked for nothing else, but it can be
aborted: so a deadline holds whatever a peer does.  CuPy's own binding makes no such communicators.
The only module that imports nccl4py, when the first group that may use NCCL is made.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from .cuda import Gpu
from .errors import TransportError, UnsupportedError
from .library import IDLE, Steps

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
    config.blocking = 0
    config.launch_order_implicit = 1
    with gpu.active():  # NCCL takes the GPU that is current
        handle = binding.comm_init_rank_config(
            size, binding.UniqueId.from_buffer(name), rank, config
        )
    return Communicator(binding, gpu, handle)


class Communicator:
    """Keeps `transports.nccl.Nccl`: the addresses, counts and numbers are NCCL's own."""

    def __init__(self, binding: Any, gpu: Gpu, handle: Any, parent: Any = None) -> None:
        self._binding, self._gpu, self._handle = binding, gpu, handle
        self._parent = parent  # that this one is being split off from

    def settled(self) -> bool:
        """Return whether what was asked of it is done.

        Raises:
            TransportError: it failed.
        """
        for handle in (self._parent, self._handle):
            if not handle:
                continue
            status = int(self._binding.comm_get_async_error(handle))
            if status == _IN_PROGRESS:
                return False
            if status != _SUCCESS:
                said = self._binding.get_last_error(handle)
                raise TransportError(
                    f"NCCL failed: {self._binding.get_error_string(status)}. {said}", code=status
                )
        self._parent = None
        return True

    def split(self, color: int, key: int) -> Communicator:
        """Begin to make a part of it, as all its ranks do: it is made when it is `settled`.

        Ranks of color -1 are in no part: theirs is good for nothing else.
        """
        with self._gpu.active():
            handle = self._binding.comm_split(self._handle, color, key, 0)
        return Communicator(self._binding, self._gpu, handle, self._handle)

    def close(self) -> Steps:
        """Give it back; all its ranks do so now."""
        handle = self._handle
        with self._gpu.active():
            self._binding.comm_finalize(handle)
        while not self.settled():
            yield IDLE
        self._handle = None
        with self._gpu.active():
            self._binding.comm_destroy(handle)

    def abort(self) -> None:
        """Give it up: its kernels, which wait for the peers, end.  Returns at once."""
        handle, self._handle = self._handle, None
        if handle is None or sys.is_finalizing() or not threading.main_thread().is_alive():
            return  # the end of the process sets the GPU free, and no thread can be started
        threading.Thread(
            target=self._abort, args=(handle,), name="mpicoll NCCL abort", daemon=True
        ).start()

    def _abort(self, handle: Any) -> None:
        with contextlib.suppress(Exception), self._gpu.active():
            self._binding.comm_abort(handle)

    # ---- what is put on a stream ----

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """Make all calls in a with-block one."""
        self._binding.group_start()
        try:
            yield
        finally:
            self._binding.group_end()

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
