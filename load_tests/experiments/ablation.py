"""What each part of the system brings: Basic, then layerwise prefill, then reads on both sides in turn, then scheduling.

The steps of the paper's ablation on one prefill and two decode hosts, with contexts of different lengths, without which reads in turn
would be balanced by themselves. `--require` bounds the last step's gain over Basic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.workload import Workload

SETUP = Setup(shapes=("1P2D",), modes=("basic", "layerwise", "alternate", "shorter_queue"), workload=Workload(turns=2, spread=0.6))
QUICK = replace(SETUP, workload=Workload(agents=8, turns=1, spread=0.6))


class AblationResult(Result):
    def gains(self) -> dict[str, dict[str, float]]:
        """Each step's gain over Basic, by shape."""
        result = {}
        for shape in self.setup.shapes:
            ratios = {mode: self.ratio(shape, self.setup.modes[0], mode) for mode in self.setup.modes}
            result[shape] = {mode: ratio for mode, ratio in ratios.items() if ratio}
        return result

    def figures(self) -> dict[str, Any]:
        less = {shape: {mode: 1 - 1 / ratio for mode, ratio in gains.items()} for shape, gains in self.gains().items()}
        return {"speedup_over_basic": self.gains(), "jct_saved": less}

    def lines(self) -> list[str]:
        return [
            f"{shape} {mode}: {ratio:.2f} x Basic, JCT {1 / ratio - 1:+.1%}"
            for shape, gains in self.gains().items()
            for mode, ratio in gains.items()
        ]

    def missed(self, bound: float) -> list[str]:
        last = self.setup.modes[-1]
        return [f"{shape} {last} {gains[last]:.2f}" for shape, gains in self.gains().items() if gains[last] < bound]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_jct

        return [plot_jct(self, folder / "ablation_jct.png")]


def run(setup: Setup, say: Say) -> AblationResult:
    result = AblationResult("ablation", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for repeat in range(setup.repeats):
            for shape in setup.shapes:
                for mode in setup.modes:
                    result.runs += bench.measure(shape, mode, repeat=repeat)
    return result
