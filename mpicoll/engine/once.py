"""Calls that go without arrival, in groups with checks="first": all that were compared once."""

from __future__ import annotations

from .call import Call, digest
from .records import Record, record_of

_MIX, _LOW = 6364136223846793005, (1 << 63) - 1  # the multiplier is Knuth's, of MMIX


class Once:
    """Which calls of a group go without arrival, where checks="first": all that were compared once.

    It is asked when a call has its turn, after all earlier ones.  Whatever the ranks have compared
    by then, they have compared together: so they agree on what goes without, as long as they make
    the same calls.  Those that went without are counted, and condensed to a number that is part of
    the next record: that they were the same is found out then, at the latest after `AGAIN` calls.

    Attributes:
        count: calls that went without since the last record.
        last: the last of them.
    """

    AGAIN = 1000
    ROOM = 10_000  # calls that are remembered

    def __init__(self) -> None:
        self._known: dict[Record, int] = {}
        self.count = 0
        self.last: Call | None = None
        self._chain = 0

    def goes_without(self, call: Call) -> bool:
        """Return whether a call needs no arrival, and count it then."""
        if call.turn is None or not call.kind.alike or self.count >= self.AGAIN:
            return False
        number = self._known.get(record_of(call, 0))
        if number is None:
            return False
        self.count += 1
        self.last = call
        self._chain = (self._chain * _MIX + number) & _LOW
        return True

    def before(self, call: Call) -> Record:
        """Put into the record of a call what went without since the last; return it as it was."""
        record = record_of(call, 0)
        if self.count:
            call.chain = digest(self.count, self._chain)
            call.digest = digest(call.digest, call.chain)
            call.since = f", after {self.said()}"
        self.count, self._chain, self.last = 0, 0, None
        return record

    def said(self) -> str:
        """Say what went without since the last record."""
        if self.last is None:
            return "none"
        calls = "1 call that was" if self.count == 1 else f"{self.count} calls that were"
        return f"{calls} not compared, the last {self.last.describe()}"

    def after(self, record: Record) -> None:
        """Note that a call was compared, and is the same on all ranks."""
        if len(self._known) < self.ROOM:
            self._known.setdefault(record, digest(*record))
