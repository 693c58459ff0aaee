"""The tail of storage read times at moderate load: one request's blocks divided over both sides against all of them on the shorter queue.

Independent requests (agents of one turn) with contexts of different lengths arrive in a Poisson process at half of what the storage NICs
can read. `--require` bounds p99 in `shorter_queue` over p99 in `split`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.workload import Workload

UTILISATION = 0.5
SETUP = Setup(modes=("shorter_queue", "split"), workload=Workload(agents=80, turns=1, context=384, spread=0.5, stored=20, seed=5))
QUICK = replace(SETUP, workload=Workload(agents=40, turns=1, context=384, spread=0.5, stored=20, seed=5))


class ReadTailResult(Result):
    def read_s(self) -> dict[str, dict[str, float]]:
        return {run.mode: run.figures["read_s"] for run in self.runs}

    def over_shorter_queue(self) -> dict[str, float]:
        times = self.read_s()
        return {name: times["split"][name] / times["shorter_queue"][name] for name in times["split"]}

    def figures(self) -> dict[str, Any]:
        return {"read_s": self.read_s(), "split_over_shorter_queue": self.over_shorter_queue()}

    def lines(self) -> list[str]:
        found = [f"{mode}: read p50 {times['p50']:.2f} s, p99 {times['p99']:.2f} s" for mode, times in self.read_s().items()]
        ratio = self.over_shorter_queue()
        return [*found, f"split over shorter queue: p50 {ratio['p50']:.2f}, p99 {ratio['p99']:.2f}"]

    def missed(self, bound: float) -> list[str]:
        ratio = 1 / self.over_shorter_queue()["p99"]
        return [f"split {ratio:.2f}"] if ratio < bound else []

    def plot(self, folder: Path) -> list[Path]:
        import numpy as np

        from load_tests.experiments.plots import COLOURS, figure, label

        path = folder / "read_tail.png"
        with figure(path, size=(6.4, 4.0)) as (_, grid):
            axes = grid[0, 0]
            for run in self.runs:
                times = np.sort([record.read_s for record in run.records])
                axes.plot(times, np.arange(1, len(times) + 1) / len(times), color=COLOURS[run.mode], label=label(run.mode))
            axes.set_xlabel("time to read a request's hit blocks (s)")
            axes.set_ylabel("share of requests that took no longer")
            axes.legend(fontsize=8)
        return [path]


def run(setup: Setup, say: Say) -> ReadTailResult:
    result = ReadTailResult("read_tail", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for mode in setup.modes:
            rate = UTILISATION * setup.workload.agents / setup.reading_s(setup.shapes[0], setup.workload, all_nics=True)
            result.runs += bench.measure(setup.shapes[0], mode, [Load(setup.workload, agents_per_s=rate)])
    return result
