"""Plots of a reproduction, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualpath_ray.simulation.reproduce import ablation_steps

COLOURS = {"basic": "tab:red", "ours": "tab:blue", "oracle": "tab:green"}
PARTS = {"queued": "tab:orange", "allocated": "tab:purple", "read": "tab:cyan", "prefill": "tab:green"}


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
    if shares := [c for c in cells if c["experiment"] == "fig12"]:
        figure, axis = pyplot.subplots(figsize=(9, 4))
        _breakdown(axis, shares)
        files.append(_save(figure, folder / "fig12.png"))
    if steps := ablation_steps(cells):
        figure, axis = pyplot.subplots(figsize=(6, 4))
        _ablation(axis, steps)
        files.append(_save(figure, folder / "ablation.png"))
    return files


def _jct(axis: Any, cells: Sequence[dict[str, Any]], title: str) -> None:
    for mode, colour in COLOURS.items():
        rows = sorted((c["agents"], c["ours"], c["paper"]) for c in cells if c["mode"] == mode)
        if rows:
            counts, mine, paper = zip(*rows, strict=True)
            axis.plot(counts, mine, color=colour, marker="o", label=f"{mode}, simulated")
            axis.plot(counts, paper, color=colour, marker="x", linestyle="--", label=f"{mode}, paper")
    axis.set(title=title, xlabel="agents", ylabel="JCT (s)", xscale="log", yscale="log")
    ticks = sorted({c["agents"] for c in cells})
    axis.set_xticks(ticks, [str(count) for count in ticks])
    axis.set_xticks([], minor=True)
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


def _breakdown(axis: Any, cells: Sequence[dict[str, Any]]) -> None:
    """Parts of the time to first token: of each setting the simulated bar, then the paper's (hatched)."""
    settings = sorted({(c["mode"], float(c["metric"].partition("@")[2])) for c in cells})
    found = {(c["mode"], float(c["metric"].partition("@")[2]), c["metric"].partition("@")[0]): c for c in cells}
    for source, shift, hatch in (("ours", -0.2, ""), ("paper", 0.2, "//")):
        below = [0.0] * len(settings)
        for part, colour in PARTS.items():
            heights = [100 * (found.get((mode, rate, f"{part}_share"), {}).get(source) or 0.0) for mode, rate in settings]
            places = [x + shift for x in range(len(settings))]
            axis.bar(places, heights, 0.38, below, color=colour, hatch=hatch, edgecolor="white", label="" if hatch else part)
            below = [low + height for low, height in zip(below, heights, strict=True)]
    axis.set_xticks(range(len(settings)), [f"{mode} {rate:g}" for mode, rate in settings])
    axis.set(title="left: simulated, right: paper", xlabel="system, agents per second", ylabel="% of TTFT")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def _ablation(axis: Any, steps: Sequence[dict[str, Any]]) -> None:
    for source, shift, colour in (("ours", -0.2, "tab:blue"), ("paper", 0.2, "tab:grey")):
        heights = [100 * step[source] for step in steps]
        bars = axis.bar([x + shift for x in range(len(steps))], heights, 0.38, color=colour, label=source.replace("ours", "simulated"))
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(range(len(steps)), [step["step"] for step in steps])
    axis.set(ylabel="JCT less than Basic (%)")
    axis.legend(fontsize=8)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path
