"""What a replay measured: one record per turn, and their summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(slots=True)
class TurnRecord:
    """Times are time.monotonic() seconds. `cached` and `read_bytes` are what the server said; unknown to plain OpenAI servers."""

    agent: int
    turn: int
    prompt: int
    wanted: int
    started: float
    first_token: float = 0.0
    second_token: float = 0.0
    finished: float = 0.0
    generated: int = 0
    cached: int = 0
    read_bytes: dict[str, int] = field(default_factory=dict)
    queue_s: float = 0.0
    read_s: float = 0.0
    prefill_s: float = 0.0
    attempts: int = 1
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first_token - self.started

    @property
    def tpot(self) -> float:
        return (self.finished - self.first_token) / max(1, self.generated - 1)


@dataclass(frozen=True, slots=True)
class Replay:
    """`jct_s` is the job completion time: from the first submission to the end of the last turn."""

    started: float
    finished: float
    records: tuple[TurnRecord, ...]

    @property
    def jct_s(self) -> float:
        return self.finished - self.started


def percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    array = np.asarray(values)
    return {"mean": float(array.mean())} | {f"p{q}": float(np.percentile(array, q)) for q in (50, 90, 99)}


def summary(replay: Replay) -> dict[str, Any]:
    """Figures of a replay; times of first tokens over the turns that have something to hit (the second on)."""
    good = [record for record in replay.records if not record.error]
    later = [record for record in good if record.prompt]
    prompt = sum(record.prompt for record in good)
    cached = sum(record.cached for record in good)
    return {
        "jct_s": replay.jct_s,
        "turns": len(good),
        "failed_turns": len(replay.records) - len(good),
        "first_error": next((record.error for record in replay.records if record.error), ""),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": cached / prompt if prompt else 0.0,
        "generated_tokens": sum(record.generated for record in good),
        "retries": sum(record.attempts - 1 for record in good),
        "ttft_s": percentiles([record.ttft for record in later]),
        "ttst_s": percentiles([record.second_token - record.first_token for record in later if record.second_token]),
        "tpot_s": percentiles([record.tpot for record in good if record.generated > 1]),
        "queue_s": percentiles([record.queue_s for record in later]),
        "read_s": percentiles([record.read_s for record in later]),
        "prefill_s": percentiles([record.prefill_s for record in later]),
    }


@dataclass(frozen=True, slots=True)
class Slo:
    """What a turn must keep to count: seconds to the first token, and per token after it."""

    ttft_s: float
    tpot_s: float

    def kept(self, record: TurnRecord) -> bool:
        return not record.error and record.ttft <= self.ttft_s and record.tpot <= self.tpot_s

    def goodput(self, replay: Replay) -> float:
        """Turns per second that kept it."""
        return sum(self.kept(record) for record in replay.records) / replay.jct_s
