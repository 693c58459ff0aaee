"""The rate of tokens over a run, with every fault marked."""

from __future__ import annotations

from pathlib import Path

from load_tests.faults.job import Answer
from load_tests.faults.throughput import WINDOW_S

COLOURS = {"kill": "#d62728", "hang": "#9467bd", "store": "#ff7f0e", "link": "#1f77b4", "client": "#7f7f7f"}
SPAN_S = 600.0  # more does not fit a figure


def family(kind: str) -> str:
    """Kinds that are drawn alike."""
    first = kind.partition("_")[0]
    if kind == "kill_store":
        return "store"
    return first if first in COLOURS else "client" if kind == "vanish" else "link"


def plot(answer: Answer, folder: Path) -> Path:
    """`faults.png`: the first minutes of the run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(12, 4.5))
    step = answer.rate_step_s
    count = min(len(answer.rates), int(SPAN_S / step))
    width = max(1, round(WINDOW_S / step))
    times = [index * step for index in range(count)]
    smooth = [sum(answer.rates[max(0, i - width + 1) : i + 1]) / min(width, i + 1) for i in range(count)]
    axes.plot(times, smooth, color="black", linewidth=0.8, label=f"tokens/s received (mean of {WINDOW_S:.0f} s)")
    axes.axhline(answer.calm_rate, color="green", linestyle=":", linewidth=1, label="without faults")
    drawn: set[str] = set()
    for outcome in answer.outcomes:
        if outcome["at"] > SPAN_S:
            continue
        group = family(outcome["kind"])
        label = None if group in drawn else group
        drawn.add(group)
        axes.axvspan(
            outcome["at"], min(SPAN_S, max(outcome["repaired"], outcome["at"] + 0.3)), color=COLOURS[group], alpha=0.18, label=label
        )
    axes.set_xlim(0, count * step)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds since the load began (shaded: from a fault to its repair)")
    axes.set_ylabel("tokens/s")
    axes.legend(fontsize=8, ncols=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.tight_layout()
    path = folder / "faults.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
