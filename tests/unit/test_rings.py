"""How large the rings of a group are."""

from __future__ import annotations

import pytest

from mpicoll.transports.shm import rings

MIB = 2**20


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8, 16, 33, 64, 128, 192])
def test_rings_shrink_with_the_number_of_ranks(ranks):
    ring, slots = rings.sizes(ranks)
    assert ring & (ring - 1) == 0, "lines are counted modulo a power of two"
    assert rings.LEAST <= ring <= rings.LARGEST and 8 <= slots <= 64
    assert ring // rings.LINE >= 16, "a packed payload, its dtype's name, and one line more"
    assert rings.nbytes(ranks) <= max(1.1 * rings.ALL, ranks**2 * 1200)


def test_sixty_four_ranks_take_a_few_mebibytes():
    assert rings.nbytes(2) < 2.1 * MIB and rings.nbytes(64) < 5 * MIB
