"""The claim that matters: with dual-path reads, (P+D)/P times the load bandwidth of Basic, measured as job completion time."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from load_tests.experiments.machine import Machine
from load_tests.experiments.measure import MODES, Run, measure, preload
from load_tests.experiments.workload import Model, Workload
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.spec import TestbedSpec
from load_tests.testbed.testbed import open_testbed

Say = Callable[[str], None]
DUAL = ("shorter_queue", "split", "pool")


@dataclass(frozen=True, slots=True)
class GainPlan:
    """What to run. `shapes` are `1P1D` and the like, `modes` names of `measure.MODES`; basic must be among them for ratios."""

    shapes: tuple[str, ...] = ("1P1D", "2P1D", "1P2D")
    modes: tuple[str, ...] = ("basic", "shorter_queue", "split")
    repeats: int = 1
    testbed: TestbedSpec = field(default_factory=TestbedSpec)
    model: Model = field(default_factory=Model)
    workload: Workload = field(default_factory=Workload)
    overrides: tuple[str, ...] = ()
    run_timeout_s: float = 900.0


@dataclass(slots=True)
class GainResult:
    plan: GainPlan
    runs: list[Run] = field(default_factory=list)

    def jct(self, shape: str, mode: str) -> float | None:
        """Median over the repetitions."""
        found = [run.figures["jct_s"] for run in self.runs if (run.testbed, run.mode) == (shape, mode)]
        return statistics.median(found) if found else None

    def speedups(self) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for shape in self.plan.shapes:
            basic = self.jct(shape, "basic")
            others = {mode: self.jct(shape, mode) for mode in self.plan.modes if mode != "basic"}
            result[shape] = {mode: basic / jct for mode, jct in others.items() if basic and jct}
        return result

    def equalities(self) -> dict[str, float]:
        """Ratios of JCTs that the paper's model says are 1 (the same number of storage NICs in use)."""
        dual = next((mode for mode in ("split", "shorter_queue", "pool") if mode in self.plan.modes), "split")
        pairs = {
            f"{dual} 1P1D / basic 2P1D": (self.jct("1P1D", dual), self.jct("2P1D", "basic")),
            f"{dual} 2P1D / {dual} 1P2D": (self.jct("2P1D", dual), self.jct("1P2D", dual)),
            "basic 1P1D / basic 1P2D": (self.jct("1P1D", "basic"), self.jct("1P2D", "basic")),
        }
        return {name: left / right for name, (left, right) in pairs.items() if left and right}

    def balance(self) -> dict[str, float]:
        """Mean SNIC max/avg of the dual-path runs, by shape."""
        result = {}
        for shape in self.plan.shapes:
            ratios = [run.snic_max_over_avg() for run in self.runs if run.testbed == shape and run.mode in DUAL]
            if ratios:
                result[shape] = statistics.mean(ratios)
        return result

    def as_json(self) -> dict[str, Any]:
        balance = self.balance()
        return {
            "experiment": "gain",
            "speedup_over_basic": self.speedups(),
            "bound": {shape: sum(parse_shape(shape)) / parse_shape(shape)[0] for shape in self.plan.shapes},
            "snic_max_over_avg": max(balance.values(), default=None),
            "snic_max_over_avg_by_shape": balance,
            "equalities": self.equalities(),
            "testbed": {**asdict(self.plan.testbed), "prefill_hosts": None, "decode_hosts": None},
            "model": {**asdict(self.plan.model), "kv_bytes_per_token": self.plan.model.geometry.token_bytes},
            "workload": asdict(self.plan.workload),
            "overrides": list(self.plan.overrides),
            "runs": [run.as_json() for run in self.runs],
        }


def parse_shape(shape: str) -> tuple[int, int]:
    """`2P1D` -> (2, 1). Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)P([1-9]\d*)D", shape)
    if match is None:
        raise ValueError(f"{shape!r} is not of the form 1P2D")
    return int(match[1]), int(match[2])


def run_gain(plan: GainPlan, say: Say) -> GainResult:
    """Run everything; modes alternate within each repetition, so that slow changes of the machine meet all of them. Raises TestbedError."""
    result = GainResult(plan)
    unknown = [mode for mode in plan.modes if mode not in MODES]
    if unknown:
        raise TestbedError(f"unknown modes {', '.join(unknown)}; there are {', '.join(MODES)}")
    for shape in plan.shapes:
        prefill, decode = parse_shape(shape)
        spec = replace(plan.testbed, prefill_hosts=prefill, decode_hosts=decode)
        bound_s = plan.workload.hit_bytes(plan.model.geometry) / (spec.snic_bits / 8)
        say(f"{shape}: starting {len(spec.hosts)} hosts; reading all hits over one storage NIC takes {bound_s:.0f} s")
        with open_testbed(spec) as testbed:
            say(f"{shape}: storing the contexts of {plan.workload.agents} agents")
            preload(testbed, plan.model, plan.workload)
            for repeat in range(plan.repeats):
                for mode in plan.modes:
                    with Machine() as machine:
                        run = measure(testbed, plan.model, plan.workload, MODES[mode], repeat, plan.overrides, plan.run_timeout_s)
                    run.figures["machine"] = machine.figures()
                    result.runs.append(run)
                    say(f"{shape}: {describe(run)}")
                    if run.figures["failed_turns"]:
                        raise TestbedError(f"{run.figures['failed_turns']} turns failed: {run.figures['first_error']}")
    return result


def describe(run: Run) -> str:
    figures = run.figures
    utilisation = figures["snic_utilisation"]
    return (
        f"{run.mode:13s} JCT {figures['jct_s']:6.1f} s, hits {figures['hit_rate']:.1%}, read {figures['read_bytes'] / 1e6:.0f} MB, "
        f"storage NICs {f'{utilisation:.0%} used' if utilisation is not None else 'not limited'}, "
        f"max/avg {run.snic_max_over_avg():.2f}, TTFT p50 {figures['ttft_s']['p50']:.2f} s, "
        f"load of the machine {figures['machine']['load']:.1f}"
    )
