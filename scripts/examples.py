"""Run the examples, and keep what they print for their pages: `python scripts/examples.py`.

Each runs under mpiexec on 2 ranks, and leaves docs/examples/NAME.txt.  The tests, which run them too,
say where that is no longer what they print.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.harness import environment, mpiexec, run_bounded

for path in sorted((ROOT / "examples").glob("*.py")):
    ended = run_bounded([*mpiexec(2), sys.executable, str(path)], 60, environment())
    if ended.code != 0:
        sys.exit(f"{path.name} failed:\n{ended.output}")
    kept = ROOT / "docs" / "examples" / f"{path.stem}.txt"
    kept.write_text(f"$ mpiexec -n 2 python examples/{path.name}\n{ended.output}")
    print(kept)
