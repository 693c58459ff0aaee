"""Tokens as clients received them, over time: what a fault cost, and when all was well again."""

from __future__ import annotations

import bisect
import time

WINDOW_S = 4.0  # shorter ones are bursts and gaps: agents begin their turns at fixed times
RECOVERED = 0.95  # of the rate without faults


class Throughput:
    """Fed by the load, on one event loop. Times are time.monotonic()."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._totals: list[int] = []
        self.calm_rate = 0.0  # tokens per second without faults

    def add(self, tokens: int) -> None:
        self.times.append(time.monotonic())
        self._totals.append(tokens + (self._totals[-1] if self._totals else 0))

    def tokens(self, start: float, end: float) -> int:
        first, last = bisect.bisect_left(self.times, start), bisect.bisect_left(self.times, end)
        if first == last:
            return 0
        return self._totals[last - 1] - (self._totals[first - 1] if first else 0)

    def rates(self, start: float, end: float, step_s: float = 0.25) -> list[float]:
        """Mean rates of all whole windows between `start` and `end`, oldest first."""
        count = max(0, int((end - start - WINDOW_S) / step_s) + 1)
        return [self.tokens(start + i * step_s, start + i * step_s + WINDOW_S) / WINDOW_S for i in range(count)]

    def note_calm(self, start: float, end: float) -> None:
        """Nothing was broken in this time: its median rate is what the system must come back to."""
        rates = sorted(self.rates(start, end))
        self.calm_rate = rates[len(rates) // 2]

    def recovered_after(self, repaired: float, now: float) -> float | None:
        """Seconds from `repaired` to the start of the first window with the calm rate; None if there is none yet."""
        for index, rate in enumerate(self.rates(repaired, now, step_s=0.1)):
            if rate >= RECOVERED * self.calm_rate:
                return index * 0.1
        return None
