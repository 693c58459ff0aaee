"""How evenly the storage NICs are used over time: the busiest one's traffic over the mean, against reads and engines in turn.

Two prefill and two decode hosts, contexts of different lengths (paper figure 13: 1.18 with its scheduling, 1.53 in turn), none so long that
it would be read alone at the end. `--require` bounds the mean of `alternate`'s ratio over that of the scheduled modes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.workload import Workload

SETUP = Setup(shapes=("2P2D",), modes=("alternate", "shorter_queue", "split"), workload=Workload(agents=16, turns=4, spread=0.2, seed=2))
QUICK = replace(SETUP, modes=("alternate", "shorter_queue"), workload=Workload(agents=12, turns=2, spread=0.2, seed=2))


class BalanceResult(Result):
    def ratios(self) -> dict[str, float]:
        """Mean over time of max/avg, by mode."""
        return {run.mode: run.snic_max_over_avg() for run in self.runs}

    def figures(self) -> dict[str, Any]:
        windows = {run.mode: [ratios.tolist() for ratios in run.balance()] for run in self.runs}
        return {"snic_max_over_avg": self.ratios(), "windows": windows}

    def lines(self) -> list[str]:
        return [f"{run.mode}: SNIC max/avg {run.snic_max_over_avg():.3f}, JCT {run.figures['jct_s']:.1f} s" for run in self.runs]

    def missed(self, bound: float) -> list[str]:
        ratios = self.ratios()
        turns = ratios.pop("alternate")
        return [f"{mode} {turns / ratio:.2f}" for mode, ratio in ratios.items() if turns / ratio < bound]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_lines

        curves = {run.mode: (times.tolist(), ratios.tolist()) for run in self.runs for times, ratios in [run.balance()]}
        return [plot_lines(folder / "balance_snic.png", curves, "seconds since the agents started", "busiest SNIC / mean of SNICs")]


def run(setup: Setup, say: Say) -> BalanceResult:
    result = BalanceResult("balance", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for mode in setup.modes:
            result.runs += bench.measure(setup.shapes[0], mode)
    return result
