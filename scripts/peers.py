"""Put the runs of scripts/bench-peers into one table and one picture.

python scripts/peers.py FOLDER-OF-RUNS FOLDER-FOR-RESULTS RANKS
"""

import datetime
import json
import os
import platform
import statistics
import sys
from pathlib import Path

from mpicoll.cli.bench import in_words
from mpicoll.cli.curves import draw

PEERS = {
    "mpich": ("MPICH", "#c1440e"),
    "openmpi": ("Open MPI", "#2a6fbb"),
    "impi": ("Intel MPI", "#7b4ea3"),
    "gloo": ("gloo", "#8a8a8a"),
}
START = ("allreduce", "broadcast")  # one that reduces, one that only moves: for the start page


def collect(folder: Path) -> list[dict]:
    """Return one row per collective and size: medians over the rounds, by way of calling.

    `ratio` is the least of the peers' ratios, each of times of the same runs.
    """
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    ratios: dict[tuple[str, int], dict[str, list[float]]] = {}
    for path in sorted(folder.glob("*.json")):
        mpi = path.stem.split("-")[0]
        for row in json.loads(path.read_text().splitlines()[-1]):
            key = row["kind"], row["nbytes"]
            times.setdefault(key, {}).setdefault("ours", []).append(row["median_us"])
            for way, time in ((mpi, row["mpi4py_median_us"]), ("gloo", row["gloo_median_us"])):
                if time is not None:
                    times[key].setdefault(way, []).append(time)
                    ratios.setdefault(key, {}).setdefault(way, []).append(time / row["median_us"])
    return [
        {
            "kind": key[0],
            "nbytes": key[1],
            "ratio": min(map(statistics.median, ratios[key].values())),
            **{way: statistics.median(t) for way, t in at.items()},
        }
        for key, at in times.items()
    ]


def table(rows: list[dict]) -> str:
    """Return a Markdown table; a ratio above 1 says that mpicoll is faster than all peers."""
    names = [name for name, _ in PEERS.values()]
    lines = [f"| collective | mpicoll | {' | '.join(names)} | least ratio |"]
    lines.append("|---|" + "---:|" * (len(names) + 2))
    for row in rows:
        cells = [_micro(row.get(way)) for way in ("ours", *PEERS)]
        size = "" if row["kind"] == "barrier" else f", {in_words(row['nbytes'])}"
        lines.append(f"| {row['kind']}{size} | {' | '.join(cells)} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def _micro(time: float | None) -> str:
    return "" if time is None else f"{time:,.1f}" if time < 100 else f"{time:,.0f}"


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor()
    return f"{os.cpu_count()} cores ({model}), {platform.system()}"


def main() -> None:
    """Read the runs; write peers.md, peers.png and, of a few collectives, start.png."""
    found, into, ranks = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    rows = collect(found)
    (into / "peers.md").write_text(
        "# Beside its peers\n\n"
        f"Median time of a call in microseconds: {ranks} ranks, float32, {_machine()}, "
        f"{datetime.date.today():%B %Y}, by `scripts/bench-peers -n {ranks}`. Each MPI library is "
        "called bare, by mpi4py's blocking methods, in turns with mpicoll, in a run of its own; "
        "mpicoll's figure is the median over all runs. A ratio is a peer's time over mpicoll's in "
        "the same run, and the last column has the least of them: above 1, mpicoll is faster than "
        "each. (A barrier of the library comes before each call. MPICH's lets the ranks go 1 us "
        "apart, which is in all small figures of its runs.)\n\n"
        "![Time of a call over its size: a panel per collective, a line per library](peers.png)\n\n"
        + table(rows)
        + "\n"
    )
    ways = {"ours": ("mpicoll", "#0b6e4f"), **PEERS}
    title = f"{ranks} ranks on one node, float32"
    draw(rows, str(into / "peers.png"), title, ways)
    draw([row for row in rows if row["kind"] in START], str(into / "start.png"), title, ways)


if __name__ == "__main__":
    main()
