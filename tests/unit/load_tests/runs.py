"""Runs with given figures, as if they had been measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from load_tests.experiments.measure import Run
from load_tests.replay.records import Replay, TurnRecord, summary


def turn(agent: int, started: float, ttft: float, error: str = "") -> TurnRecord:
    return TurnRecord(
        agent, 0, 100, 3, started, started + ttft, started + ttft + 0.1, started + ttft + 0.2, 3, read_s=ttft / 2, error=error
    )


def run(
    shape: str,
    mode: str,
    jct: float,
    rates: Mapping[str, Sequence[float]] | None = None,
    load: str = "",
    records: Sequence[TurnRecord] = (),
    **figures: Any,
) -> Run:
    """`rates` are bytes/s at seconds 0, 1, 2...; two NICs that receive alike if not given."""
    given = rates if rates is not None else {f"{host}-snic:rx": [1e7] * 20 for host in ("p0", "d0")}
    arrays = {name: np.array(values) for name, values in given.items()}
    length = max((len(values) for values in arrays.values()), default=0)
    replay = Replay(0.0, jct, tuple(records))
    all_figures = {**summary(replay), "snic_utilisation": 0.9, "agents_per_s": 0.0, "machine": {"load": 1.0}, "read_bytes": 0, **figures}
    return Run(
        shape, mode, load, 0, all_figures, {"p0-snic": {"rx": 1, "tx": 2}}, np.arange(length, dtype=np.float64), arrays, replay=replay
    )
