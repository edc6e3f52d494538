"""What type checkers say of programs: right ones are clean, and wrong ones are errors where marked.

Right are `tests/typing/right.py`, the examples, and the snippets of the documentation.  A line that
a checker is to refuse says so: ``# E: CODE``, with mypy's code of each error.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT, environment
from tests.scenarios.test_docs import PAGES, snippets

FOLDER = ROOT / "tests" / "typing"
RIGHT, WRONG = FOLDER / "right.py", FOLDER / "wrong.py"
REFUSED = re.compile(r"assert refused\(")  # a snippet shows what is refused


def marked(path: Path) -> list[tuple[int, str]]:
    """The lines that are to be errors, each with mypy's code, once for each error."""
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        _, _, codes = line.partition("# E: ")
        found += [(number, code) for code in codes.split()]
    assert found, path
    return found


def programs(folder: Path) -> Path:
    """Write the examples, and each page's snippets at the page's own lines, into a package."""
    package = folder / "programs"
    package.mkdir()
    (package / "__init__.py").touch()
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, package)
    for page in PAGES:
        lines: list[str] = []
        for snippet in snippets(page):
            if snippet.fails:
                continue  # a program of its own
            lines += [""] * (snippet.line - 1 - len(lines))
            for line in snippet.source.splitlines():
                lines.append("" if REFUSED.match(line) else line)
            if snippet.option:  # it raises: that may be of what no checker lets pass
                lines[snippet.line - 1 :] = [
                    f"{line}  # type: ignore" if line else line
                    for line in lines[snippet.line - 1 :]
                ]
        name = f"page_{page.stem.replace('-', '_')}.py"
        (package / name).write_text("\n".join(lines) + "\n")
    return package


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int, str, str]]:
    """All that mypy says: file, line, code, words."""
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed (extra: dev)")
    folder = tmp_path_factory.mktemp("typing")
    argv = [sys.executable, "-m", "mypy", "--config-file", FOLDER / "mypy.ini"]
    argv += [RIGHT, WRONG, *sorted(programs(folder).glob("*.py"))]
    here = environment()  # this checkout, whatever is installed
    ran = subprocess.run(argv, cwd=ROOT, env=here, capture_output=True, text=True, timeout=120)
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    errors = re.findall(r"^(.*?):(\d+): error: (.*?)(?:  \[([\w-]+)\])?$", ran.stdout, re.M)
    assert errors, ran.stdout + ran.stderr
    return [(Path(file).name, int(line), code, words) for file, line, words, code in errors]


def test_mypy_finds_what_is_wrong(said) -> None:
    found = [(line, code) for file, line, code, _ in said if file == WRONG.name]
    assert sorted(found) == sorted(marked(WRONG))


def test_mypy_lets_pass_what_is_right(said) -> None:
    assert [error for error in said if error[0] != WRONG.name] == []


def test_pyright_agrees() -> None:
    pyright = shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    argv = [pyright, "--outputjson", "--pythonpath", sys.executable, RIGHT, WRONG]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)
    told = json.loads(ran.stdout)["generalDiagnostics"]
    errors = {
        (Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in told
        if each["severity"] == "error"
    }
    assert errors == {(WRONG.name, line) for line, _ in marked(WRONG)}
