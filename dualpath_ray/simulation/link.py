"""One direction of a NIC, or a node's memory."""

from __future__ import annotations


class Link:
    """Bandwidth in bytes/s, and what has passed: in all, and per time window of `window_s` seconds (for balance figures; 0: not kept).

    `free_at` belongs to `network.QueuedNetwork`, `wanted` to `network.FairNetwork`.
    """

    __slots__ = ("bandwidth", "bytes", "free_at", "wanted", "window_s", "windows")

    def __init__(self, bandwidth: float, window_s: float = 0.0) -> None:
        self.bandwidth = bandwidth
        self.window_s = window_s
        self.bytes = 0.0
        self.windows: dict[int, float] = {}
        self.free_at = 0.0
        self.wanted = 0.0

    def passed(self, start: float, end: float, size: float) -> None:
        """`size` bytes passed at an even rate from `start` to `end`."""
        self.bytes += size
        if not self.window_s or end <= start:
            return
        first, last = int(start / self.window_s), int(end / self.window_s)
        if first == last:
            self.windows[first] = self.windows.get(first, 0.0) + size
            return
        rate = size / (end - start)
        for window in range(first, last + 1):
            overlap = min(end, (window + 1) * self.window_s) - max(start, window * self.window_s)
            self.windows[window] = self.windows.get(window, 0.0) + overlap * rate
