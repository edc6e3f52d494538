"""Draw the rooms of the library, and which of them imports which, from its import statements.

python scripts/rooms.py > docs/rooms.svg
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mpicoll"
ROOMS = (
    *("cli", "torch", "testing", "groups", "typing", "stores"),
    *("transports", "engine", "arrays", "runtime", "errors"),
)
WIDTH, LEFT, ROW, LINE, CHIP = 940, 130, 30, 22, 7.2  # pixels; of a letter, the last


def modules() -> dict[str, list[str]]:
    """Return the modules of each room, as they are named inside of it."""
    found: dict[str, list[str]] = {room: [] for room in ROOMS}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if not parts[-1].startswith("__"):
            found[parts[0]].append("/".join(parts[1:]) or f"{parts[0]}.py")
    return found


def imported() -> Counter[tuple[str, str]]:
    """Count the modules by which each room imports from each other."""
    found: Counter[tuple[str, str]] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        rooms = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == len(parts):
                names = [node.module] if node.module else [alias.name for alias in node.names]
                rooms |= {name.split(".")[0] for name in names}
        found.update((parts[0], room) for room in rooms & set(ROOMS) - {parts[0]})
    return found


def draw() -> str:
    """Return the picture: a row for each room, what it imports from at its end."""
    lines, y = [], 20
    uses = imported()
    for room, names in modules().items():
        x, top, chips = LEFT, y, []
        for name in names:
            width = len(name) * CHIP + 14
            if x + width > WIDTH - 20:
                x, y = LEFT, y + LINE + 6
            chips.append(
                f'<rect x="{x}" y="{y}" width="{width:.0f}" height="{LINE}" rx="4" fill="#fff" '
                f'stroke="#8aa"/><text x="{x + 7}" y="{y + 15}">{name}</text>'
            )
            x += width + 6
        below = ", ".join(f"{to} {n}" for (by, to), n in sorted(uses.items()) if by == room)
        y += LINE + 18
        lines += [
            f'<rect x="10" y="{top - 10}" width="{WIDTH - 20}" height="{y - top + 8}" rx="6" '
            'fill="#eef3f5"/>',
            f'<text x="22" y="{top + 15}" font-weight="bold">{room}</text>',
            *chips,
            f'<text x="{LEFT}" y="{y - 4}" fill="#566" font-size="11">'
            f"{'imports from ' + below if below else 'imports from none'}</text>",
        ]
        y += ROW - 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" '
        'font-family="monospace" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.write(draw())
