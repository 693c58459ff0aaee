"""A model that computes long and reads little: storage is not what limits, and dual-path reads must cost nothing.

JCT over that of Oracle (unlimited storage NICs), and against computing every token again. `--require` bounds Oracle's JCT over `split`'s;
a mode that is slower than `recompute` is always missed.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load
from load_tests.experiments.workload import Model, Workload

SETUP = Setup(
    modes=("basic", "shorter_queue", "split", "oracle", "recompute"),
    model=Model(layers=4, kv_heads=1, head_dim=64, hidden=1536, heads=16),
    workload=Workload(agents=6, turns=3),
)
QUICK = replace(SETUP, modes=("split", "oracle", "recompute"), workload=Workload(agents=4, turns=1))


class ComputeBoundResult(Result):
    def over(self, mode: str) -> dict[str, float]:
        """JCT of every other mode over that of `mode`."""
        shape = self.setup.shapes[0]
        ratios = {other: self.ratio(shape, other, mode) for other in self.setup.modes if other != mode}
        return {other: ratio for other, ratio in ratios.items() if ratio}

    def figures(self) -> dict[str, Any]:
        return {"jct_over_oracle": self.over("oracle"), "jct_over_recompute": self.over("recompute")}

    def lines(self) -> list[str]:
        recompute = self.over("recompute")
        return [
            f"{mode}: {ratio:.3f} x Oracle's JCT, {recompute.get(mode, 1.0):.3f} x recompute's"
            for mode, ratio in self.over("oracle").items()
        ]

    def missed(self, bound: float) -> list[str]:
        far = [f"{mode} {1 / ratio:.2f}" for mode, ratio in self.over("oracle").items() if mode == "split" and 1 / ratio < bound]
        return far + [f"{mode} slower than recompute" for mode, ratio in self.over("recompute").items() if ratio > 1]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_jct

        return [plot_jct(self, folder / "compute_bound_jct.png", bounds=False)]


def run(setup: Setup, say: Say) -> ComputeBoundResult:
    result = ComputeBoundResult("compute_bound", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for repeat in range(setup.repeats):
            for mode in setup.modes:
                result.runs += bench.measure(setup.shapes[0], mode, repeat=repeat)
    return result
