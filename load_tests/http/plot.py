"""The saturation curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = {
    "nothing": "does nothing",
    "emulated": "ours, emulated cluster",
    "each_token": "the same, an event per token",
    "engines": "ours, real engines",
}


def plot_saturation(saturation: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for name, curve in saturation["curves"].items():
        levels = sorted(int(level) for level in curve)
        points = {int(level): point for level, point in curve.items()}
        axes.plot(levels, [points[level]["streams_per_s"] for level in levels], marker="o", label=NAMES[name])
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams at once")
    axes.set_ylabel(f"streams per second ({saturation['tokens']} tokens each)")
    axes.grid(alpha=0.3)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])  # room for the legend above the curves
    axes.legend(loc="upper left", ncols=2)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
