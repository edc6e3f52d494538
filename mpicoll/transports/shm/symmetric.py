"""Arrays in the node's shared memory (`ProcessGroup.empty`), which peers read and write in place.

Each is a mapped file with one part per rank.  An array may outlive its group: the mapping goes with
the last view of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Generator
from typing import Any

import numpy as np

from ...runtime.library import MPI
from ...runtime.memory import map_file

Array = np.ndarray[Any, Any]
Makes = Generator[int, None, "Array | None"]

_ALIGNED = 4096


class SharedArrays:
    """Those of one group, as one of its ranks sees them."""

    def __init__(self) -> None:
        self.made = 0  # alike on all ranks, as making one is a collective call
        self._parts: dict[int, list[Array]] = {}  # by number: all ranks' bytes

    def make(self, comm: MPI.Intracomm, nbytes: int) -> Makes:
        """Make one, and return this rank's bytes; None where there is no room.

        All ranks have arrived, and want the same.
        """
        rank, size = comm.Get_rank(), comm.Get_size()
        stride = -(-max(1, nbytes) // _ALIGNED) * _ALIGNED
        room = yield from map_file(comm, size * stride)
        self.made += 1
        if room is None:
            return None
        parts = [np.frombuffer(room, np.uint8, nbytes, r * stride) for r in range(size)]
        mine = np.frombuffer(room, np.uint8, nbytes, rank * stride)  # the base of all its views
        self._parts[self.made] = parts
        # May run anywhere, in the collector too: it only forgets.
        weakref.finalize(mine, self._parts.pop, self.made, None).atexit = False
        return mine

    def close(self) -> None:
        """Forget them: the group is closed.  Those that the user has stay as they are."""
        self._parts.clear()

    def find(self, array: Array, rank: int) -> tuple[int, int]:
        """Return the number of the array that this one is in, and where, in bytes; or 0, 0."""
        begin = array.ctypes.data
        for number, parts in list(self._parts.items()):
            offset = begin - parts[rank].ctypes.data
            if offset >= 0 and offset + array.nbytes <= parts[rank].nbytes:
                return number, offset
        return 0, 0

    def views(self, number: int, offsets: list[int], like: Array) -> list[Array]:
        """Return the ranks' counterparts of this rank's array, each at its own offset."""
        parts = zip(self._parts[number], offsets, strict=True)
        return [part[at : at + like.nbytes].view(like.dtype) for part, at in parts]
