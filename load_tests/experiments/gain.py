"""Job completion time of dual-path reads over Basic's, on hosts with separate storage and compute NICs.

The claim that matters: with dual-path reads, (P+D)/P times the load bandwidth of Basic. `--require` bounds the dual-path modes' gain.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.modes import DUAL
from load_tests.experiments.workload import Workload
from load_tests.testbed.spec import parse_shape

SETUP = Setup(
    shapes=("1P1D", "2P1D", "1P2D"),
    modes=("basic", "layerwise", "shorter_queue", "split", "pool", "oracle", "recompute"),
)
QUICK = replace(SETUP, shapes=("1P1D",), modes=("basic", "shorter_queue"), workload=Workload(turns=2))


class GainResult(Result):
    def speedups(self, over: str = "basic") -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for shape in self.setup.shapes:
            ratios = {mode: self.ratio(shape, over, mode) for mode in self.setup.modes if mode != over}
            result[shape] = {mode: ratio for mode, ratio in ratios.items() if ratio}
        return result

    def equalities(self) -> dict[str, float]:
        """Ratios of JCTs that the paper's model says are 1 (the same number of storage NICs in use)."""
        dual = next((mode for mode in ("shorter_queue", "split", "pool") if mode in self.setup.modes), "split")
        pairs = {
            f"{dual} 1P1D / basic 2P1D": (self.jct("1P1D", dual), self.jct("2P1D", "basic")),
            f"{dual} 2P1D / {dual} 1P2D": (self.jct("2P1D", dual), self.jct("1P2D", dual)),
            "basic 1P1D / basic 1P2D": (self.jct("1P1D", "basic"), self.jct("1P2D", "basic")),
        }
        return {name: left / right for name, (left, right) in pairs.items() if left and right}

    def balance(self, modes: tuple[str, ...] = DUAL) -> dict[str, float]:
        """Mean SNIC max/avg of the dual-path runs, by shape."""
        result = {}
        for shape in self.setup.shapes:
            ratios = [run.snic_max_over_avg() for run in self.runs if run.testbed == shape and run.mode in modes]
            if ratios:
                result[shape] = statistics.mean(ratios)
        return result

    def figures(self) -> dict[str, Any]:
        balance = self.balance()
        return {
            "speedup_over_basic": self.speedups(),
            "speedup_over_layerwise": self.speedups("layerwise"),
            "bound": {shape: sum(parse_shape(shape)) / parse_shape(shape)[0] for shape in self.setup.shapes},
            "snic_max_over_avg": max(balance.values(), default=None),
            "snic_max_over_avg_by_shape": balance,
            "snic_max_over_avg_by_mode": {mode: self.balance((mode,)) for mode in DUAL if mode in self.setup.modes},
            "equalities": self.equalities(),
        }

    def lines(self) -> list[str]:
        ratios = [f"{shape} {mode}: {ratio:.2f} x Basic" for shape, modes in self.speedups().items() for mode, ratio in modes.items()]
        return ratios + [f"{name}: {ratio:.3f}" for name, ratio in self.equalities().items()]

    def missed(self, bound: float) -> list[str]:
        return [
            f"{shape} {mode} {ratio:.2f} x Basic"
            for shape, ratios in self.speedups().items()
            for mode, ratio in ratios.items()
            if mode in DUAL and ratio < bound
        ]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_jct, plot_snics

        snics = [plot_snics(self, shape, folder / f"{self.experiment}_snic_{shape}.png") for shape in self.setup.shapes]
        return [plot_jct(self, folder / f"{self.experiment}_jct.png"), *snics]


def run(setup: Setup, say: Say) -> GainResult:
    """Modes alternate within each repetition, so that slow changes of the machine meet all of them. Raises TestbedError."""
    result = GainResult("gain", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for shape in setup.shapes:
            say(f"{shape}: reading all hits over the prefill hosts' storage NICs takes {setup.reading_s(shape, setup.workload):.0f} s")
            for repeat in range(setup.repeats):
                for mode in setup.modes:
                    result.runs += bench.measure(shape, mode, repeat=repeat)
    return result
