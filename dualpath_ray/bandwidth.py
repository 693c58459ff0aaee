"""How fast a storage NIC reads, from what it has read: an estimate that forgets.

Bytes over busy time, both fading with a half-life. A node that reads little tells little (short reads are mostly latency), so below
`LEAST_BUSY_S` of remembered time the bandwidth is unknown (0), which policies take for that of the others. Without forgetting, a node that
once measured badly would get less to read, measure worse for it, and never be tried again.
"""

from __future__ import annotations

HALF_LIFE_S = 30.0
LEAST_BUSY_S = 1.0


class BandwidthEstimate:
    """Fed with totals since start; `now` in seconds of any clock that does not jump."""

    def __init__(self, half_life_s: float = HALF_LIFE_S, least_busy_s: float = LEAST_BUSY_S) -> None:
        self._half_life_s, self._least_busy_s = half_life_s, least_busy_s
        self._nbytes = self._busy_s = 0.0  # remembered
        self._seen_bytes = self._seen_busy_s = 0.0  # totals at the last look
        self._at = 0.0

    def update(self, total_bytes: float, total_busy_s: float, now: float) -> float:
        """Bytes/s as of `now`, 0 if unknown. A look between two reads' ends changes nothing but what is forgotten."""
        fade = 0.5 ** (max(0.0, now - self._at) / self._half_life_s)
        self._at = now
        self._nbytes *= fade
        self._busy_s *= fade
        if total_bytes > self._seen_bytes:
            self._nbytes += total_bytes - self._seen_bytes
            self._busy_s += total_busy_s - self._seen_busy_s
            self._seen_bytes, self._seen_busy_s = total_bytes, total_busy_s
        return self._nbytes / self._busy_s if self._busy_s >= self._least_busy_s else 0.0
