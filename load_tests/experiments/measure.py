"""One measured run: a read mode on a testbed, and what its NICs carried meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from load_tests.experiments.job import Answer, Job
from load_tests.experiments.workload import VOCABULARY, Model, Workload
from load_tests.replay.records import Replay, TurnRecord, summary
from load_tests.testbed.counters import Sample
from load_tests.testbed.spec import TestbedSpec
from load_tests.testbed.testbed import Testbed

BUCKET = "kvcache"


@dataclass(frozen=True, slots=True)
class Mode:
    """A system to measure: its read mode, and whether it may read at all."""

    name: str
    read_mode: str
    share_nothing: bool = False
    unlimited_snic: bool = False


MODES = {
    mode.name: mode
    for mode in (
        Mode("basic", "prefill_only"),
        Mode("shorter_queue", "shorter_queue"),
        Mode("split", "split"),
        Mode("pool", "pool"),
        Mode("recompute", "prefill_only", share_nothing=True),
        Mode("oracle", "split", unlimited_snic=True),
    )
}


@dataclass(slots=True)
class Run:
    """`rates` are bytes/s over time of each NIC and direction (`p0-snic:rx`), at the middle of each interval of `times`."""

    testbed: str
    mode: str
    repeat: int
    figures: dict[str, Any]
    nic_bytes: dict[str, dict[str, int]]
    times: npt.NDArray[np.float64]
    rates: dict[str, npt.NDArray[np.float64]]
    processes: dict[str, dict[str, Any]] = field(default_factory=dict)
    records: tuple[TurnRecord, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "testbed": self.testbed,
            "mode": self.mode,
            "repeat": self.repeat,
            **self.figures,
            "nic_bytes": self.nic_bytes,
            "snic_max_over_avg": self.snic_max_over_avg(),
            "snic_utilisation": self.figures.get("snic_utilisation"),
            "processes": self.processes,
        }

    def snic_max_over_avg(self, window_s: float = 2.0) -> float:
        """Mean over time windows of (busiest SNIC's received bytes / mean of all SNICs), over the middle 80 % of the run."""
        loads = np.array([rate for name, rate in self.rates.items() if name.endswith("-snic:rx") and not name.startswith("store")])
        if loads.size == 0 or len(loads) < 2:
            return 1.0
        step = max(1, round(window_s / max(1e-6, float(np.median(np.diff(self.times)))))) if len(self.times) > 1 else 1
        first, last = int(0.1 * loads.shape[1]), max(int(0.9 * loads.shape[1]), 1)
        ratios = []
        for start in range(first, last, step):
            window = loads[:, start : start + step].sum(axis=1)
            if window.sum() > 0:
                ratios.append(float(window.max() / window.mean()))
        return float(np.mean(ratios)) if ratios else 1.0


def preload(testbed: Testbed, model: Model, workload: Workload, timeout_s: float = 600.0) -> None:
    """Store the agents' contexts, over storage NICs that are not limited meanwhile."""
    contexts = workload.contexts
    job = Job(
        [*testbed.overrides(BUCKET), *cluster_settings(model, workload, testbed.folder)],
        [[] for _ in contexts],
        VOCABULARY,
        contexts,
        workload.seed,
        preload=True,
    )
    limit_snics(testbed, 0)
    _drive(testbed, job, "preload", timeout_s)
    limit_snics(testbed, testbed.spec.snic_bits)


def measure(testbed: Testbed, model: Model, workload: Workload, mode: Mode, repeat: int, extra: Sequence[str], timeout_s: float) -> Run:
    """Run `mode` once, after `preload`. Raises TestbedError when the run fails.

    Every run has turns of its own tokens, so it finds the preloaded contexts in storage and nothing of earlier runs.
    """
    spec = testbed.spec
    overrides = [*testbed.overrides(BUCKET), *cluster_settings(model, workload, testbed.folder), f"scheduling.read_mode={mode.read_mode}"]
    job = Job(
        [*overrides, *extra],
        [[[turn.append, turn.generate, turn.pause_s] for turn in trajectory.turns] for trajectory in workload.trajectories],
        VOCABULARY,
        workload.contexts,
        workload.seed,
        1 + list(MODES).index(mode.name) + len(MODES) * repeat + 1000 * workload.seed,
        mode.share_nothing,
        timeout_s=timeout_s,
    )
    limit_snics(testbed, 0 if mode.unlimited_snic else spec.snic_bits)
    answer = _drive(testbed, job, f"{mode.name}-{repeat}", timeout_s + 240)
    return _run(spec, mode, repeat, answer, testbed.counters.between(answer.started, answer.finished), model, workload)


def _drive(testbed: Testbed, job: Job, name: str, timeout_s: float) -> Answer:
    stem = testbed.folder / name
    job_path, answer_path, log = stem.with_suffix(".job"), stem.with_suffix(".answer"), stem.with_suffix(".log")
    job.write(job_path)
    testbed.run(["-m", "load_tests.experiments.driver", str(job_path), str(answer_path)], log, timeout_s)
    return Answer.read(answer_path)


def limit_snics(testbed: Testbed, bits: int) -> None:
    """Shape the workers' storage NICs; 0: no limit."""
    for host in testbed.spec.workers:
        testbed.network.shape(host, "snic", bits)


def cluster_settings(model: Model, workload: Workload, folder: Path) -> list[str]:
    """Engines that never limit: every agent finds room in the window, the pool and the staging memory."""
    context = workload.max_context
    blocks = -(-context // model.block_tokens)
    return [
        f"model.spec={model.make(folder, context)}",
        f"model.block_tokens={model.block_tokens}",
        f"model.max_context={context}",
        "model.threads=1",
        "storage.layer_groups=1",
        "storage.read_threads=8",
        "prefill.max_batch_tokens=1024",
        f"prefill.window_tokens={4 * context}",
        f"decode.pool_blocks={blocks * workload.agents}",
        f"decode.max_batch={min(16, workload.agents)}",
        f"staging.slots={blocks * workload.agents * 2}",
        "transfer.busy_poll_s=0.001",
        "transfer.idle_poll_s=0.005",
    ]


def _run(spec: TestbedSpec, mode: Mode, repeat: int, answer: Answer, samples: Sequence[Sample], model: Model, workload: Workload) -> Run:
    records = tuple(TurnRecord(**record) for record in answer.records)
    figures = summary(Replay(answer.started, answer.finished, records))
    nic_bytes, times, rates = traffic(samples)
    read = sum(sum(record.read_bytes.values()) for record in records)
    received = sum(nic_bytes[f"{host}-snic"]["rx"] for host in spec.workers)
    readers = spec.prefill if mode.read_mode == "prefill_only" else spec.workers
    figures |= {
        "quiet_after_s": answer.quiet_after_s,
        "read_bytes": read,
        "possible_hit_bytes": workload.hit_bytes(model.geometry),
        "snic_received_bytes": received,
        "snic_utilisation": received / (answer.finished - answer.started) / (len(readers) * spec.snic_bits / 8) if spec.snic_bits else None,
    }
    start = answer.started
    return Run(spec.name, mode.name, repeat, figures, nic_bytes, times - start, rates, answer.processes, records)


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
