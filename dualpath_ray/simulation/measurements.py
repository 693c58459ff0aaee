"""What a run measures, kept as flat arrays so that millions of turns fit in memory."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import nan

import numpy as np
from numpy.typing import NDArray

from dualpath_ray.simulation.link import Link
from dualpath_ray.simulation.round_state import RoundState


def _floats() -> array[float]:
    return array("f")


@dataclass(slots=True)
class Measurements:
    """One entry per finished turn in each array (one per agent in `trajectory`), in seconds; `agent` is its number.

    NaN stands where a turn has no such token.
    """

    agent: array[float] = field(default_factory=_floats)
    arrived: array[float] = field(default_factory=_floats)
    queued: array[float] = field(default_factory=_floats)
    allocated: array[float] = field(default_factory=_floats)
    read: array[float] = field(default_factory=_floats)
    prefill: array[float] = field(default_factory=_floats)
    second_token: array[float] = field(default_factory=_floats)
    per_token: array[float] = field(default_factory=_floats)
    ended: array[float] = field(default_factory=_floats)
    trajectory: array[float] = field(default_factory=_floats)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    persisted_bytes: float = 0.0
    moved: int = 0  # turns taken back from one prefill engine and placed on another

    def turn(self, state: RoundState, now: float) -> None:
        """A turn has ended now. Time per output token is counted from the second token on."""
        self.agent.append(state.agent)
        self.arrived.append(state.arrived)
        self.ended.append(now)
        self.queued.append(state.fetched - state.arrived)
        self.allocated.append(state.granted - state.fetched)
        self.read.append(state.ready - state.granted)
        self.prefill.append(state.first_token - state.ready)
        self.second_token.append(state.second_token - state.first_token if state.generate > 1 else nan)
        self.per_token.append((now - state.second_token) / (state.generate - 2) if state.generate > 2 else nan)
        self.prompt_tokens += state.prompt
        self.generated_tokens += state.generate

    def ttft(self) -> NDArray[np.float32]:
        """Time to first token of each finished turn."""
        return self.column("queued") + self.column("allocated") + self.column("read") + self.column("prefill")

    def column(self, name: str) -> NDArray[np.float32]:
        """A copy of one array (a view would keep it from growing)."""
        return np.array(getattr(self, name), dtype=np.float32)


def spread(values: NDArray[np.float32]) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    numbers = values[~np.isnan(values)]
    if not len(numbers):
        return {}
    points = np.percentile(numbers, [50, 90, 99])
    return {"mean": float(numbers.mean()), "p50": float(points[0]), "p90": float(points[1]), "p99": float(points[2])}


def max_over_mean(links: Sequence[Link], until: float) -> float:
    """Mean over time windows of (busiest link / mean link), over windows in which the links were used at all."""
    if not links or not links[0].window_s:
        return 1.0
    ratios: list[float] = []
    for window in range(int(until / links[0].window_s)):
        traffic = [link.windows.get(window, 0.0) for link in links]
        mean = sum(traffic) / len(traffic)
        if mean > 0:
            ratios.append(max(traffic) / mean)
    return float(np.mean(ratios)) if ratios else 1.0
