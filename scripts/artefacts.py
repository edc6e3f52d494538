"""Look into an sdist and a wheel: what is committed is there, and nothing else.

python scripts/artefacts.py SDIST WHEEL
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main(sdist: str, wheel: str) -> int:
    """Return 0, or say what is missing or too much."""
    listed = subprocess.check_output(["git", "-C", ROOT, "ls-files"], text=True).split("\n")
    committed = {name for name in listed if name and not name.startswith(".")}
    with tarfile.open(sdist) as archive:
        names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    packed = {n for n in names if n != "PKG-INFO" and not n.startswith("mpicoll.egg-info/")}
    wrong = _differ("sdist", committed, packed)

    library = {n for n in committed if n.startswith("mpicoll/")}
    wanted = {n for n in library if n.endswith((".py", ".pyi", "py.typed"))}
    with zipfile.ZipFile(wheel) as zipped:
        names = {n for n in zipped.namelist() if ".dist-info/" not in n and n[-1] != "/"}
    compiled = {n for n in names if n.startswith("mpicoll/transports/shm/_native.") and ".so" in n}
    wrong += _differ("wheel", wanted, names - compiled)
    with zipfile.ZipFile(wheel) as zipped:
        (metadata,) = (n for n in zipped.namelist() if n.endswith(".dist-info/METADATA"))
        readme = zipped.read(metadata).decode()
    relative = re.findall(r"\]\((?!https?:|#)([^)]*)\)", readme)
    wrong += [f"README: a link into the repository, {link}" for link in relative]
    if len(compiled) != 1:
        wrong.append(f"wheel: the compiled core should be there once, but is {sorted(compiled)}")
    print("\n".join(wrong) or f"sdist: {len(packed)} files; wheel: {len(names)}")
    return 1 if wrong else 0


def _differ(where: str, wanted: set[str], there: set[str]) -> list[str]:
    missing = [f"{where}: lacks {name}" for name in sorted(wanted - there)]
    return missing + [f"{where}: should not have {name}" for name in sorted(there - wanted)]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
