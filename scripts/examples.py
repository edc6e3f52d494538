"""Run the examples, and keep what they print for their pages: `python -m scripts.examples`.

Each runs under mpiexec on 2 ranks, and leaves docs/examples/NAME.txt.  The tests run them too, and
say where that is no longer what they print.
"""

import sys

from tests.harness import ROOT, environment, mpiexec, run_bounded


def main() -> None:
    """Run them in turn."""
    for path in sorted((ROOT / "examples").glob("*.py")):
        ended = run_bounded([*mpiexec(2), sys.executable, str(path)], 60, environment())
        if ended.code != 0:
            sys.exit(f"{path.name} failed:\n{ended.output}")
        kept = ROOT / "docs" / "examples" / f"{path.stem}.txt"
        kept.write_text(f"$ mpiexec -n 2 python examples/{path.name}\n{ended.output}")
        print(kept)


if __name__ == "__main__":
    main()
