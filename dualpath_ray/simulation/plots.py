"""Plots of a reproduction, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"basic": "tab:red", "ours": "tab:blue", "oracle": "tab:green"}


def plot_reproduction(cells: Sequence[dict[str, Any]], directory: str | Path) -> list[Path]:
    """Write one PNG per figure that has cells; returns the files. Needs matplotlib (extra `plots`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    panels = sorted({(c["model"], c["mal"]) for c in cells if c["experiment"] == "fig7"})
    if panels:
        figure, axes = pyplot.subplots(2, (len(panels) + 1) // 2, figsize=(12, 6), squeeze=False)
        for axis, (model, mal) in zip(axes.flat, panels, strict=False):
            _jct(axis, [c for c in cells if c["experiment"] == "fig7" and c["model"] == model and c["mal"] == mal], f"{model} {mal}")
        files.append(_save(figure, folder / "fig7.png"))
    for metric, label in (("ttft_s", "TTFT (s)"), ("ttst_s", "time to second token (s)"), ("tpot_s", "time per token (s)")):
        chosen = [c for c in cells if c["experiment"] == "fig10" and c["metric"].startswith(f"{metric}@")]
        models = sorted({c["model"] for c in chosen})
        if not models:
            continue
        figure, axes = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4), squeeze=False)
        for axis, model in zip(axes.flat, models, strict=True):
            _online(axis, [c for c in chosen if c["model"] == model], model, label)
        files.append(_save(figure, folder / f"fig10_{metric.removesuffix('_s')}.png"))
    return files


def _jct(axis: Any, cells: Sequence[dict[str, Any]], title: str) -> None:
    for mode, colour in COLOURS.items():
        rows = sorted((c["agents"], c["ours"], c["paper"]) for c in cells if c["mode"] == mode)
        if rows:
            counts, mine, paper = zip(*rows, strict=True)
            axis.plot(counts, mine, color=colour, marker="o", label=f"{mode}, simulated")
            axis.plot(counts, paper, color=colour, marker="x", linestyle="--", label=f"{mode}, paper")
    axis.set(title=title, xlabel="agents", ylabel="JCT (s)", xscale="log", yscale="log")
    axis.legend(fontsize=6)


def _online(axis: Any, cells: Sequence[dict[str, Any]], title: str, label: str) -> None:
    for mode, colour in COLOURS.items():
        rows = sorted((float(c["metric"].partition("@")[2]), c["ours"], c["paper"]) for c in cells if c["mode"] == mode)
        if rows:
            rates, mine, paper = zip(*rows, strict=True)
            axis.plot(
                rates,
                [value if value is not None else float("nan") for value in mine],
                color=colour,
                marker="o",
                label=f"{mode}, simulated",
            )
            axis.plot(rates, paper, color=colour, marker="x", linestyle="--", label=f"{mode}, paper")
    axis.set(title=title, xlabel="agents per second", ylabel=label)
    axis.legend(fontsize=6)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
