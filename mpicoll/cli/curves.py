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


def draw(
    rows: list[dict[str, Any]], path: str, title: str, ways: dict[str, tuple[str, str]] = WAYS
) -> None:
    """Write a picture of the rows to a file; each way is a column, with its name and colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    kinds = list(dict.fromkeys(r["kind"] for r in rows if r["kind"] != BARRIER.name))
    across = min(3, len(kinds))
    down = math.ceil(len(kinds) / across)
    figure, panels = plt.subplots(
        down,
        across,
        figsize=(4.2 * across, 3.3 * down),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for panel, kind in zip(panels.flat, kinds, strict=False):
        mine = sorted((r for r in rows if r["kind"] == kind), key=lambda r: int(r["nbytes"]))
        sizes = [r["nbytes"] for r in mine]
        for key, (name, colour) in ways.items():
            times = [r.get(key) for r in mine]
            if any(t is None for t in times):
                continue
            width = 2.4 if name == "mpicoll" else 1.4
            panel.plot(sizes, times, color=colour, linewidth=width, label=name)
        panel.set(xscale="log", yscale="log", title=kind)
        ticks = [4 * 8**i for i in range(1, 10) if sizes[0] <= 4 * 8**i <= sizes[-1]][::2]
        panel.xaxis.set_major_locator(FixedLocator(ticks or [sizes[0]]))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda n, _: _bytes(n)))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda t, _: _time(t)))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.grid(color="#e4e4e4", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels.flat)[len(kinds) :]:
        panel.set_visible(False)
    panels[0][0].legend(frameon=False, loc="upper left")
    figure.suptitle(f"Median time of a call: {title}")
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
