"""From what the ranks of a job reported to one verdict, and its words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.harness import Launched

from .scenario import Scenario

ANSWER = "right answer"
EVERY = "error on every rank"
SOME_HANG = "error on some ranks, the rest hang"
SOME_ENDED = "error on some ranks, the rest are ended"
SOME_SILENT = "error on some ranks, the rest go on in silence"
SOME_RIGHT = "error on some ranks, the rest have the right answer"
SILENT = "wrong data in silence"
HANGS = "hangs"
CRASH = "crash"
ENDED = "job ended by the launcher"

# SIGILL, SIGABRT, SIGBUS, SIGFPE, SIGSEGV, as launchers tell of them
_SIGNAL = re.compile(r"[Ss]ignal:? (?:code: )?(?:4|6|7|8|11)\b|\(signal (?:4|6|7|8|11)\)")
_CRASH = re.compile(
    r"Segmentation fault|Assertion failed|Process received signal|Bus error|terminate called"
)


@dataclass(frozen=True)
class Verdict:
    """What became of one scenario under one contender."""

    kind: str  # one of the above
    words: str  # for the table
    code: int | None  # the launcher's exit code; None where the job had to be ended
    seconds: float | None  # from the cause to the last rank's error, or to the end of the job


def judge(scenario: Scenario, ended: Launched, limit: float) -> Verdict:
    """Say what the ranks saw whose fate was not the cause itself.

    `limit` is the time in seconds after which the job was to be ended.
    """
    # What ranks report while they are being ended is our doing: SIGTERM wakes a stopped rank.
    told = [rank and _until(ended.at - ended.seconds + limit, rank) for rank in ended.ranks]
    seen = [told[rank] or {} for rank in range(scenario.ranks) if rank not in scenario.culprits]
    start = _start(told)
    code = None if ended.timed_out else ended.code
    failed = [rank for rank in seen if "error" in rank]
    done = [rank for rank in seen if "returned" in rank]
    whole = ended.at - start if start else ended.seconds

    if failed:
        late = max(rank["at"] - rank.get("cause", start) for rank in failed)
        rest = len(seen) - len(failed)
        if not rest:
            kind = EVERY
        elif len(done) == rest:
            kind = SOME_RIGHT if _is_right(scenario, done) else SOME_SILENT
        else:
            kind = SOME_HANG if ended.timed_out else SOME_ENDED
        others = "every other rank" if scenario.culprits else "every rank"
        if len(seen) == 1:
            others = "the other rank" if scenario.culprits else "the rank"
        words = f"{_names(failed)} on {others if kind == EVERY else 'some ranks'} ({_time(late)})"
        words += _named(scenario, failed) + kind.partition(",")[1] + kind.partition(",")[2]
        if kind == EVERY and ended.timed_out:
            words += "; the job hangs at its end"
        return Verdict(kind, words, code, late)

    crashed = not scenario.kills and _crashed(ended)
    if len(done) == len(seen) and not crashed:
        if _is_right(scenario, done):
            words = "the same" if scenario.alike else ANSWER
            words += _note(done) + ("; the job hangs at its end" if code is None else "")
            return Verdict(ANSWER, words, code, None)
        end = "; the job hangs at its end" if code is None else ""
        if "hangs" in (note := _note(done)):
            return Verdict(HANGS, note.removeprefix("; ") + end, code, None)
        return Verdict(SILENT, SILENT + note + end, code, None)
    if crashed:
        return Verdict(CRASH, f"crash, and the job is ended ({_time(whole)})", code, whole)
    if ended.timed_out:
        some = "some ranks return, the rest hang" if done else HANGS
        return Verdict(HANGS, some, None, None)
    return Verdict(ENDED, f"{ENDED} ({_time(whole)})", code, whole)


def _until(last: float, rank: dict[str, Any]) -> dict[str, Any]:
    over = max(rank.get("at", 0.0), rank.get("returned", 0.0)) > last
    return {key: rank[key] for key in ("began", "cause") if key in rank} if over else rank


def _start(told: list[dict[str, Any] | None]) -> float:
    """When things went wrong: the last cause, or the last rank's first call."""
    ranks = [rank for rank in told if rank]
    causes: list[float] = [rank["cause"] for rank in ranks if "cause" in rank]
    return max(causes or [rank["began"] for rank in ranks if "began" in rank], default=0.0)


def _is_right(scenario: Scenario, done: list[dict[str, Any]]) -> bool:
    if scenario.alike:
        return len({rank["seen"] for rank in done}) == 1
    return all(rank.get("right", False) for rank in done)


def _note(done: list[dict[str, Any]]) -> str:
    """What was seen, where a scenario says so in words."""
    seen = {rank["seen"] for rank in done if rank.get("seen", "").startswith("the child's")}
    return "".join(f"; {words}" for words in sorted(seen))


def _names(failed: list[dict[str, Any]]) -> str:
    counted = Counter(f"`{rank['error']}`" for rank in failed)
    return " or ".join(name for name, _ in counted.most_common())


def _named(scenario: Scenario, failed: list[dict[str, Any]]) -> str:
    """Whether every message names the rank that is the cause."""
    if not scenario.culprits:
        return ""
    number = rf"\b(?:ranks?\W+(?:\d+, )*|src=|dst=){scenario.culprits[0]}\b"
    texts = [rank["text"] for rank in failed]
    return "; names the rank" if all(re.search(number, text) for text in texts) else ""


def _crashed(ended: Launched) -> bool:
    signals = {132, 134, 135, 136, 139, 4, 6, 7, 8, 11}
    if ended.timed_out:
        return False
    return bool(_CRASH.search(ended.output) or _SIGNAL.search(ended.output)) or (
        ended.code in signals or -ended.code in signals
    )


def _time(seconds: float) -> str:
    return "at once" if seconds < 0.1 else f"{seconds:.1f} s"
