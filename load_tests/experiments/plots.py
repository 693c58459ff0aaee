"""Plots of the experiments, as PNG files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.experiments.experiment import Result
from load_tests.experiments.measure import Run
from load_tests.testbed.spec import parse_shape

COLOURS = {
    "basic": "#7f7f7f",
    "layerwise": "#bcbd22",
    "alternate": "#17becf",
    "shorter_queue": "#1f77b4",
    "split": "#2ca02c",
    "pool": "#9467bd",
    "recompute": "#d62728",
    "oracle": "#ff7f0e",
}
SMOOTH_S = 1.0


@contextlib.contextmanager
def figure(path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (8, 4.2), **options: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its array of axes, written to `path` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, **options)
    try:
        yield drawn, axes
        drawn.tight_layout()
        drawn.savefig(path, dpi=120)
    finally:
        pyplot.close(drawn)


def label(mode: str) -> str:
    return mode.replace("_", " ")


def plot_jct(result: Result, path: Path, bounds: bool = True) -> Path:
    """JCT of every mode, by shape; with `bounds`, dotted, what the number of storage NICs allows."""
    setup = result.setup
    width = 0.84 / len(setup.modes)
    with figure(path, size=(max(6.0, 1.6 + 0.42 * len(setup.modes) * len(setup.shapes)), 4.2)) as (_, grid):
        axes = grid[0, 0]
        for i, mode in enumerate(setup.modes):
            at, heights = [], []
            for j, shape in enumerate(setup.shapes):
                jct, ratio = result.jct(shape, mode), result.ratio(shape, setup.modes[0], mode)
                if jct is None:
                    continue
                at.append(j + (i - (len(setup.modes) - 1) / 2) * width)
                heights.append(jct)
                text = f"{ratio:.2f}x" if ratio and i else f"{jct:.0f} s"
                axes.annotate(text, (at[-1], jct), ha="center", va="bottom", fontsize=7)
            axes.bar(at, heights, width, label=label(mode), color=COLOURS.get(mode))
        for j, shape in enumerate(setup.shapes if bounds else ()):
            first = result.jct(shape, setup.modes[0])
            if first:
                prefill, decode = parse_shape(shape)
                bound = first * prefill / (prefill + decode)
                name = f"{label(setup.modes[0])} x P/(P+D)" if j == 0 else None
                axes.hlines(bound, j - 0.45, j + 0.45, colors="black", linestyles=":", label=name)
        axes.set_xticks(range(len(setup.shapes)), setup.shapes)
        axes.set_ylabel("job completion time (s)")
        axes.legend(fontsize=7, ncols=2)
        axes.margins(y=0.15)
    return path


def plot_snics(result: Result, shape: str, path: Path) -> Path:
    """What each storage NIC received over time, a row for each mode."""
    runs = [run for run in result.runs if run.testbed == shape and run.repeat == 0 and run.figures["snic_utilisation"] is not None]
    limit = result.setup.testbed.snic_bits / 8
    with figure(path, max(1, len(runs)), size=(8, 1.5 * max(1, len(runs)) + 0.8), sharex=True, sharey=True) as (drawn, rows):
        for axes, run in zip(rows[:, 0], runs, strict=False):
            for name, rate in sorted(run.rates.items()):
                host, _, rest = name.partition("-")
                if rest == "snic:rx" and host != "store":
                    axes.plot(run.times, smooth(run, rate) / 1e6, label=host, linewidth=1)
            axes.axhline(limit / 1e6, color="black", linestyle=":", linewidth=1)
            axes.set_ylim(0, limit / 1e6 * 1.25)
            axes.set_ylabel("MB/s")
            axes.set_title(f"{label(run.mode)}: {run.figures['jct_s']:.1f} s", fontsize=9, loc="left")
            axes.legend(fontsize=7, loc="lower right", ncols=4)
        rows[-1, 0].set_xlabel("seconds since the agents started")
        drawn.suptitle(f"{shape}: what the storage NICs received", fontsize=11)
    return path


def smooth(run: Run, rate: Any) -> Any:
    """Means over SMOOTH_S."""
    interval = float(np.median(np.diff(run.times))) if len(run.times) > 1 else 1.0
    window = max(1, round(SMOOTH_S / interval))
    return np.convolve(rate, np.ones(window) / window, mode="same")


def plot_lines(path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, **options: Any) -> Path:
    """A line for each mode. `options`: `bound` (a dotted level with its name), `log`."""
    with figure(path, size=(6.4, 4.0)) as (_, grid):
        axes = grid[0, 0]
        for mode, (xs, ys) in curves.items():
            axes.plot(xs, ys, marker="o", markersize=4, label=label(mode), color=COLOURS.get(mode))
        bound = options.get("bound")
        if bound:
            axes.axhline(bound[0], color="black", linestyle=":", linewidth=1, label=bound[1])
        if options.get("log"):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.legend(fontsize=8)
    return path
