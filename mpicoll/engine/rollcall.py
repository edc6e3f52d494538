"""The roll call: how the ranks that wait in a call agree on who is missing there.

Shortly before a deadline a rank calls the lowest rank that has arrived in the call: it decides,
once, and tells all who called it.  So the ranks that give up name one set, however far apart their
clocks are, and whoever comes in just then.  On a node the board shows who is the lowest; it calls
the lowest of all on behalf of those that called it.

A rank that has not answered yet is not missing.  The one that decides asks all of which nothing is
known, and some that wait with it.  From the answers of these it knows how long an answer takes, on
a machine with too many ranks, too: whoever is silent for much longer is outside the library.  The
deadline is exceeded for that, but never by more than `GRACE`.

Nothing here sends, or looks at a clock: `peers.py` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

SHOWN = 8  # ranks that are described in an error; the rest are counted
PATIENCE = 0.02  # seconds until silence means anything, at least
OFTEN = 3  # times the longest time that an answer took: until silence means something
SAMPLE = 16  # ranks that are asked only to see how long an answer takes
GRACE = 1.5  # seconds past the deadline after which the rank that decides waits no more
LOST = 2.0  # and those who wait for its verdict
_SAID = 280  # characters of what a rank says of itself, in a verdict


class Said(NamedTuple):
    """What a rank says of itself: in words, and in which calls of other groups it waits."""

    text: str
    calls: tuple[tuple[str, int], ...] = ()  # the group's mark, and the call's number there


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is missing in a call, and what those of them say who answered.

    `said` is None where there was no room for it.
    """

    seq: int
    by: int
    missing: tuple[int, ...]
    said: dict[int, Said] | None = field(default_factory=dict)

    def encode(self, room: float = math.inf) -> str:
        """Return it as text of `room` characters at most; "" if it doesn't fit."""
        told = {rank: (said.text[:_SAID], said.calls) for rank, said in (self.said or {}).items()}
        for known in (None if self.said is None else told, None):
            text = json.dumps([self.seq, self.by, to_ranges(self.missing), known])
            if len(text) <= room:
                return text
        return ""

    @classmethod
    def decode(cls, text: str) -> Verdict:
        """Return what was encoded."""
        seq, by, missing, known = json.loads(text)
        said = None
        if known is not None:
            said = {
                int(rank): Said(words, tuple((mark, number) for mark, number in calls))
                for rank, (words, calls) in known.items()
            }
        return cls(seq, by, tuple(from_ranges(missing)), said)


class RollCall:
    """One rank's part in finding out who is missing in one call.

    Args:
        seq: the call's number.
        now: when it begins, as in all methods.
        near: the ranks of which `sees` knows whether they have arrived.
        sees: whether a rank is seen to have arrived.
        lost: whether a rank can't answer, since it is dead or stopped.

    Attributes:
        arrived: ranks that are known to have arrived.
        followers: ranks that wait for the verdict of this one.
        deadline: when the verdict is due.
        verdict: who is missing, once that is decided.
    """

    def __init__(
        self,
        seq: int,
        rank: int,
        size: int,
        now: float,
        *,
        near: Collection[int] = (),
        sees: Callable[[int], bool] = lambda rank: False,
        lost: Callable[[int], bool] = lambda rank: False,
    ) -> None:
        self.seq, self.rank, self.size = seq, rank, size
        self.arrived: set[int] = set()
        self.followers: set[int] = set()
        self.deadline = math.inf
        self.verdict: Verdict | None = None
        self._near = frozenset(near) - {rank}
        self._sees, self._lost = sees, lost
        self._lowest = rank  # of those that have arrived
        self._away: dict[int, Said] = {}
        self._asked: dict[int, float] = {}  # those who owe an answer, and since when
        self._called: set[int] = set()  # ranks that this one wants to decide
        self._candidate, self._width = 0, 1  # who is called next, and how many at a time
        self._sample: list[int] = []
        self._slowest = 0.0  # seconds that an answer took, or that this rank did not look
        self._begun = self._looked = now
        self._questioned = self._again = False
        self._alone = -math.inf  # since when it decides whoever is lower
        self._add((rank,))

    # ---- what is heard ----

    def is_called(self, rank: int, arrived: Collection[int], remaining: float, now: float) -> None:
        """Note that a rank waits for this one's verdict, in `remaining` seconds at the latest."""
        self._add((rank, *arrived))
        self.followers.add(rank)
        self.deadline = min(self.deadline, now + max(0.0, remaining))

    def hear(
        self, rank: int, there: bool, arrived: Collection[int], said: Said, now: float
    ) -> None:
        """Note an answer: whether a rank is in the call, who else is, and what it says."""
        asked = self._asked.pop(rank, None)
        if asked is not None:
            self._slowest = max(self._slowest, now - asked)
        self._add(arrived)
        if there:
            self._add((rank,))
        elif rank not in self.arrived:
            self._away[rank] = said

    def has_arrived(self, *ranks: int) -> None:
        """Note that ranks have arrived."""
        self._add(ranks)

    def adopt(self, verdict: Verdict) -> None:
        """Take over another rank's verdict; the first one counts."""
        if self.verdict is None:
            self.verdict = verdict

    def _add(self, ranks: Collection[int]) -> None:
        self.arrived.update(ranks)
        self._lowest = min(self._lowest, *ranks, self.rank)

    # ---- what is done ----

    def turn(self, now: float) -> tuple[list[int], list[int]]:
        """Go on; return whom to call, and whom to ask where it is."""
        calls: list[int] = []
        questions: list[int] = []
        self._slowest = max(self._slowest, now - self._looked)
        self._looked = now
        if self.verdict is None:
            self._add([r for r in self._near if r not in self.arrived and self._sees(r)])
            if self._is_alone:
                self._decide(now, questions)
            elif self._lowest < self.rank:
                if self._lowest not in self._called:
                    calls.append(self._lowest)
            elif self._is_lowest(now, calls):
                self._decide(now, questions)
        for rank in calls:
            self._called.add(rank)
        for rank in (*calls, *questions):
            self._asked.setdefault(rank, now)
        return calls, questions

    def give_up_waiting(self, now: float) -> None:
        """Decide alone: whoever should have done so is silent."""
        if not self._is_alone:
            self._alone = now

    def everyone_is_there(self, now: float) -> bool:
        """Return whether all have arrived, and whoever should have said so is silent."""
        return len(self.arrived) == self.size and now >= self.deadline + self._patience

    @property
    def _is_alone(self) -> bool:
        return self._alone > -math.inf

    @property
    def _patience(self) -> float:
        return max(PATIENCE, OFTEN * self._slowest)

    def _is_lowest(self, now: float, calls: list[int]) -> bool:
        """Return whether no lower rank is in the call; call some of them if that is not known.

        Most often rank 0 is.  If those that were called don't answer, ever more are called.
        """
        while True:
            patience = max(PATIENCE, self._slowest)  # those who are slow may still answer
            if any(now - self._asked.get(r, -math.inf) < patience for r in self._called):
                return False
            if self._candidate == self.rank:
                return True
            first = len(calls)
            while self._candidate < self.rank and len(calls) < first + self._width:
                rank = self._candidate
                self._candidate += 1
                if rank in self._near or rank in self._away or self._lost(rank):
                    continue  # it is not in the call
                calls.append(rank)
            self._width *= 4
            if len(calls) > first:
                return False

    def _decide(self, now: float, questions: list[int]) -> None:
        if len(self.arrived) == self.size:
            if now >= self.deadline:
                self.adopt(Verdict(self.seq, self.rank, ()))
            return
        if not self._questioned:
            if now < (self._begun + self.deadline) / 2:
                return  # most say by themselves that they are there
            self._questioned = True
            followers = sorted(self.followers - self._near)
            self._sample = followers[:: -(-len(followers) // SAMPLE) or 1]
            known = self._away.keys() | self._asked.keys()
            questions += [rank for rank in self._absent() if rank not in known]
            questions += self._sample
        if now < self.deadline:
            return
        if not self._again:  # those who were elsewhere may have come since
            self._again = True
            away = [rank for rank in self._away if rank not in self._near]
            questions += [rank for rank in away if rank not in self._asked]
        end = max(self.deadline, self._alone) + GRACE
        if now < end and (questions or self._may_answer(now)):
            return
        absent = self._absent()
        said = {rank: self._away[rank] for rank in absent[:SHOWN] if rank in self._away}
        self.adopt(Verdict(self.seq, self.rank, tuple(absent), said))

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.size) if rank not in self.arrived]

    def _may_answer(self, now: float) -> bool:
        """Return whether an answer can still be expected that might change the verdict."""
        silent = sum(rank in self._asked for rank in self._sample)
        if 2 * silent > len(self._sample):
            return True  # even those that wait with us have not had their turn
        patience = self._patience
        return any(
            # Of those that are near the answer is wanted only for the sake of the message.
            now - asked < (PATIENCE if rank in self._near else patience)
            and rank not in self.arrived
            and not self._lost(rank)
            for rank, asked in self._asked.items()
        )


def to_ranges(ranks: Iterable[int]) -> str:
    """Write ranks as ``0-4,6``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def from_ranges(text: str) -> list[int]:
    """Read what `to_ranges` has written."""
    found: list[int] = []
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
