"""An emulated cluster behind the real HTTP layer: what is measured then is that layer and Ray Serve, not a model.

It answers with tokens at a given pace and computes nothing. A prompt's length says what it is to do: `idle_tokens` or more, and it
sends one token and then nothing until it is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage, TokenLogprobs
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.telemetry.exposition import Exposition


class EmulatedCluster:
    """A `deploy.openai_api.service.Backend`. One token every `token_s` seconds; 0 gives up the event loop between tokens, no more."""

    def __init__(self, card: ModelCard, token_s: float, idle_tokens: int) -> None:
        self._card, self._token_s, self._idle_tokens = card, token_s, idle_tokens
        self.running = 0

    async def generate(self, request: GenerationRequest, enough: asyncio.Event | None = None) -> AsyncIterator[GenerationDelta]:
        usage = GenerationUsage(len(request.tokens), 0, len(request.tokens))
        self.running += 1
        try:
            for index in range(request.max_new_tokens):
                await asyncio.sleep(self._token_s)
                last = index == request.max_new_tokens - 1
                told = () if request.sampling.logprobs is None else (TokenLogprobs(-1.0),)
                yield GenerationDelta((300 + index % 100,), "length" if last else None, usage if last else None, told)
                if len(request.tokens) >= self._idle_tokens:
                    await asyncio.Event().wait()
        finally:
            self.running -= 1

    async def describe(self) -> ModelCard:
        return self._card

    async def health(self) -> Mapping[str, Any]:
        return {"status": "ok"}

    async def status(self) -> Mapping[str, Any]:
        return {"running": self.running}

    async def metrics(self, accept: str = "") -> Exposition:
        return Exposition("", "text/plain")
