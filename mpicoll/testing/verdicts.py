"""What became of one test, out of what became of it on each rank.

A rank that hears of a peer's failure in a call, and fails by that, *follows*.  What followed is
told in a line, behind its cause.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_OWN = re.compile(r"0x[0-9a-f]+|\b\d+\.\d+ s\b|rank \d+ of \d+")
CAUSE, LATE, FOLLOWS = range(3)  # how near a failure is to the first one


@dataclass
class Phase:
    """How the set-up, the call or the tear-down of a test ended on one rank.

    Attributes:
        outcome: "passed", "skipped" or "failed", as pytest says.
        xfail: the reason, if that was expected, or would have been.
        text: the failure in full.
        output: what was captured, each with its title.
        line: the same, or why it was skipped, in a line.
        place: file, line and message, as pytest's short summary and JUnit want them.
        degree: CAUSE, LATE (it waited until a deadline passed) or FOLLOWS.
        at: when, in seconds of the epoch.
    """

    when: str
    outcome: str
    xfail: str | None = None
    text: str = ""
    line: str = ""
    place: tuple[str, int, str] = ("", 0, "")
    degree: int = CAUSE
    at: float = 0.0
    output: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Part:
    """What became of a test on one rank.

    Attributes:
        phases: none, where it took no part.
        told: whether it has broken the test's groups, to let its peers know.
    """

    rank: int
    phases: list[Phase] = field(default_factory=list)
    told: bool = False

    @property
    def worst(self) -> Phase | None:
        """The first phase that did not simply pass, or the last; a failure before all others."""
        for phase in self.phases:
            if phase.outcome == "failed":
                return phase
        for phase in self.phases:
            if phase.outcome != "passed" or phase.xfail is not None:
                return phase
        return self.phases[-1] if self.phases else None


@dataclass
class Verdict:
    """What all ranks report of one phase; of those that have none, that it passed."""

    when: str
    outcome: str
    xfail: str | None = None
    text: str = ""
    place: tuple[str, int, str] = ("", 0, "")


def agree(parts: Sequence[Part], size: int) -> list[Verdict]:
    """Return what is to be reported of the phases that did not simply pass.

    A test failed if it failed on any rank; it was skipped if all ranks that took part skipped it.

    Args:
        parts: in the order of the ranks.
        size: the number of ranks in the world.
    """
    found = [(part.rank, worst) for part in parts if (worst := part.worst) is not None]
    failed = [(rank, phase) for rank, phase in found if phase.outcome == "failed"]
    xfailed = [p for _, p in found if p.outcome == "skipped" and p.xfail is not None]
    skipped = [(r, p) for r, p in found if p.outcome == "skipped" and p.xfail is None]
    followed = [(rank, phase) for rank, phase in failed if phase.degree == FOLLOWS]
    if xfailed and len(followed) == len(failed):
        return [Verdict(xfailed[0].when, "skipped", xfailed[0].xfail, text=xfailed[0].text)]
    if failed and not (skipped and len(followed) == len(failed)):
        return _failures(parts, failed, skipped, size)
    if skipped and len(skipped) == len(found):
        first = skipped[0][1]
        return [Verdict(first.when, "skipped", text=first.text, place=first.place)]
    if skipped:
        others = [rank for rank, phase in found if phase.outcome != "skipped"]
        lines = [*_lines([(rank, f"skipped: {phase.line}") for rank, phase in skipped])]
        went_on = [rank for rank in others if rank not in dict(followed)]
        lines += _lines([(rank, "passed") for rank in went_on])
        lines += _lines([(rank, phase.line) for rank, phase in followed])
        message = f"{_ranks(list(dict(skipped)))} skipped what {_ranks(others)} did not"
        when = "setup" if all(p.when == "setup" for _, p in found) else "call"
        return [Verdict(when, "failed", text="\n".join([message, *lines]), place=("", 0, message))]
    xpassed = [p for _, p in found if p.xfail is not None]
    return [Verdict(p.when, "passed", p.xfail) for p in xpassed[:1]]


def _failures(
    parts: Sequence[Part],
    failed: Sequence[tuple[int, Phase]],
    skipped: Sequence[tuple[int, Phase]],
    size: int,
) -> list[Verdict]:
    """Return a verdict for each phase in which something failed of itself."""
    every = [(part.rank, p) for part in parts for p in part.phases if p.outcome == "failed"]
    causes = [(rank, p) for rank, p in every if p.degree != FOLLOWS] or every
    followed = [(rank, p) for rank, p in failed if (rank, p) not in causes]
    found: list[Verdict] = []
    for when in ("setup", "call", "teardown"):
        here = [(rank, p) for rank, p in causes if p.when == when]
        if not here:
            continue
        sections = []
        for alike in _alike(here):
            ranks, phase = [rank for rank, _ in alike], alike[0][1]
            lines = [f"---- {_ranks(ranks)} of {size} ----", phase.text.rstrip()]
            sections.append("\n".join([*lines, *_output(alike)]))
        if not found:  # the first has all that came of it
            ends = [(rank, p.line) for rank, p in followed]
            ends += [(rank, f"skipped: {p.line}") for rank, p in skipped]
            if ends:
                sections.append("\n".join(["---- and so ----", *_lines(ends)]))
        first = _alike(here)[0][0][1]
        verdict = Verdict(when, "failed", text="\n".join(sections), place=first.place)
        found.append(verdict)
    return found


def _alike(phases: Sequence[tuple[int, Phase]]) -> list[list[tuple[int, Phase]]]:
    """Put ranks together that say the same, but for times and what objects say of themselves.

    Those come first that failed first; of those that failed in the same line, the lower ranks.
    """
    first: dict[tuple[str, int], float] = {}
    for _, phase in phases:
        place = phase.place[:2]
        first[place] = min(phase.at, first.get(place, phase.at))

    def order(item: tuple[int, Phase]) -> tuple[int, float, int]:
        rank, phase = item
        return phase.degree, first[phase.place[:2]], rank

    found: dict[str, list[tuple[int, Phase]]] = {}
    for rank, phase in sorted(phases, key=order):
        found.setdefault(_OWN.sub("", phase.text), []).append((rank, phase))
    return [*found.values()]


def _output(alike: Sequence[tuple[int, Phase]]) -> list[str]:
    """Return what ranks that fail alike have printed, each time with the ranks if it differs."""
    found: dict[str, dict[str, list[int]]] = {}
    for rank, phase in alike:
        for title, content in phase.output:
            found.setdefault(title, {}).setdefault(content.rstrip(), []).append(rank)
    lines = []
    for title, contents in found.items():
        for content, ranks in contents.items():
            whose = "" if len(ranks) == len(alike) else f", {_ranks(ranks)}"
            lines += [f"{f' {title}{whose} ':-^80}", content]
    return lines


def _lines(said: Sequence[tuple[int, str]]) -> list[str]:
    """Return a line for each thing that ranks said."""
    found: dict[str, list[int]] = {}
    for rank, text in said:
        found.setdefault(text, []).append(rank)
    return [f"{_ranks(ranks)}: {text}" for text, ranks in found.items()]


def _ranks(ranks: Sequence[int]) -> str:
    """Return "rank 1", or "ranks 0, 2"."""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))}"


def first_difference(lists: Sequence[Sequence[str]]) -> str:
    """Say where the ranks' lists of tests differ first."""
    for number in range(max(map(len, lists))):
        tests = [names[number] if number < len(names) else "no more test" for names in lists]
        if len(set(tests)) > 1:
            said = "; ".join(_lines([*enumerate(tests)]))
            return f"test {number + 1} is not the same on all ranks: {said}"
    return ""


def text_of(longrepr: Any) -> tuple[str, tuple[str, int, str]]:
    """Return a skip's reason, and the place where it was skipped."""
    if isinstance(longrepr, tuple):
        file, line, reason = longrepr
        return str(reason), (str(file), int(line or 0), str(reason))
    return str(longrepr), ("", 0, str(longrepr))
