"""Draw what `bench` has measured: time over size, one panel per collective."""

from __future__ import annotations

import math
from typing import Any

from ..engine.kinds import BARRIER

WAYS = {
    "median_us": ("mpicoll", "#0b6e4f"),
    "mpi4py_median_us": ("mpi4py", "#c1440e"),
    "gloo_median_us": ("gloo", "#8a8a8a"),
}
MARKERS = "osD^vP"
ACROSS = 2  # panels side by side: on a telephone more can't be read


def draw(
    rows: list[dict[str, Any]], path: str, title: str, ways: dict[str, tuple[str, str]] = WAYS
) -> None:
    """Write a picture of the rows to a file; each way is a column, with its name and colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["kind"] != BARRIER.name))
    across = min(ACROSS, len(kinds))
    down = math.ceil(len(kinds) / across)
    plt.rcParams.update({"font.size": 12, "axes.titlesize": 14})
    figure, panels = plt.subplots(
        down,
        across,
        figsize=(4.4 * across, 3.8 * down),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel, kind in zip(panels.flat, kinds, strict=False):
        mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: int(r["nbytes"]))
        sizes = [r["nbytes"] for r in mine]
        for (key, (name, colour)), marker in zip(ways.items(), MARKERS, strict=False):
            times = [r.get(key) for r in mine]
            if any(t is None for t in times):
                continue
            style = {"color": colour, "marker": marker, "markersize": 4.5, "label": name}
            panel.plot(sizes, times, linewidth=2.4 if name == "mpicoll" else 1.4, **style)
        panel.set(xscale="log", yscale="log", title=kind, xlabel="size of the array")
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _bytes(n)))
        panel.tick_params(axis="x", labelrotation=90, labelsize=10)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda t, _: _time(t)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(kinds) :]:
        panel.set_visible(False)
    for row in panels:
        row[0].set_ylabel("median time of a call")
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside upper center", ncols=3, frameon=False, title=title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bytes(count: float) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:g} {unit}"
    return f"{count:g} B"


def _time(us: float) -> str:
    for unit, scale in (("s", 1e6), ("ms", 1e3)):
        if us >= scale:
            return f"{us / scale:g} {unit}"
    return f"{us:g} µs"
