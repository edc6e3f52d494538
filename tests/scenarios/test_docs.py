"""Every Python snippet of the documentation is executed, on 3 ranks.

The snippets of a page are one program, in order.  What a fence says after `python`:

    python                  must run through, on every rank
    python raises=A|B       must raise one of these, on every rank; the program goes on
    python fails: WORDS     a program of its own; it must end by itself, with a bad status, and
                            WORDS in what it prints
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

import mpicoll as mc
from mpicoll import errors
from mpicoll.arrays import dtypes
from mpicoll.arrays.ops import BY_NAME, ReduceOp
from mpicoll.cli import COMMANDS
from tests.harness import ROOT, environment, mpiexec, run_bounded

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOON = 20.0  # seconds in which a program that fails must have ended
# What a fence may hold.
SHOWN = {"python", "shell", "text", "yaml", "{toctree}", "{literalinclude}"}


@dataclass
class Snippet:
    line: int  # in the page, from 1
    option: str  # what stands after "python"
    source: str

    @property
    def fails(self) -> bool:
        return self.option.startswith("fails:")


def snippets(page: Path) -> list[Snippet]:
    found: list[Snippet] = []
    inside, lines, start = "", [], 0
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = re.match(r"\s*```(.*)", line)
        if not fence:
            lines.append(line)
        elif inside:
            if inside.split()[0] == "python":
                found.append(Snippet(start, inside[len("python") :].strip(), "\n".join(lines)))
            inside = ""
        else:
            assert line.startswith("```"), f"{page.name}:{number}: an indented fence"
            inside, lines, start = fence[1], [], number + 1
            assert inside, f"{page.name}:{number}: say what the fence holds, one of {SHOWN}"
            assert inside.split()[0] in SHOWN, f"{page.name}:{number}: {inside}"
    assert not inside, f"{page.name}: a fence is not closed"
    return found


# Executes snippets so that tracebacks show the page's own lines.
RUNNER = """
import json, linecache, sys

page, snippets = json.load(open(sys.argv[1]))
linecache.getlines(page)
namespace = {"__name__": "__main__"}
for snippet in snippets:
    code = compile("\\n" * (snippet["line"] - 1) + snippet["source"], page, "exec")
    _, _, expected = snippet["option"].partition("raises=")
    try:
        exec(code, namespace)
    except Exception as error:
        if type(error).__name__ not in expected.split("|"):
            raise
    else:
        assert not expected, f"{page}:{snippet['line']} did not raise {expected}"
print("the page is done", flush=True)
"""


def run(folder: Path, page: Path, chosen: list[Snippet], ranks: int):
    program, data = folder / "runner.py", folder / "snippets.json"
    program.write_text(RUNNER)
    data.write_text(json.dumps([str(page), [asdict(snippet) for snippet in chosen]]))
    argv = [*mpiexec(ranks), sys.executable, str(program), str(data)]
    ended = run_bounded(argv, 60, environment({"PYTHONBREAKPOINT": "0"}))  # nobody is there
    assert not ended.timed_out, f"hung:\n{ended.output}"
    assert not ended.leftovers
    return ended


TOGETHER = [p for p in PAGES if any(not s.fails for s in snippets(p))]
ALONE = [pytest.param(p, s, id=f"{p.name}:{s.line}") for p in PAGES for s in snippets(p) if s.fails]


@pytest.mark.parametrize("page", TOGETHER, ids=lambda page: page.name)
def test_page(page: Path, tmp_path: Path) -> None:
    ranks = 3
    if page.name == "pytorch.md":
        ranks = 2  # PyTorch takes seconds to load on each
        if importlib.util.find_spec("torch") is None:
            pytest.skip("torch is not installed (extra: torch)")
    chosen = [s for s in snippets(page) if not s.fails]
    ended = run(tmp_path, page, chosen, ranks)
    assert ended.code == 0, ended.output
    assert ended.output.count("the page is done") == ranks, ended.output


@pytest.mark.parametrize("page, snippet", ALONE)
def test_program_that_fails(page: Path, snippet: Snippet, tmp_path: Path) -> None:
    ended = run(tmp_path, page, [snippet], 3)
    assert ended.code != 0 and ended.seconds < SOON, ended.output
    assert snippet.option.partition(":")[2].strip() in ended.output
    assert "AssertionError" not in ended.output, ended.output


def anchors(page: Path) -> set[str]:
    """What a link may name of a page: its headings, as GitHub and the site write them."""
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)", outside, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if not link.startswith(("http:", "https:")):
                path, _, anchor = link.partition("#")
                target = (page.parent / path).resolve() if path else page
                assert target.exists(), f"{page.name}: {link}"
                assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


NAMED = {  # what a page may name, and whether there is such a thing
    r"\bpg\.(\w+)": lambda name: hasattr(mc.ProcessGroup, name) or name == "comm",
    r"\bmc\.(\w+)": lambda name: hasattr(mc, name),
    r"-m mpicoll (\w+)": lambda name: name in COMMANDS,
    r"`((?:docs|examples|mpicoll|scripts|tests)/[\w./-]+)": lambda name: (ROOT / name).exists(),
}


def test_what_is_named_is_there() -> None:
    for page in PAGES:
        for pattern, exists in NAMED.items():
            for name in re.findall(pattern, page.read_text()):
                assert exists(name) or name == "COMMAND", f"{page.name}: {name}"


def table(page: str, heading: str) -> list[list[str]]:
    """The first table under a heading, as rows of cells, the head included."""
    text = (ROOT / "docs" / page).read_text().partition(f"\n{heading}\n")[2]
    rows = re.search(r"(^\|.*\n)+", text, re.M)
    assert rows, heading
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows[0].splitlines()]
    return [cells[0], *cells[2:]]


RANGES = {
    "int8 to int64": ["int8", "int16", "int32", "int64"],
    "uint8 to uint64": ["uint8", "uint16", "uint32", "uint64"],
}


EXAMPLES = {
    "datetime64": "M8[s]",
    "timedelta64": "m8[ns]",
    "fixed-width strings": "U3",
    "void": "V3",
    "structured": [("a", "f4"), ("b", "S3")],
}  # of what is in no table of dtypes


def in_docs(words: str) -> list[str]:
    """The dtypes that a row of the table speaks of: "float8" is all of that width."""
    names = []
    for word in words.split(", "):
        if word in EXAMPLES:
            names.append(word)
            continue
        exact = RANGES.get(word, [word] if word in dtypes.BY_NAME else [])
        names += exact or [name for name in dtypes.BY_NAME if name.startswith(f"{word}_")]
    return names


def test_the_table_of_reductions_is_true() -> None:
    head, *rows = table("semantics.md", "## What moves and what reduces")
    told: list[str] = []
    for words, *cells in rows:
        for name in in_docs(words):
            told.append(name)
            for ops, cell in zip(head[1:], cells, strict=True):
                for op in ops.split(", "):
                    factor = ReduceOp.PREMUL_SUM(2.0) if op == "PREMUL_SUM" else BY_NAME[op]
                    example = np.dtype(EXAMPLES.get(name))
                    dtype = dtypes.BY_NAME.get(name) or dtypes.from_numpy(example, name)
                    try:
                        plan = dtypes.reduction(dtype, factor, 3)
                    except errors.UnsupportedError:
                        plan = None
                    assert (plan is None) == (cell == "no"), (name, op, cell)
                    if plan is not None:
                        assert (cell == "in float32") == (
                            plan.wire == np.float32 and name in ("float16", "bfloat16")
                        ), (name, op, cell)
    assert sorted(told) == sorted([*dtypes.BY_NAME, *EXAMPLES]), "every dtype stands in one row"
