from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from dualpath_ray import errors
from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage
from dualpath_ray.serving import completion
from dualpath_ray.serving.completion import TextDelta, complete
from dualpath_ray.serving.tokenizer import Tokenizer


class Scripted:
    """A generator of given deltas; after them it hangs, fails or ends."""

    def __init__(self, deltas: list[GenerationDelta], then: str = "end") -> None:
        self.deltas, self.then, self.closed, self.enough = deltas, then, False, False

    async def generate(self, request: GenerationRequest, enough: asyncio.Event | None = None) -> AsyncIterator[GenerationDelta]:
        try:
            for delta in self.deltas:
                yield delta
            if self.then == "hang":
                await asyncio.Event().wait()
        finally:
            self.closed, self.enough = True, enough is not None and enough.is_set()


def request(timeout: float = 600.0) -> GenerationRequest:
    return GenerationRequest("r", (5, 6), 100, stop_token_ids=(2,), timeout=timeout)


async def collect(generator: Scripted, tokenizer: Tokenizer, request: GenerationRequest, stop: tuple[str, ...] = ()) -> list[TextDelta]:
    return [delta async for delta in complete(generator, tokenizer, request, stop)]


async def test_a_generator_that_hangs_past_the_deadline_is_closed(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "GRACE_S", 0.01)
    generator = Scripted([GenerationDelta((70,))], "hang")
    with pytest.raises(errors.DeadlineExceededError, match=r"longer than its 0\.01 s"):
        await collect(generator, byte_level, request(timeout=0.01))
    assert generator.closed


async def test_an_end_without_reason_is_an_error(byte_level: Tokenizer) -> None:
    with pytest.raises(errors.TransferError, match="without a finish reason"):
        await collect(Scripted([GenerationDelta((70,))]), byte_level, request())


async def test_a_request_cancelled_by_the_cluster_is_an_error(byte_level: Tokenizer) -> None:
    with pytest.raises(errors.CancelledError):
        await collect(Scripted([GenerationDelta((), "cancelled")]), byte_level, request())


async def test_closing_closes_the_generator(byte_level: Tokenizer) -> None:
    generator = Scripted([GenerationDelta((70,))], "hang")
    async with aclosing(complete(generator, byte_level, request())) as deltas:
        await anext(deltas)
        assert not generator.closed
    assert generator.closed and not generator.enough


async def test_a_stop_string_closes_the_generator_and_counts_what_was_used(byte_level: Tokenizer) -> None:
    tokens = byte_level.encode("abZcd", special_tokens=False)
    known = GenerationUsage(prompt_tokens=2, cached_tokens=1, computed_tokens=1, prefill_engine="p")
    generator = Scripted([GenerationDelta((token,), usage=known if token == tokens[0] else None) for token in tokens], "hang")
    deltas = await collect(generator, byte_level, request(), ("Z",))
    assert generator.closed and generator.enough
    assert "".join(delta.text for delta in deltas) == "ab"
    assert deltas[-1].finish_reason == "stop"
    used = tokens.index(byte_level.encode("Z", special_tokens=False)[0]) + 1
    assert deltas[-1].usage == replace(known, completion_tokens=used)
