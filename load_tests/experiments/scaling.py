"""JCT as one length of the workload grows: shared by `append` and `generation`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.modes import DUAL
from load_tests.experiments.workload import Workload

SETUP = Setup(modes=("basic", "shorter_queue", "split"), workload=Workload(agents=8, turns=2, context=640))
QUICK = replace(SETUP, modes=("basic", "split"), workload=Workload(agents=6, turns=1, context=640))
FACTORS = (0.5, 2.0, 6.0)


class ScalingResult(Result):
    def gains(self) -> dict[str, dict[str, float]]:
        """Gain over Basic by mode and factor."""
        shape = self.setup.shapes[0]
        result: dict[str, dict[str, float]] = {}
        for mode in self.setup.modes[1:]:
            ratios = {load_name(factor): self.ratio(shape, self.setup.modes[0], mode, load_name(factor)) for factor in FACTORS}
            result[mode] = {name: ratio for name, ratio in ratios.items() if ratio}
        return result

    def figures(self) -> dict[str, Any]:
        return {"speedup_over_basic": self.gains()}

    def lines(self) -> list[str]:
        return [
            f"{mode}: " + ", ".join(f"{name} {ratio:.2f} x Basic" for name, ratio in gains.items()) for mode, gains in self.gains().items()
        ]

    def missed(self, bound: float) -> list[str]:
        return [
            f"{mode} {name} {ratio:.2f}"
            for mode, gains in self.gains().items()
            if mode in DUAL
            for name, ratio in gains.items()
            if ratio < bound
        ]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_lines

        shape = self.setup.shapes[0]
        curves = {}
        for mode in self.setup.modes:
            points = [(factor, jct) for factor in FACTORS if (jct := self.jct(shape, mode, load_name(factor)))]
            curves[mode] = ([factor for factor, _ in points], [jct for _, jct in points])
        what = "appended" if self.experiment == "append" else "generated"
        return [plot_lines(folder / f"{self.experiment}_jct.png", curves, f"{what} tokens, times the trace's", "job completion time (s)")]


def load_name(factor: float) -> str:
    return f"x{factor:g}"


def run_scaling(experiment: str, setup: Setup, loads: Sequence[Load], say: Say) -> ScalingResult:
    """Each system goes through all loads, one per factor, in one cluster."""
    result = ScalingResult(experiment, setup)
    with open_bench(setup, loads, say) as bench:
        for mode in setup.modes:
            result.runs += bench.measure(setup.shapes[0], mode)
    return result
