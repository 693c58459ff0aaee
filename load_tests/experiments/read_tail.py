"""The tail of storage read times: one request's blocks divided over both sides against all of them on the shorter queue.

Independent requests (agents of one turn) with contexts of different lengths arrive in a Poisson process at a quarter and at half of what
the storage NICs can read. Dividing shortens the reading itself, not the wait behind a burst of others, of which the tail consists.
`--require` bounds p99 in `shorter_queue` over p99 in `split` at the lower load.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.workload import Workload

UTILISATIONS = (0.25, 0.5)
SETUP = Setup(modes=("shorter_queue", "split"), workload=Workload(agents=60, turns=1, context=384, spread=0.5, stored=20, seed=5))
QUICK = replace(SETUP, workload=Workload(agents=20, turns=1, context=384, spread=0.5, stored=20, seed=5))


class ReadTailResult(Result):
    def read_s(self) -> dict[str, dict[str, dict[str, float]]]:
        """Quantiles by load and mode."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for run in self.runs:
            found.setdefault(run.load, {})[run.mode] = run.figures["read_s"]
        return found

    def over_shorter_queue(self) -> dict[str, dict[str, float]]:
        """`split` over `shorter_queue`, by load."""
        return {
            load: {name: times["split"][name] / times["shorter_queue"][name] for name in times["split"]}
            for load, times in self.read_s().items()
            if len(times) == 2
        }

    def ideal(self) -> dict[str, dict[str, float]]:
        """The same ratios between queues that are served first come, first served and known exactly."""
        return {load_name(share): ideal_ratios(share, self.setup.workload.spread) for share in UTILISATIONS}

    def figures(self) -> dict[str, Any]:
        return {"read_s": self.read_s(), "split_over_shorter_queue": self.over_shorter_queue(), "ideal": self.ideal()}

    def lines(self) -> list[str]:
        names = ("mean", "p50", "p90", "p99")
        ideal = self.ideal()
        return [
            f"NICs {load} used, split over shorter queue (ideal queues): "
            + ", ".join(f"{name} {ratio[name]:.2f} ({ideal[load][name]:.2f})" for name in names)
            for load, ratio in self.over_shorter_queue().items()
        ]

    def missed(self, bound: float) -> list[str]:
        ratio = 1 / self.over_shorter_queue()[load_name(UTILISATIONS[0])]["p99"]
        return [f"split {ratio:.2f}"] if ratio < bound else []

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import COLOURS, figure, label

        path = folder / "read_tail.png"
        with figure(path, columns=len(UTILISATIONS), size=(10.0, 4.0)) as (_, grid):
            for axes, utilisation in zip(grid[0], UTILISATIONS, strict=True):
                for run in self.runs:
                    if run.load == load_name(utilisation):
                        times = np.sort([record.read_s for record in run.records])
                        axes.plot(times, np.arange(1, len(times) + 1) / len(times), color=COLOURS[run.mode], label=label(run.mode))
                axes.set_title(f"storage NICs {load_name(utilisation)} used")
                axes.set_xlabel("time to read a request's hit blocks (s)")
                axes.set_ylabel("share of requests that took no longer")
                axes.legend(fontsize=8)
        return [path]


@cache
def ideal_ratios(utilisation: float, spread: float, requests: int = 100_000) -> dict[str, float]:
    """Mean and quantiles of `split`'s read times over `shorter_queue`'s for two storage NICs without latency or any other loss.

    Poisson arrivals, lognormal sizes with mean 1 (seconds of one NIC). A model of two queues, to say what dividing can bring at most.
    """
    random = np.random.default_rng(1)
    sizes = random.lognormal(-spread * spread / 2, spread, requests)
    arrivals = np.cumsum(random.exponential(1 / (2 * utilisation), requests))
    free = {"shorter_queue": [0.0, 0.0], "split": [0.0, 0.0]}  # when each NIC has done all that was given to it
    took: dict[str, list[float]] = {mode: [] for mode in free}
    for now, size in zip(arrivals.tolist(), sizes.tolist(), strict=True):
        ends = free["shorter_queue"]
        nic = min((0, 1), key=ends.__getitem__)
        ends[nic] = max(ends[nic], now) + size
        took["shorter_queue"].append(ends[nic] - now)
        sooner, later = sorted(max(end, now) for end in free["split"])
        end = min(sooner + size, (sooner + later + size) / 2)  # water filling: the second NIC helps once the first one's queue is as long
        free["split"] = [end, max(later, end)]
        took["split"].append(end - now)
    times = {mode: np.array(values) for mode, values in took.items()}
    ratios = {f"p{q}": float(np.percentile(times["split"], q) / np.percentile(times["shorter_queue"], q)) for q in (50, 90, 99)}
    return {"mean": float(times["split"].mean() / times["shorter_queue"].mean()), **ratios}


def load_name(utilisation: float) -> str:
    return f"{utilisation:.0%}"


def run(setup: Setup, say: Say) -> ReadTailResult:
    result = ReadTailResult("read_tail", setup)
    workload, shape = setup.workload, setup.shapes[0]
    with open_bench(setup, [Load(workload)], say) as bench:
        reading_s = setup.reading_s(shape, workload, all_nics=True)
        loads = [Load(workload, load_name(share), share * workload.agents / reading_s) for share in UTILISATIONS]
        for mode in setup.modes:
            result.runs += bench.measure(shape, mode, loads)
    return result
