"""One measured run: a system under a load on a testbed, and what the NICs carried meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from load_tests.experiments.modes import Mode
from load_tests.experiments.workload import Workload
from load_tests.replay.records import Replay, TurnRecord, summary
from load_tests.testbed.counters import Sample
from load_tests.testbed.spec import TestbedSpec

WINDOW_S = 2.0
MIDDLE = (0.1, 0.9)  # of a run: neither ramp nor tail


@dataclass(frozen=True, slots=True)
class Load:
    """A workload and how its agents come: all at once, or `agents_per_s` (Poisson). A turn may take `timeout_s`."""

    workload: Workload
    name: str = ""
    agents_per_s: float = 0.0
    timeout_s: float = 600.0


@dataclass(slots=True)
class Run:
    """`rates` are bytes/s over time of each NIC and direction (`p0-snic:rx`), at the middle of each interval of `times`.

    `started` and `finished` are time.monotonic(); `times` count from `started`.
    """

    testbed: str
    mode: str
    load: str
    repeat: int
    figures: dict[str, Any]
    nic_bytes: dict[str, dict[str, int]]
    times: npt.NDArray[np.float64]
    rates: dict[str, npt.NDArray[np.float64]]
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    replay: Replay = field(default_factory=lambda: Replay(0.0, 0.0, ()))

    @property
    def records(self) -> tuple[TurnRecord, ...]:
        return self.replay.records

    def as_json(self) -> dict[str, Any]:
        return {
            "testbed": self.testbed,
            "mode": self.mode,
            "load": self.load,
            "repeat": self.repeat,
            **self.figures,
            "nic_bytes": self.nic_bytes,
            "snic_max_over_avg": self.snic_max_over_avg(),
            "processes": self.processes,
        }

    def snic_max_over_avg(self) -> float:
        """Mean of `balance` over the middle of the run."""
        ratios = self.balance()[1]
        return float(ratios.mean()) if ratios.size else 1.0

    def balance(self, window_s: float = WINDOW_S) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Busiest SNIC's received bytes over the mean of all SNICs, in consecutive windows of the middle of the run, and their times.

        Windows in which nothing was read are left out.
        """
        loads = np.array([rate for name, rate in self.rates.items() if name.endswith("-snic:rx") and not name.startswith("store")])
        if loads.size == 0 or len(loads) < 2:
            return np.zeros(0), np.zeros(0)
        step = max(1, round(window_s / max(1e-6, float(np.median(np.diff(self.times)))))) if len(self.times) > 1 else 1
        first, last = int(MIDDLE[0] * loads.shape[1]), max(int(MIDDLE[1] * loads.shape[1]), 1)
        times, ratios = [], []
        for start in range(first, last, step):
            window = loads[:, start : start + step].sum(axis=1)
            if window.sum() > 0:
                times.append(float(self.times[start : start + step].mean()))
                ratios.append(float(window.max() / window.mean()))
        return np.array(times), np.array(ratios)


def make_run(hosts: TestbedSpec, mode: Mode, load: Load, repeat: int, replay: Replay, samples: Sequence[Sample], hit_bytes: int) -> Run:
    """The figures of one run on `hosts`, of which `samples` count the NICs' bytes."""
    figures = summary(replay)
    totals, times, rates = traffic(samples)
    own = {name: nic for name, nic in totals.items() if name.partition("-")[0] in (*hosts.workers, "store", "head")}
    received = sum(own[f"{host}-snic"]["rx"] for host in hosts.workers if f"{host}-snic" in own)
    readers = hosts.prefill if mode.read_mode == "prefill_only" else hosts.workers
    limited = hosts.snic_bits and not mode.unlimited_snic
    figures |= {
        "read_bytes": sum(sum(record.read_bytes.values()) for record in replay.records),
        "possible_hit_bytes": hit_bytes,
        "snic_received_bytes": received,
        "snic_utilisation": received / replay.jct_s / (len(readers) * hosts.snic_bits / 8) if limited else None,
        "agents_per_s": load.agents_per_s,
    }
    rates = {name: rate for name, rate in rates.items() if name.partition("-")[0] in (*hosts.workers, "store")}
    return Run(hosts.name, mode.name, load.name, repeat, figures, own, times - replay.started, rates, replay=replay)


def traffic(samples: Sequence[Sample]) -> tuple[dict[str, dict[str, int]], npt.NDArray[np.float64], dict[str, npt.NDArray[np.float64]]]:
    """Bytes per NIC and direction over all samples, and rates between neighbouring samples with their middle times."""
    if len(samples) < 2:
        return {}, np.zeros(0), {}
    at = np.array([sample.at for sample in samples])
    totals, rates = {}, {}
    for name in samples[0].totals:
        passed = {}
        for direction, column in (("rx", 0), ("tx", 1)):
            counts = np.array([sample.totals[name][column] for sample in samples], dtype=np.float64)
            passed[direction] = int(counts[-1] - counts[0])
            rates[f"{name}:{direction}"] = np.diff(counts) / np.diff(at)
        totals[name] = passed
    return totals, (at[1:] + at[:-1]) / 2, rates


def seeds(first: int) -> itertools.count[int]:
    """Seeds of runs, none used twice on a testbed: every run has turns of its own tokens."""
    return itertools.count(1 + 1000 * first)
