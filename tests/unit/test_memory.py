"""The node's memory without MPI: lines and notices, as the other ranks see them."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from mpicoll.runtime.memory import (
    FEW,
    IN_LINE,
    LARGEST,
    MIX,
    NodeMemory,
    bytes_of,
    digest_of,
)

BYTE = np.dtype(np.uint8)


@pytest.fixture
def ranks():
    room = mmap.mmap(-1, bytes_of(3))
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


RECORD = (1, 11, 2, -1, 100, 2**62, 0)  # what a record says after its number


def several(size):
    room = mmap.mmap(-1, bytes_of(size))
    return [NodeMemory(room, rank, size) for rank in range(size)]


@pytest.fixture(params=[2, 3, FEW, FEW + 1, 3 * FEW])
def many(request, monkeypatch):
    monkeypatch.setattr("mpicoll.runtime.memory.has_cores_for", lambda size: False)
    return several(request.param)


def test_who_posts_last_sees_that_all_are_there(many):
    *others, last = many
    for seq in (1, 2, 3):
        for memory in others:
            assert memory.post((seq, *RECORD), memory.rank) == -1
        assert last.missing(seq) == [last.rank]
        assert last.post((seq, *RECORD), 5) == max(5, others[-1].rank)
        for memory in many:
            assert memory.missing(seq) == []
            assert memory.agreed(seq) == max(5, others[-1].rank)


@pytest.mark.parametrize("field", range(len(RECORD)))
def test_a_difference_in_any_field_is_seen(many, field):
    other = [*RECORD]
    other[field] += 1
    for memory in many[:-1]:
        memory.post((1, *RECORD), 0)
    assert many[-1].post((1, *other), 0) == -1
    assert many[0].missing(1) == [] and many[0].agreed(1) == -1
    assert [tuple(row) for row in many[0].records(1)] == [
        *[(1, *RECORD, 0)] * (len(many) - 1),
        (1, *other, 0),
    ]


def test_small_differences_in_several_fields_do_not_cancel_out():
    ranges = range(37), range(-1, 6), range(-1, 9), range(-1, 4), range(20), range(1), range(3)
    digests = np.zeros(1, np.uint64)
    for values, factor in zip(ranges, MIX, strict=True):
        products = np.array([value * factor % 2**64 for value in values], np.uint64)
        digests = np.add.outer(digests, products).ravel()
    assert np.unique(digests).size == digests.size
    last = tuple(values[-1] for values in ranges)
    assert digest_of(last) % 2**64 == digests[-1]


def test_what_comes_two_calls_later_does_not_agree(many):
    for memory in many:
        memory.post((1, *RECORD), 0)
    many[-1].post((3, *RECORD), 0)
    assert many[0].agreed(1) == -1 and many[0].missing(1) == [many[-1].rank]


def test_who_has_left_is_seen_from_that_call_on(many):
    many[-1].leave(4)
    assert [many[0].leavers(seq) for seq in (3, 4, 5)] == [[], [many[-1].rank], [many[-1].rank]]
    assert many[0].has_left(many[-1].rank, 5) and not many[0].has_left(many[-1].rank, 3)
    assert many[-1].leavers(5) == []


def test_data_in_lines_and_rooms_are_apart(many):
    for memory in many:
        for seq in (4, 5):
            memory.in_lines(seq, BYTE)[memory.rank][:] = memory.rank + seq
            memory.payloads(seq, BYTE)[memory.rank][:] = memory.rank + seq
        memory.leave(9)
        memory.announce(77)
        memory.post((4, *RECORD), 1)
    for memory in many:
        for seq in (4, 5):
            for rows in (memory.in_lines(seq, BYTE), memory.payloads(seq, BYTE)):
                assert [set(row.tolist()) for row in rows] == [{r + seq} for r in range(len(many))]
    assert many[0].in_lines(4, BYTE)[0].size == IN_LINE


def test_what_a_group_takes():
    assert bytes_of(128) <= 128 * 24 * 2**10, "of fifty groups of 128 ranks 150 MiB"
    assert bytes_of(2) >= 2 * 2 * LARGEST
