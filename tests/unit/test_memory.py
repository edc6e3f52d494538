"""The node's memory without MPI: notices, as the other ranks see them."""

from __future__ import annotations

import mmap

import pytest

from mpicoll.runtime.memory import NodeMemory, bytes_per_rank


@pytest.fixture
def ranks():
    room = mmap.mmap(-1, 3 * bytes_per_rank(3))
    return [NodeMemory(room, rank, 3) for rank in range(3)]


def test_a_notice_is_seen_for_its_own_call(ranks):
    assert ranks[0].notice(1, 7) == b""
    assert ranks[1].post_notice(7, b"who is missing")
    for memory in ranks:
        assert memory.notice(1, 7) == b"who is missing"
        assert memory.notice(1, 6) == memory.notice(1, 8) == memory.notice(2, 7) == b""
    assert ranks[1].post_notice(8, b"others")
    assert ranks[0].notice(1, 8) == b"others" and ranks[0].notice(1, 7) == b""


def test_a_notice_for_which_there_is_no_room_changes_nothing(ranks):
    ranks[0].post((7, 1, 2, 3, 4, 5, 6, 0), 9)
    assert ranks[0].post_notice(7, b"x" * 2048)
    assert not ranks[0].post_notice(8, b"x" * 2049)
    assert ranks[1].notice(0, 7) == b"x" * 2048
    assert ranks[1].has_posted(0, 7) and not ranks[1].has_posted(1, 7)
    assert ranks[1].notice(1, 7) == b"", "it has run over into the next rank's page"
