"""Which memory the calls under way read and write, found by address whatever their number.

Spans of addresses are kept in order of their beginnings, by size: a list for each power of two.
What meets a span then lies in a short piece of each list.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Span = tuple[int, int]  # where it begins, and where it has ended
Spans = tuple[Span, ...]
T = TypeVar("T", bound=Hashable)


def apart(call: tuple[Spans, Spans], others: Iterable[tuple[Spans, Spans]]) -> bool:
    """Return whether none writes what a call reads or writes, or reads what that writes.

    Each is given as what it reads, and what it writes.
    """
    reads, writes = call
    for read, written in others:
        if _meet(writes, written) or _meet(writes, read) or _meet(reads, written):
            return False
    return True


def _meet(spans: Spans, others: Spans) -> bool:
    for start, stop in spans:
        for begin, end in others:
            if begin < stop and start < end:
                return True
    return False


class _Several(dict[T, None]):
    """The owners of one span, where there are more than one.

    (A dictionary for each span would be what the garbage collector looks at most.)
    """


class _Spans(Generic[T]):
    """Spans with their owners, who may share one."""

    def __init__(self) -> None:
        self._owners: dict[Span, T | _Several[T]] = {}
        self._by_size: dict[int, list[Span]] = {}  # by the bits of the size; each list in order

    def add(self, span: Span, owner: T) -> None:
        owners = self._owners.get(span)
        if owners is None:
            self._owners[span] = owner
            insort(self._by_size.setdefault((span[1] - span[0]).bit_length(), []), span)
        elif isinstance(owners, _Several):
            owners[owner] = None
        elif owners is not owner:
            self._owners[span] = _Several({owners: None, owner: None})

    def discard(self, span: Span, owner: T) -> None:
        owners = self._owners.get(span)
        if isinstance(owners, _Several):
            owners.pop(owner, None)
            if owners:
                return
        elif owners is None or owners is not owner:
            return
        del self._owners[span]
        bits = (span[1] - span[0]).bit_length()
        spans = self._by_size[bits]
        del spans[bisect_left(spans, span)]
        if not spans:
            del self._by_size[bits]

    def __bool__(self) -> bool:
        return bool(self._owners)

    def meeting(self, span: Span) -> T | None:
        """Return an owner of one that shares an address with `span`."""
        start, stop = span
        for bits, spans in self._by_size.items():
            at = bisect_left(spans, (stop,)) - 1  # the last that begins before `span` ends
            while at >= 0 and spans[at][0] > start - (1 << bits):
                if spans[at][1] > start:
                    owners = self._owners[spans[at]]
                    return next(iter(owners)) if isinstance(owners, _Several) else owners
                at -= 1
        return None


class Claims(Generic[T]):
    """What is read and what is written, by whom."""

    def __init__(self) -> None:
        self._read: _Spans[T] = _Spans()
        self._written: _Spans[T] = _Spans()

    def __bool__(self) -> bool:
        """Return whether anything is read or written."""
        return bool(self._read) or bool(self._written)

    def add(self, reads: Iterable[Span], writes: Iterable[Span], owner: T) -> None:
        """Note what an owner reads and writes."""
        for span in reads:
            self._read.add(span, owner)
        for span in writes:
            self._written.add(span, owner)

    def discard(self, reads: Iterable[Span], writes: Iterable[Span], owner: T) -> None:
        """Forget it; does nothing where it was never noted."""
        for span in reads:
            self._read.discard(span, owner)
        for span in writes:
            self._written.discard(span, owner)

    def conflicting(self, reads: Iterable[Span], writes: Iterable[Span]) -> T | None:
        """Return an owner who writes what is to be read, or uses what is to be written."""
        for span in reads:
            if (owner := self._written.meeting(span)) is not None:
                return owner
        for span in writes:
            if (owner := self._written.meeting(span)) is not None:
                return owner
            if (owner := self._read.meeting(span)) is not None:
                return owner
        return None
