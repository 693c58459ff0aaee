"""Requests over HTTP, as an OpenAI client sends them, with the retries that such a client makes."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator

import httpx

from dualpath_ray.errors import DeadlineExceededError
from dualpath_ray.requests import GenerationDelta, GenerationRequest
from dualpath_ray.serving.tokenizer import Tokenizer

PAUSE_S = 0.3
RETRYABLE = {429, 499, 503, 504}


class HttpRoute:
    """`POST <address>/v1/completions`, streamed; a `Generator`.

    HTTP answers are text, so tokens are those of the answer that was expected: the text received must be theirs, in full and as far as
    it came when a connection broke. Any other answer than text or a retryable error counts in `unclear`.
    """

    def __init__(self, address: str, model: str, tokenizer: Tokenizer, expected: dict[tuple[int, ...], tuple[int, ...]]) -> None:
        self._model, self._tokenizer, self._expected = model, tokenizer, expected
        self._http = httpx.AsyncClient(
            base_url=address, timeout=httpx.Timeout(60.0, connect=5.0), limits=httpx.Limits(max_connections=None)
        )
        self.unclear: list[str] = []
        self.broken = 0  # connections that broke in mid-stream

    async def generate(self, request: GenerationRequest, enough: asyncio.Event | None = None) -> AsyncGenerator[GenerationDelta, None]:
        deadline = time.monotonic() + request.timeout
        answer = self._expected[request.tokens]
        wanted = self._tokenizer.decode(answer)
        body = {
            "model": self._model,
            "prompt": list(request.tokens),
            "max_tokens": request.max_new_tokens,
            "ignore_eos": True,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "seed": request.sampling.seed,
            "stream": True,
        }
        while True:
            text, ended = "", False
            async for piece in self._attempt(body, request):
                ended = piece is None
                text += piece or ""
                if not wanted.startswith(text):
                    break
            if ended and text == wanted:
                yield GenerationDelta(answer, "length")
                return
            if ended or not wanted.startswith(text):
                yield GenerationDelta((-1,))  # no token of any answer: the comparison will say so
                return
            if time.monotonic() + PAUSE_S > deadline:
                raise DeadlineExceededError(f"no answer to {request.request_id} over HTTP in {request.timeout:.0f} s")
            await asyncio.sleep(PAUSE_S)

    async def _attempt(self, body: dict[str, object], request: GenerationRequest) -> AsyncGenerator[str | None, None]:
        """Pieces of text, then None if the answer was complete."""
        try:
            async with self._http.stream("POST", "/v1/completions", json=body, headers={"X-Tenant": request.tenant}) as reply:
                if reply.status_code != 200:
                    said = (await reply.aread()).decode(errors="replace")[:200]
                    if reply.status_code not in RETRYABLE:
                        self.unclear.append(f"HTTP {reply.status_code}: {said}")
                    return
                async for line in reply.aiter_lines():
                    if line == "data: [DONE]":
                        yield None
                        return
                    if line.startswith("data: "):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            return
                        yield "".join(choice.get("text") or "" for choice in event["choices"])
                self.broken += 1
        except httpx.HTTPError:
            self.broken += 1

    async def aclose(self) -> None:
        await self._http.aclose()
