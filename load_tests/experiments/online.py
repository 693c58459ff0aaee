"""Capacity within an SLO: agents arrive in a Poisson process, faster and faster.

Rates are in units of what the hit bytes of all agents allow over the storage NICs that a system uses, so each system is driven from calm
to its limit. The SLO is the paper's (TTFT 4 s, TPOT 50 ms, means over turns), scaled: TTFT to four times the reading of a turn's hits
over one storage NIC, TPOT to what hosts that share one machine's cores can do. Capacity is the rate at which the mean TTFT crosses the
SLO, between the measured points; `--require` bounds the dual-path modes' capacity over Basic's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import open_bench
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import Load, Run
from load_tests.experiments.modes import DUAL, MODES
from load_tests.experiments.workload import Workload
from load_tests.replay.records import Slo

SETUP = Setup(modes=("basic", "shorter_queue", "split"), workload=Workload(agents=20, turns=2, context=384, stored=10, seed=3))
QUICK = replace(SETUP, modes=("basic", "split"), workload=Workload(agents=10, turns=1, context=384, stored=10, seed=3))
UTILISATIONS = (0.7, 0.9, 1.1, 1.4)
TTFT_TURNS, TPOT_S = 4.0, 0.25


class OnlineResult(Result):
    def slo(self) -> Slo:
        workload = self.setup.workload
        return Slo(TTFT_TURNS * self.setup.reading_s("1P1D", workload) / workload.turn_count, TPOT_S)

    def sweep(self, shape: str, mode: str) -> list[Run]:
        """Runs of a system by rate."""
        return sorted((run for run in self.runs if (run.testbed, run.mode) == (shape, mode)), key=lambda run: run.figures["agents_per_s"])

    def capacity(self, shape: str, mode: str) -> float | None:
        """Agents per second. None if no rate kept the SLO; the highest rate that did, if none missed it."""
        slo = self.slo()
        kept: tuple[float, float] | None = None
        for run in self.sweep(shape, mode):
            rate, ttft = float(run.figures["agents_per_s"]), float(run.figures["ttft_s"]["mean"])
            if run.figures["tpot_s"]["mean"] > slo.tpot_s:
                break
            if ttft > slo.ttft_s:
                if kept is None:
                    return None
                share = math.log(slo.ttft_s / kept[1]) / math.log(ttft / kept[1])
                return kept[0] + share * (rate - kept[0])
            kept = (rate, ttft)
        return kept[0] if kept else None

    def over_basic(self) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for shape in self.setup.shapes:
            capacities = {mode: self.capacity(shape, mode) for mode in self.setup.modes}
            basic = capacities.pop("basic", None)
            result[shape] = {mode: capacity / basic for mode, capacity in capacities.items() if capacity and basic}
        return result

    def figures(self) -> dict[str, Any]:
        slo = self.slo()
        return {
            "capacity_over_basic": self.over_basic(),
            "capacity_agents_per_s": {
                shape: {mode: self.capacity(shape, mode) for mode in self.setup.modes} for shape in self.setup.shapes
            },
            "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s},
            "read_p99_over_shorter_queue": self.read_p99(),
        }

    def read_p99(self) -> dict[str, dict[str, float]]:
        """p99 of the storage read time in `split` over that in `shorter_queue`, by shape and load."""
        result: dict[str, dict[str, float]] = {}
        for shape in self.setup.shapes:
            pairs = zip(self.sweep(shape, "shorter_queue"), self.sweep(shape, "split"), strict=False)
            result[shape] = {one.load: other.figures["read_s"]["p99"] / one.figures["read_s"]["p99"] for one, other in pairs}
        return result

    def lines(self) -> list[str]:
        slo = self.slo()
        found = [f"SLO: mean TTFT {slo.ttft_s:.1f} s, mean TPOT {slo.tpot_s:.2f} s"]
        for shape in self.setup.shapes:
            for mode in self.setup.modes:
                capacity, ratio = self.capacity(shape, mode), self.over_basic()[shape].get(mode)
                found.append(
                    f"{shape} {mode}: {f'{capacity:.3f} agents/s' if capacity else 'never within the SLO'}"
                    f"{f', {ratio:.2f} x Basic' if ratio else ''}"
                )
        return found

    def missed(self, bound: float) -> list[str]:
        return [
            f"{mode} {ratio:.2f}"
            for ratios in self.over_basic().values()
            for mode, ratio in ratios.items()
            if mode in DUAL and ratio < bound
        ]

    def plot(self, folder: Path) -> list[Path]:
        from load_tests.experiments.plots import plot_lines

        paths = []
        for shape in self.setup.shapes:
            for figure, name, bound in (("ttft_s", "TTFT", self.slo().ttft_s), ("tpot_s", "TPOT", self.slo().tpot_s)):
                curves = {}
                for mode in self.setup.modes:
                    runs = self.sweep(shape, mode)
                    curves[mode] = ([run.figures["agents_per_s"] for run in runs], [run.figures[figure]["mean"] for run in runs])
                path = folder / f"online_{name.lower()}_{shape}.png"
                paths.append(plot_lines(path, curves, "agents per second", f"mean {name} (s)", bound=(bound, "SLO")))
        return paths


def run(setup: Setup, say: Say) -> OnlineResult:
    """A cluster for each system goes through all its rates; the same agents arrive in the same order, faster. Raises TestbedError."""
    result = OnlineResult("online", setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for shape in setup.shapes:
            for mode in setup.modes:
                reading_s = setup.reading_s(shape, setup.workload, all_nics=MODES[mode].read_mode != "prefill_only")
                loads = [
                    Load(setup.workload, f"{utilisation:.0%}", utilisation * setup.workload.agents / reading_s)
                    for utilisation in UTILISATIONS
                ]
                result.runs += bench.measure(shape, mode, loads)
    return result
