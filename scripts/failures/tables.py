"""The tables of docs/reliability.md."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from .scenario import ENDINGS, Scenario
from .scenarios import SCENARIOS
from .verdicts import (
    ANSWER,
    CRASH,
    ENDED,
    EVERY,
    HANGS,
    SILENT,
    SOME_ENDED,
    SOME_HANG,
    SOME_RIGHT,
    SOME_SILENT,
)

_TIME = re.compile(r"\(at once\)|\([\d.]+ s\)")
Found = list[dict[str, Any]]
NAMES = {"mpich": "MPICH", "openmpi": "Open MPI"}
# Columns: heading, contender, MPI library ("" where it does not matter which).
COLUMNS = (
    ("mpicoll", "ours", ""),
    ("mpi4py, MPICH", "mpi", "mpich"),
    ("mpi4py, Open MPI", "mpi", "openmpi"),
    ("gloo", "gloo", "mpich"),
)
COUNTED = {
    "right, or an error on every rank": (ANSWER, EVERY),
    "ended by the launcher": (ENDED,),
    "an error on some ranks only": (SOME_HANG, SOME_ENDED, SOME_SILENT, SOME_RIGHT),
    "hangs": (HANGS,),
    "wrong data in silence": (SILENT,),
    "crash": (CRASH,),
}


def failures(found: Found) -> str:
    """One table of counts, and one table per group with a row per scenario."""
    chosen = [s for s in SCENARIOS if any(_is(row, s) for row in found)]
    parts = [_counts(found)]
    for group in dict.fromkeys(scenario.group for scenario in chosen):
        heads = " | ".join(head for head, _, _ in COLUMNS)
        lines = [f"### {group}", "", f"| | {heads} | NCCL (documentation) |"]
        lines.append("|---" * (len(COLUMNS) + 2) + "|")
        for scenario in chosen:
            if scenario.group == group:
                cells = [_cell(found, scenario, key, mpi) for _, key, mpi in COLUMNS]
                lines.append(f"| {scenario.name} | {' | '.join(cells)} | {scenario.nccl} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def endings(found: Found) -> str:
    """The launcher's exit code after each ending of a rank, with mpicoll."""
    rows = [row for row in found if row["group"] == ENDINGS and row["contender"] == "ours"]
    libraries = [mpi for mpi in NAMES if any(row["mpi"] == mpi for row in rows)]
    if not rows:
        return ""
    lines = [f"| how rank 2 of 3 ends | {' | '.join(NAMES[mpi] for mpi in libraries)} |"]
    lines.append("|---" * (len(libraries) + 1) + "|")
    for name in dict.fromkeys(row["scenario"] for row in rows):
        codes = {row["mpi"]: row["code"] for row in rows if row["scenario"] == name}
        cells = [_code(codes[mpi]) if mpi in codes else "" for mpi in libraries]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _counts(found: Found) -> str:
    heads = ("mpicoll, MPICH", "mpicoll, Open MPI", *(head for head, _, _ in COLUMNS[1:]))
    keys = (("ours", "mpich"), ("ours", "openmpi"), *((key, mpi) for _, key, mpi in COLUMNS[1:]))
    lines = [f"| of all scenarios | {' | '.join(heads)} |", "|---" + "|---:" * len(keys) + "|"]
    for words, kinds in COUNTED.items():
        rows = [row for row in found if row["class"] in kinds]
        lines.append(_count(words, rows, keys))
        if EVERY in kinds:
            stays = [row for row in rows if row["code"] is None]
            lines.append(_count("... of these the job hangs at its end", stays, keys))
    return "\n".join(lines)


def _count(words: str, rows: Found, keys: tuple[tuple[str, str], ...]) -> str:
    counted = Counter((row["contender"], row["mpi"]) for row in rows)
    return f"| {words} | {' | '.join(str(counted[key]) for key in keys)} |"


def _cell(found: Found, scenario: Scenario, key: str, mpi: str) -> str:
    """What one contender did; where the MPI libraries differ under mpicoll, each by name."""
    rows = [
        r for r in found if _is(r, scenario) and r["contender"] == key and mpi in ("", r["mpi"])
    ]
    rows.sort(key=lambda row: row["seconds"] or 0.0)
    if not rows:
        return "not measured"
    if len({_TIME.sub("", _words(row)) for row in rows}) == 1:
        return _words(rows[-1])  # the slower one
    return "; ".join(f"{NAMES[row['mpi']]}: {_words(row)}" for row in rows)


def _words(row: dict[str, Any]) -> str:
    """The verdict; with an exit code of 0 where something failed."""
    well = row["class"] in (ANSWER, SILENT, HANGS) or row["code"] != 0
    words: str = row["words"]
    return words + ("" if well else ", **exit code 0**")


def _code(code: int | None) -> str:
    return "hangs" if code is None else str(code)


def _is(row: dict[str, Any], scenario: Scenario) -> bool:
    return (row["group"], row["scenario"]) == (scenario.group, scenario.name)
