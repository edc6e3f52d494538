"""What memory is in use, against a list that is looked through."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mpicoll.engine.claims import Claims

SPAN = st.tuples(st.integers(0, 300), st.sampled_from([1, 2, 3, 8, 60, 250])).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
SPANS = st.lists(SPAN, max_size=3)
CALLS = st.lists(st.tuples(SPANS, SPANS, st.booleans()), max_size=40)


def meet(some, others):
    return any(a < d and c < b for a, b in some for c, d in others)


@settings(max_examples=300, deadline=None)
@given(CALLS)
def test_what_conflicts_is_what_a_look_at_all_of_them_finds(calls):
    claims, known = Claims(), {}
    for number, (reads, writes, keep) in enumerate(calls):
        expected = {
            owner
            for owner, (their_reads, their_writes) in known.items()
            if meet(writes, their_writes + their_reads) or meet(reads, their_writes)
        }
        found = claims.conflicting(reads, writes)
        assert (found in expected) if expected else found is None
        claims.add(reads, writes, number)
        known[number] = reads, writes
        if not keep and known:
            gone, spans = known.popitem() if number % 2 else (min(known), known.pop(min(known)))
            claims.discard(*spans, gone)
    for owner, spans in known.items():
        claims.discard(*spans, owner)
        claims.discard(*spans, owner)  # a second time does nothing
    assert claims.conflicting([(0, 1000)], [(0, 1000)]) is None
    assert not claims._read._by_size and not claims._written._owners


def test_a_span_may_have_many_owners_and_one_may_read_what_others_read():
    claims = Claims()
    for owner in range(1000):
        claims.add([(0, 8)], [], owner)
    assert claims.conflicting([(0, 8)], []) is None
    assert claims.conflicting([], [(7, 9)]) is not None
    for owner in range(1000):
        claims.discard([(0, 8)], [], owner)
    assert claims.conflicting([], [(7, 9)]) is None


def test_spans_that_only_touch_do_not_meet():
    claims = Claims()
    claims.add([], [(8, 16)], "a")
    assert claims.conflicting([], [(0, 8), (16, 24)]) is None
    assert claims.conflicting([(15, 16)], []) == "a" == claims.conflicting([], [(0, 9)])
