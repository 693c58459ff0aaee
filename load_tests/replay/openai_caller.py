"""Turns through any server that speaks OpenAI's completions API with token ids as prompt."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from load_tests.replay.records import TurnRecord


class OpenAICaller:
    """POST `<base>/v1/completions`, streamed.

    Servers answer in text, so the next turn's prompt cannot hold the very tokens that were generated; `made_up` of the agent stands for
    them, and then a server's own cache has hits up to the end of the last prompt only.
    """

    def __init__(self, base_url: str, model: str, timeout_s: float = 600.0, api_key: str = "none") -> None:
        self._model = model
        self._client = httpx.AsyncClient(
            base_url=base_url.rstrip("/"),
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {api_key}"},
        )

    async def turn(self, record: TurnRecord, tokens: tuple[int, ...]) -> list[int]:
        """See ClusterCaller.turn; returns nothing, as the tokens are unknown."""
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": list(tokens),
            "max_tokens": record.wanted,
            "min_tokens": record.wanted,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    record.error = f"HTTP {answer.status_code}: {(await answer.aread()).decode(errors='replace')[:300]}"
                    return []
                async for line in answer.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        self._take(record, json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, ValueError) as error:
            record.error = f"{type(error).__name__}: {error}"
        finally:
            record.finished = time.monotonic()
        return []

    def _take(self, record: TurnRecord, chunk: dict[str, Any]) -> None:
        now = time.monotonic()
        if "error" in chunk:
            record.error = str(chunk["error"])[:300]
            return
        if any(choice.get("text") for choice in chunk.get("choices", ())):
            if not record.first_token:
                record.first_token = now
            elif not record.second_token:
                record.second_token = now
        usage = chunk.get("usage")
        if usage:
            record.generated = usage.get("completion_tokens", 0)
            record.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    async def aclose(self) -> None:
        await self._client.aclose()
