"""How large the rings of a group are, and what goes through those of one rank."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from mpicoll.engine import kinds
from mpicoll.transports.shm import cma, rings

MIB = 2**20


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16, 33, 64, 128, 192])
def test_rings_shrink_with_the_number_of_ranks(ranks):
    ring, slots = rings.sizes(ranks)
    assert ring & (ring - 1) == 0, "lines are counted modulo a power of two"
    assert rings.LEAST <= ring <= rings.LARGEST and 8 <= slots <= 64
    assert ring // rings.LINE >= 16, "a packed payload, its dtype's name, and one line more"
    assert rings.nbytes(ranks) <= 1.2 * rings.ALL
    assert (rings.nbytes(ranks) == 0) == (ranks > 64), "of more they would take too much"


def test_sixty_four_ranks_take_a_few_mebibytes():
    assert rings.nbytes(2) < 2.1 * MIB and rings.nbytes(64) < 5 * MIB


@pytest.fixture
def own():
    """The rings of a group of one rank, and how to make its messages to itself."""
    native = pytest.importorskip("mpicoll.transports.shm._native")
    ring, slots = 1024, 8
    made = native.Rings(
        mmap.mmap(-1, 2 * rings.LINE + ring),
        (0, 1, *[0] * 8),
        True,
        ring=ring,
        slots=slots,
        packed=256,
        processes=(os.getpid(),),
        highest_tag=100,
        reads=True,
    )

    def message(kind, array, tag=5):
        return made.message(kind.code, array, 1, array.size, b"", 0, tag, 0)

    yield message
    made.close()


def through(message, array):
    """Send and receive an array; return what came."""
    into = np.zeros_like(array)
    sending, receiving = message(kinds.SEND, array), message(kinds.RECV, into)
    looks = 0
    while not (sending.advance() and receiving.advance()) and looks < 100:
        receiving.advance()
        looks += 1
    assert looks < 100 and not receiving.failed and receiving.wrong is None
    return into


def test_messages_of_any_size_lie_anywhere_in_a_ring(own):
    rng = np.random.default_rng(1)
    for size in (*range(300), *rng.integers(1, 2000, size=1000)):
        array = rng.integers(256, size=size, dtype=np.uint8)
        assert np.array_equal(through(own, array), array)


def test_memory_that_no_process_may_read_is_copied_first(own):
    """Such as CUDA's pinned memory; here what the kernel lends every process, for its clocks."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "[vvar]" in line:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            break
    else:
        pytest.skip("this kernel lends none")
    lent = np.frombuffer((ctypes.c_char * (end - start)).from_address(start), np.uint8)[:1024]
    with pytest.raises(OSError):
        cma.read(os.getpid(), start, np.zeros(8, np.uint8))
    assert through(own, lent).size == 1024
