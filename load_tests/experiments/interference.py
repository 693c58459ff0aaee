"""What KV on the compute NICs does to model traffic there, with and without traffic classes.

All-to-all exchanges between the hosts (exchange.py) stand for the model's collectives. They are timed without KV, and with as much KV
as the compute NICs carry (storage NICs unlimited, reads split over both sides), on links with one queue and on links with a class for
each kind of traffic (testbed/traffic.py). `--require` bounds the median without KV over that with KV, with classes (1: no interference).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from load_tests.experiments.bench import Bench, open_bench
from load_tests.experiments.exchange import Round, exchanges
from load_tests.experiments.experiment import Result, Say, Setup
from load_tests.experiments.measure import MIDDLE, Load, Run
from load_tests.experiments.modes import Mode
from load_tests.experiments.workload import Workload
from load_tests.replay.records import percentiles
from load_tests.testbed.spec import TestbedSpec
from load_tests.testbed.traffic import MODEL_TOS, SMALL_BURST_BYTES

SETUP = Setup(modes=(), testbed=TestbedSpec(cnic_bits=100_000_000), workload=Workload(turns=2))
QUICK = replace(SETUP, workload=Workload(agents=8, turns=1))
FULL_LOAD = Mode("full_load", "split", unlimited_snic=True)
BYTES, INTERVAL_S, ALONE_S = 64 << 10, 0.05, 15.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Exchanges under one condition, and how much of the compute NICs' rate everything used (mean of both directions of all hosts)."""

    classes: bool
    kv: bool
    rounds: tuple[Round, ...]
    cnic_used: float

    @property
    def name(self) -> str:
        return f"{'with' if self.kv else 'without'} KV, {'two classes' if self.classes else 'one queue'}"

    @property
    def latency(self) -> dict[str, float]:
        return percentiles([took for _, took in self.rounds])


class InterferenceResult(Result):
    def __init__(self, setup: Setup) -> None:
        super().__init__("interference", setup)
        self.traffic: list[Traffic] = []

    def find(self, classes: bool, kv: bool) -> Traffic:
        return next(one for one in self.traffic if (one.classes, one.kv) == (classes, kv))

    def slowdown(self, classes: bool) -> dict[str, float]:
        """Latency with KV over that without, at each percentile."""
        before, after = self.find(classes, False).latency, self.find(classes, True).latency
        return {name: after[name] / before[name] for name in after}

    def figures(self) -> dict[str, Any]:
        return {
            "slowdown_with_classes": self.slowdown(True),
            "slowdown_without_classes": self.slowdown(False),
            "exchange": {"bytes": BYTES, "interval_s": INTERVAL_S},
            "latency_s": {one.name: {**one.latency, "exchanges": len(one.rounds), "cnic_used": one.cnic_used} for one in self.traffic},
        }

    def lines(self) -> list[str]:
        found = [
            f"{one.name}: p50 {one.latency['p50'] * 1e3:.1f} ms, p99 {one.latency['p99'] * 1e3:.1f} ms, {len(one.rounds)} exchanges, "
            f"compute NICs {one.cnic_used:.0%} used"
            for one in self.traffic
        ]
        for classes in (True, False):
            ratio = self.slowdown(classes)
            found.append(
                f"{'two classes' if classes else 'one queue'}: with KV {ratio['p50']:.2f} x the median, {ratio['p99']:.2f} x the p99"
            )
        return found

    def missed(self, bound: float) -> list[str]:
        ratio = 1 / self.slowdown(True)["p50"]
        return [f"two classes {ratio:.2f}"] if ratio < bound else []

    def plot(self, folder: Path) -> list[Path]:
        import numpy as np

        from load_tests.experiments.plots import figure

        path = folder / "interference_latency.png"
        colours = {(True, False): "#2ca02c", (True, True): "#1f77b4", (False, False): "#bcbd22", (False, True): "#d62728"}
        with figure(path, size=(6.8, 4.0)) as (_, grid):
            axes = grid[0, 0]
            for one in self.traffic:
                times = np.sort([took for _, took in one.rounds]) * 1e3
                style = "-" if one.kv else "--"
                axes.plot(times, np.arange(1, len(times) + 1) / len(times), style, color=colours[one.classes, one.kv], label=one.name)
            axes.set_xscale("log")
            axes.set_xlabel("time of an exchange (ms)")
            axes.set_ylabel("share of exchanges that took no longer")
            axes.legend(fontsize=8)
        return [path]


def run(setup: Setup, say: Say) -> InterferenceResult:
    result = InterferenceResult(setup)
    with open_bench(setup, [Load(setup.workload)], say) as bench:
        for classes in (True, False):
            for host in bench.testbed.spec.workers:
                bench.testbed.network.shape(host, "cnic", setup.testbed.cnic_bits, classes, SMALL_BURST_BYTES)
            alone = _alone(bench, classes)
            loaded, run = _loaded(bench, setup.shapes[0], classes)
            result.traffic += [alone, loaded]
            result.runs.append(run)
            for one in (alone, loaded):
                say(f"{one.name}: median {one.latency['p50'] * 1e3:.1f} ms of {len(one.rounds)} exchanges")
    return result


def _alone(bench: Bench, classes: bool) -> Traffic:
    hosts = bench.testbed.spec.workers
    started = time.monotonic()
    with exchanges(bench.testbed, hosts, BYTES, INTERVAL_S, MODEL_TOS) as rounds:
        time.sleep(ALONE_S)
    return _traffic(bench, classes, False, rounds, started, time.monotonic())


def _loaded(bench: Bench, shape: str, classes: bool) -> tuple[Traffic, Run]:
    with exchanges(bench.testbed, bench.testbed.spec.workers, BYTES, INTERVAL_S, MODEL_TOS) as rounds:
        (run,) = bench.measure(shape, FULL_LOAD)
    return _traffic(bench, classes, True, rounds, run.replay.started, run.replay.finished), run


def _traffic(bench: Bench, classes: bool, kv: bool, rounds: list[Round], started: float, finished: float) -> Traffic:
    """Only the middle of the time span counts: before and after it, the load is not what it should be."""
    seconds = finished - started
    start, end = started + MIDDLE[0] * seconds, started + MIDDLE[1] * seconds
    spec = bench.testbed.spec
    samples = bench.testbed.counters.between(start, end)
    passed = sum(sum(samples[-1].totals[f"{host}-cnic"]) - sum(samples[0].totals[f"{host}-cnic"]) for host in spec.workers)
    used = passed / (samples[-1].at - samples[0].at) / (2 * len(spec.workers) * spec.cnic_bits / 8)
    return Traffic(classes, kv, tuple(one for one in rounds if start <= one[0] <= end), used)
