"""A link that serves transfers in the order they were requested, at full bandwidth."""

from __future__ import annotations


class Link:
    """First come, first served: a transfer ends when all requested before it and its own bytes have passed.

    `windows` counts bytes per time window of `window_s` seconds, for utilisation and balance figures.
    """

    __slots__ = ("bandwidth", "bytes", "free_at", "latency", "window_s", "windows")

    def __init__(self, bandwidth: float, latency: float = 0.0, window_s: float = 0.0) -> None:
        self.bandwidth = bandwidth
        self.latency = latency
        self.window_s = window_s
        self.free_at = 0.0
        self.bytes = 0.0
        self.windows: dict[int, float] = {}

    def transfer(self, now: float, size: float) -> float:
        """Request `size` bytes at `now`; returns when the last byte arrives."""
        start = max(now, self.free_at)
        self.free_at = end = start + size / self.bandwidth
        self.bytes += size
        if self.window_s:
            self._count(start, end)
        return end + self.latency

    def _count(self, start: float, end: float) -> None:
        first, last = int(start / self.window_s), int(end / self.window_s)
        for window in range(first, last + 1):
            overlap = min(end, (window + 1) * self.window_s) - max(start, window * self.window_s)
            self.windows[window] = self.windows.get(window, 0.0) + overlap * self.bandwidth
