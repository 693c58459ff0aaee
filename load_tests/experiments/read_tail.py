"""The tail of storage read times: one request's blocks divided over both sides against all of them on the shorter queue.

Independent requests (agents of one turn) with contexts of different lengths arrive in a Poisson process at a quarter and at half of what
the storage NICs can read. Dividing shortens the reading itself, not the wait behind a burst of others, of which the tail consists.
`--require` bounds p99 in `shorter_queue` over p99 in `split` at the lower load.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

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

    def figures(self) -> dict[str, Any]:
        return {"read_s": self.read_s(), "split_over_shorter_queue": self.over_shorter_queue()}

    def lines(self) -> list[str]:
        names = ("mean", "p50", "p90", "p99")
        return [
            f"NICs {load} used, split over shorter queue: " + ", ".join(f"{name} {ratio[name]:.2f}" for name in names)
            for load, ratio in self.over_shorter_queue().items()
        ]

    def missed(self, bound: float) -> list[str]:
        ratio = 1 / self.over_shorter_queue()[load_name(UTILISATIONS[0])]["p99"]
        return [f"split {ratio:.2f}"] if ratio < bound else []

    def plot(self, folder: Path) -> list[Path]:
        import numpy as np

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
