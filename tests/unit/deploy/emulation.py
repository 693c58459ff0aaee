"""An emulated cluster for tests of what stands in front of one: it answers with given tokens and keeps account of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage, TokenLogprobs
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.telemetry.exposition import Exposition


@dataclass
class EmulatedCluster:
    """Emulates the cluster client: `answer` token by token, then the end of sequence if the request allows it.

    `failure` is raised before token number `fail_at`; before token `stall_at` it waits until it is closed. `running` and
    `closed` show which requests are held and which were given up before their end.
    """

    card: ModelCard
    answer: Sequence[int] = ()
    failure: Exception | None = None
    fail_at: int = 0
    stall_at: int | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    closed: list[str] = field(default_factory=list)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    picture: Mapping[str, Any] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=lambda: {"status": "ok", "engines": 2})

    async def generate(self, request: GenerationRequest, enough: asyncio.Event | None = None) -> AsyncIterator[GenerationDelta]:
        self.requests.append(request)
        self.running.add(request.request_id)
        finished = False
        try:
            for index in range(request.max_new_tokens):
                if self.failure is not None and index == self.fail_at:
                    raise self.failure
                if index == self.stall_at:
                    self.stalled.set()
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                delta = self._delta(request, index)
                yield delta
                finished = delta.finish_reason is not None
                if finished:
                    return
        finally:
            self.running.remove(request.request_id)
            if not finished:
                self.closed.append(request.request_id)

    def _delta(self, request: GenerationRequest, index: int) -> GenerationDelta:
        """Answers cycle if the end of sequence does not count."""
        ended = index >= len(self.answer) and bool(request.stop_token_ids) and index >= request.min_new_tokens
        token = request.stop_token_ids[0] if ended else self.answer[index % len(self.answer)]
        last = index == request.max_new_tokens - 1
        usage = GenerationUsage(
            prompt_tokens=len(request.tokens),
            cached_tokens=len(request.tokens) // 2,
            computed_tokens=len(request.tokens) - len(request.tokens) // 2,
            completion_tokens=index + 1,
            read_bytes={"prefill_node": 10, "decode_node": 20},
            prefill_engine="prefill-0",
            decode_engine="decode-0",
        )
        reason = "stop" if ended else "length" if last else None
        told = request.sampling.logprobs
        logprobs = () if told is None else (TokenLogprobs(-0.5, tuple((token + rank, -0.5 - rank) for rank in range(told))),)
        return GenerationDelta((token,), reason, usage if index == 0 or reason else None, logprobs)  # type: ignore[arg-type]

    async def describe(self) -> ModelCard:
        return self.card

    async def health(self) -> Mapping[str, Any]:
        if self.failure is not None:
            raise self.failure
        return self.report

    async def status(self) -> Mapping[str, Any]:
        return self.picture

    async def metrics(self, accept: str = "") -> Exposition:
        return Exposition("# TYPE dualpath_requests_total counter\ndualpath_requests_total 1\n", "text/plain; version=0.0.4")
