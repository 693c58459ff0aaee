"""What one request adds to the metrics of its client."""

from __future__ import annotations

import time

from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage
from dualpath_ray.telemetry.metrics import Metrics


class RequestFigures:
    """Made when the request is submitted; told of each delta, and once of the end. One who leaves early is counted as far as it came."""

    def __init__(self, metrics: Metrics, request: GenerationRequest) -> None:
        self._metrics, self._prompt_tokens = metrics, len(request.tokens)
        self._started = time.monotonic()
        self._first_at = self._last_at = 0.0
        self._generated = 0
        self._usage: GenerationUsage | None = None
        self._exemplar: dict[str, str] | None = None
        metrics.requests_active.inc()

    def note(self, delta: GenerationDelta, trace: str) -> None:
        """`trace`: id of the request's trace, or nothing."""
        self._last_at = time.monotonic()
        self._usage = delta.usage or self._usage
        if not self._first_at:
            self._first_at = self._last_at
            self._exemplar = {"trace_id": trace} if trace else None
            self._count_first()
        self._generated += len(delta.tokens)

    def end(self, outcome: str) -> None:
        """`outcome` as `dualpath_requests_total` has it."""
        metrics, usage = self._metrics, self._usage
        metrics.requests_active.dec()
        metrics.requests.labels(outcome=outcome).inc()
        if not self._generated:
            return
        metrics.tokens.labels(kind="prompt").inc(self._prompt_tokens)
        metrics.tokens.labels(kind="generated").inc(self._generated)
        if outcome in ("stop", "length") and self._generated > 1:
            metrics.tpot.observe((self._last_at - self._first_at) / (self._generated - 1), self._exemplar)
        if usage is not None:
            metrics.tokens.labels(kind="cached").inc(usage.cached_tokens)
            metrics.tokens.labels(kind="computed").inc(usage.computed_tokens)
            metrics.read.observe(usage.read_s)
            metrics.prefill.observe(usage.prefill_s)
            for side, nbytes in usage.read_bytes.items():
                metrics.read_bytes.labels(side=side).inc(nbytes)
            for side, seconds in usage.read_wait_s.items():
                metrics.read_wait.labels(side=side).observe(seconds)

    def _count_first(self) -> None:
        ttft = self._first_at - self._started
        self._metrics.ttft.observe(ttft, self._exemplar)
        if self._usage is not None:
            known = self._usage.first_token_s
            for part, seconds in {**known, "handshake": max(0.0, ttft - sum(known.values()))}.items():
                self._metrics.ttft_part.labels(part=part).observe(seconds, self._exemplar)
