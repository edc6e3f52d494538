"""The order of the modules, by reading them: each imports only from those above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mpicoll

PACKAGE = Path(mpicoll.__file__).parent
ROOMS = [  # each imports only from those above it; so does each module, inside of its room
    ("", ["errors"]),
    (
        "runtime",
        [
            *("digests", "process", "pmi", "settings", "launcher", "world", "library", "processes"),
            *("agreement", "memory", "topology", "waiting", "watchdog"),
        ],
    ),
    ("arrays", ["ops", "dtypes", "device", "buffers"]),
    (
        "engine",
        [
            *("kinds", "call", "overlap", "checks", "claims", "recorder", "rollcall"),
            *(
                "records",
                "board",
                "peers",
                "once",
                "arrival",
                "tasks",
                "deadlines",
                "patience",
                "underway",
                "progress",
                "background",
            ),
            *("tracebacks", "exit", "future", "work", "communicators"),
        ],
    ),
    (
        "transports",
        [
            *("tuning", "base", "kernels", "messages", "mpi"),
            *("shm.symmetric", "shm.cma", "shm.inline", "shm.core", "shm.rings", "shm.transport"),
            "hierarchical",
            *("cuda.gpu", "cuda.binding", "cuda.probe", "cuda.staged", "cuda.aware", "cuda.nccl"),
            "select",
        ],
    ),
    ("", ["stores", "typing"]),
    (
        "groups",
        [
            *("rendezvous", "reclaim", "channel", "caller", "derive", "merge", "spawn", "shrink"),
            *("subgroup", "coalesced", "group", "current", "registry", "new"),
        ],
    ),
    ("torch", ["errors", "hooks", "layout", "sparse", "work", "dispatch", "group", "rendezvous"]),
    (
        "testing",
        [
            "standin",
            "threads",
            "marks",
            "verdicts",
            "limits",
            "lastwords",
            "together",
            "ranks",
            "plugin",
            "contract",
        ],
    ),
]
ORDER = [f"{room}.{module}".lstrip(".") for room, modules in ROOMS for module in modules]
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# A package's face may import everything.
OUTSIDE = {"__init__", "__main__", "testing.__init__", "torch.__init__"}


def layer(module: str) -> float:
    """Where a module stands; the command line stands above all."""
    if module == "cli" or module.startswith("cli."):
        return len(ORDER)
    return ORDER.index(module) if module in ORDER else -0.5


def imports(module: str) -> set[str]:
    """The modules of the package that `module` imports, wherever it does, types included."""
    found = set()
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        names: list[list[str]] = []
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] + (node.module or "").split(".")
            names = [[*filter(None, base), alias.name] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mpicoll"):
            names = [[*node.module.split(".")[1:], alias.name] for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1:] for a in node.names if a.name.split(".")[0] == "mpicoll"]
        for parts in names:  # the longest prefix that is a module
            candidates = (".".join(parts[:k]) for k in range(len(parts), 0, -1))
            target = next((c for c in candidates if c in FILES or f"{c}.__init__" in FILES), None)
            if target is not None:
                found.add(target)
    return found


@pytest.mark.parametrize("module", sorted(set(FILES) - OUTSIDE))
def test_each_module_imports_only_from_those_above_it(module):
    assert layer(module) >= 0 or module.endswith("__init__"), "it stands in no room"
    for target in imports(module):
        same_package = module.startswith("cli") and target.startswith("cli")
        assert same_package or layer(target) < layer(module), f"{module} imports {target}"


@pytest.mark.parametrize("module", sorted(m for m in FILES if m.startswith("torch.")))
def test_the_second_door_is_built_of_public_names(module):
    inside = {target for target in imports(module) if not target.startswith("torch")}
    assert inside <= {"runtime.settings"}, "that reads the environment for all"
    tree = ast.walk(ast.parse(FILES[module].read_text()))
    names = {
        node.attr
        for node in tree
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "mc"
    }
    assert names <= set(mpicoll.__all__)


def test_the_reader_of_imports_reads_them():
    assert {"errors", "runtime.library", "engine.peers"} <= imports("engine.progress")
    assert {"errors", "engine.call", "transports.base"} <= imports("transports.messages")


@pytest.mark.parametrize("module", sorted(set(FILES) - {"runtime.settings"}))
def test_only_the_settings_read_the_environment(module):
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        read = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
        taken = (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and any(alias.name in ("environ", "environb", "getenv") for alias in node.names)
        )
        assert not read and not taken, f"{module} line {node.lineno} reads the environment"


HEAVY = {
    *("mpi4py", "torch", "cupy", "jax", "matplotlib", "sklearn", "ml_dtypes", "mpicoll.torch"),
    *("asyncio", "concurrent", "logging", "multiprocessing", "random", "secrets"),
    *("hashlib", "hmac", "ipaddress", "socket", "mpicoll.stores", "mpicoll.testing"),
    *(
        "shutil",
        "ssl",
        "subprocess",
        "tempfile",
        "unittest",
        "mpicoll.cli",
        "mpicoll.transports.cuda",
    ),
}


def test_importing_loads_what_is_asked_for_and_no_more():
    script = """
import sys
before = set(sys.modules)
import mpicoll
print(sorted(set(sys.modules) - before))
import numpy
import pathlib  # which brings ipaddress, from Python 3.11.4 on
before = set(sys.modules)
mpicoll.new_group
print(sorted(set(sys.modules) - before))
mpicoll.Future
print("concurrent.futures" in sys.modules)
"""
    output = subprocess.check_output([sys.executable, "-c", script], text=True).splitlines()
    at_first, loaded = map(ast.literal_eval, output[:2])
    assert [m for m in at_first if m.startswith(("mpicoll.", "numpy"))] == []
    assert [m for m in loaded if any(m == h or m.startswith(f"{h}.") for h in HEAVY)] == []
    assert "mpicoll.transports.select" in loaded and output[2] == "True"


def test_every_public_name_is_found():
    everything: dict[str, object] = {}
    exec("from mpicoll import *", everything)
    assert set(mpicoll.__all__) <= set(everything)
    assert mpicoll.errors.MpicollError is mpicoll.MpicollError
    with pytest.raises(AttributeError, match="no attribute 'new_grup'"):
        _ = mpicoll.new_grup


def test_the_picture_of_the_rooms_is_of_today():
    root = Path(__file__).parents[2]
    drawn = subprocess.check_output([sys.executable, root / "scripts/rooms.py"], text=True)
    assert drawn == (root / "docs/rooms.svg").read_text(), "draw it again, and look at it"
