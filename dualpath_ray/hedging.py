"""When a source's reads take too long, compared with what reads of that size usually take, and how much may be read twice for it.

A decode engine watches the reads of each request source by source. One that lags (a slow storage NIC, a gateway that hangs) is given up
and its blocks are read elsewhere, under new leases (`dualpath_ray.arming`). What is read twice is bounded: one source of a request at most
once, and all in all a share of what is read anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass

from dualpath_ray.messages import LoadOutcome

SMOOTHING = 0.2  # weight of the newest read in what reads usually take


@dataclass(frozen=True, slots=True)
class HedgeSettings:
    """A read is late after `factor` times its usual time, but not before `min_wait_s`. `factor` 0: never.

    No read is hedged while those hedged so far are more than `extra_share` of all bytes read.
    """

    factor: float = 0.0
    min_wait_s: float = 0.5
    extra_share: float = 0.1


class Hedging:
    """One per decode engine, on its event loop."""

    def __init__(self, settings: HedgeSettings) -> None:
        self._settings = settings
        self._s_per_byte = 0.0  # 0: nothing has been read yet
        self._read_bytes = 0
        self.hedged_bytes = 0
        self.hedged_reads = 0

    @property
    def enabled(self) -> bool:
        return self._settings.factor > 0 and self.hedged_bytes <= self._settings.extra_share * self._read_bytes

    def note_hedge(self, nbytes: int) -> None:
        self.hedged_reads += 1
        self.hedged_bytes += nbytes

    async def late(self, reads: Mapping[str, tuple[int, Coroutine[None, None, LoadOutcome]]]) -> str | None:
        """Watch reads, by node: (bytes, call that returns when they are done). Returns the first node that is late, or None when none
        will be: all are done, or one has failed, which whoever waits for the blocks hears of, too.
        """
        start = time.monotonic()
        waiting = {asyncio.ensure_future(call): (node_id, nbytes) for node_id, (nbytes, call) in reads.items()}
        try:
            while waiting:
                patience = {node_id: self._patience_s(nbytes) for node_id, nbytes in waiting.values()}
                first = min((seconds for seconds in patience.values() if seconds is not None), default=None)
                left = None if first is None else max(0.0, start + first - time.monotonic())
                done, _ = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    return min((seconds, node_id) for node_id, seconds in patience.items() if seconds is not None)[1]
                for call in done:
                    del waiting[call]
                    if call.exception() is not None:
                        return None
                    self._note(call.result())
            return None
        finally:
            for call in waiting:
                call.cancel()

    def _patience_s(self, nbytes: int) -> float | None:
        """How long a read of so many bytes is waited for; None without any experience."""
        if not self._s_per_byte:
            return None
        return max(self._settings.min_wait_s, self._settings.factor * nbytes * self._s_per_byte)

    def _note(self, outcome: LoadOutcome) -> None:
        if not outcome.read_bytes:
            return
        self._read_bytes += outcome.read_bytes
        newest = outcome.read_s / outcome.read_bytes
        self._s_per_byte = newest if not self._s_per_byte else (1 - SMOOTHING) * self._s_per_byte + SMOOTHING * newest
