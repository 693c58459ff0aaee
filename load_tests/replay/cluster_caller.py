"""Turns through the cluster's own client: token ids in, token ids out."""

from __future__ import annotations

import time
import uuid

from dualpath_ray.errors import DualPathError
from dualpath_ray.requests import GenerationRequest, Generator
from load_tests.replay.records import TurnRecord


class ClusterCaller:
    """`share_nothing` gives every turn a tenant of its own, so that nothing is ever a hit: all is recomputed."""

    def __init__(self, generator: Generator, timeout_s: float = 600.0, share_nothing: bool = False) -> None:
        self._generator, self._timeout_s, self._share_nothing = generator, timeout_s, share_nothing

    async def turn(self, record: TurnRecord, tokens: tuple[int, ...]) -> list[int]:
        """Generate exactly `record.wanted` tokens after `tokens`, filling the record. Never raises for a failed request."""
        name = f"replay-{record.agent}-{record.turn}-{uuid.uuid4().hex[:8]}"
        request = GenerationRequest(
            name,
            tokens,
            record.wanted,
            min_new_tokens=record.wanted,
            tenant=name if self._share_nothing else "",
            timeout=self._timeout_s,
        )
        generated: list[int] = []
        try:
            async for delta in self._generator.generate(request):
                now = time.monotonic()
                if delta.tokens and not generated:
                    record.first_token = now
                elif delta.tokens and not record.second_token:
                    record.second_token = now
                generated += delta.tokens
                if delta.finish_reason is not None and delta.usage is not None:
                    record.cached = delta.usage.cached_tokens
                    record.read_bytes = dict(delta.usage.read_bytes)
                    record.queue_s, record.read_s = delta.usage.queue_s, delta.usage.read_s
                    record.prefill_s, record.attempts = delta.usage.prefill_s, delta.usage.attempts
        except DualPathError as error:
            record.error = f"{type(error).__name__}: {error}"
        record.finished = time.monotonic()
        record.generated = len(generated)
        return generated
