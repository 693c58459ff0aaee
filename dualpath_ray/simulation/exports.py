"""Turn-by-turn records of a run: a parquet table, and a trace in the Chrome format that Perfetto opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dualpath_ray.simulation.measurements import Measurements

PHASES = ("queued", "allocated", "read", "prefill")
MOST_TRACED = 20_000


def write_parquet(results: Measurements, path: str | Path) -> None:
    """One row per finished turn, in order of completion; seconds."""
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    columns = ("agent", "arrived", *PHASES, "second_token", "per_token", "ended")
    parquet.write_table(pyarrow.table({name: results.column(name) for name in columns}), path)


def write_chrome_trace(results: Measurements, path: str | Path) -> None:
    """The first turns of the run as complete events, one lane per agent, one slice per phase; microseconds."""
    events: list[dict[str, Any]] = []
    for i in range(min(len(results.arrived), MOST_TRACED)):
        start = float(results.arrived[i])
        for phase in PHASES:
            length = float(getattr(results, phase)[i])
            if length > 0:
                events.append(_slice(phase, int(results.agent[i]), start, length))
            start += length
        events.append(_slice("decode", int(results.agent[i]), start, max(0.0, float(results.ended[i]) - start)))
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _slice(name: str, agent: int, start: float, length: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": 1, "tid": agent, "ts": round(start * 1e6), "dur": round(length * 1e6), "cat": "turn"}
