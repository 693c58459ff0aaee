"""Plots of the experiments, as PNG files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from load_tests.experiments.gain import GainResult, parse_shape
from load_tests.experiments.measure import Run

COLOURS = {
    "basic": "#7f7f7f",
    "shorter_queue": "#1f77b4",
    "split": "#2ca02c",
    "pool": "#9467bd",
    "recompute": "#d62728",
    "oracle": "#ff7f0e",
}
SMOOTH_S = 1.0


def plot_gain(result: GainResult, folder: Path) -> list[Path]:
    """`gain_jct.png` and `gain_snic_<shape>.png`. Returns what was written."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "gain_jct.png"]
    figure, axes = pyplot.subplots(figsize=(8, 4.2))
    _bars(axes, result)
    figure.tight_layout()
    figure.savefig(paths[0], dpi=120)
    for shape in result.plan.shapes:
        runs = [run for run in result.runs if run.testbed == shape and run.repeat == 0]
        if not runs:
            continue
        figure, rows = pyplot.subplots(len(runs), 1, figsize=(8, 1.9 * len(runs)), sharex=True, sharey=True, squeeze=False)
        for axes, run in zip(rows[:, 0], runs, strict=True):
            _snics(axes, run, result.plan.testbed.snic_bits / 8)
        rows[-1, 0].set_xlabel("seconds since the agents started")
        figure.suptitle(f"{shape}: what the storage NICs received", fontsize=11)
        figure.tight_layout()
        paths.append(folder / f"gain_snic_{shape}.png")
        figure.savefig(paths[-1], dpi=120)
    pyplot.close("all")
    return paths


def _bars(axes: Any, result: GainResult) -> None:
    plan = result.plan
    width = 0.8 / len(plan.modes)
    for i, mode in enumerate(plan.modes):
        at, heights = [], []
        for j, shape in enumerate(plan.shapes):
            jct = result.jct(shape, mode)
            if jct is None:
                continue
            at.append(j + (i - (len(plan.modes) - 1) / 2) * width)
            heights.append(jct)
            basic = result.jct(shape, "basic")
            label = f"{basic / jct:.2f}x" if basic and mode != "basic" else f"{jct:.0f} s"
            axes.annotate(label, (at[-1], jct), ha="center", va="bottom", fontsize=8)
        axes.bar(at, heights, width, label=mode.replace("_", " "), color=COLOURS.get(mode))
    for j, shape in enumerate(plan.shapes):
        basic = result.jct(shape, "basic")
        if basic:
            prefill, decode = parse_shape(shape)
            bound = basic * prefill / (prefill + decode)
            axes.hlines(bound, j - 0.45, j + 0.45, colors="black", linestyles=":", label="Basic x P/(P+D)" if j == 0 else None)
    axes.set_xticks(range(len(plan.shapes)), plan.shapes)
    axes.set_ylabel("job completion time (s)")
    axes.legend(fontsize=8)
    axes.margins(y=0.12)


def _snics(axes: Any, run: Run, limit: float) -> None:
    interval = float(np.median(np.diff(run.times))) if len(run.times) > 1 else 1.0
    window = max(1, round(SMOOTH_S / interval))
    kernel = np.ones(window) / window
    for name, rate in sorted(run.rates.items()):
        host, _, rest = name.partition("-")
        if rest == "snic:rx" and host != "store":
            axes.plot(run.times, np.convolve(rate, kernel, mode="same") / 1e6, label=host, linewidth=1)
    axes.axhline(limit / 1e6, color="black", linestyle=":", linewidth=1)
    axes.set_ylim(0, limit / 1e6 * 1.25)
    axes.set_ylabel("MB/s")
    axes.set_title(f"{run.mode.replace('_', ' ')}: {run.figures['jct_s']:.1f} s", fontsize=9, loc="left")
    axes.legend(fontsize=7, loc="lower right", ncols=4)
