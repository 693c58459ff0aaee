"""One request from tokens to text: the generator's deltas as text, within the deadline, with the generator always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import cast

from dualpath_ray.errors import CancelledError, DeadlineExceededError, TransferError
from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationRequest, GenerationUsage, Generator, TokenLogprobs
from dualpath_ray.serving.text_stream import TextStream
from dualpath_ray.serving.tokenizer import Tokenizer

# The generator keeps the request's deadline itself; this one is for a generator that hangs.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became final. The last one has a finish_reason; from the first on, `usage` says what is known so far.

    `logprobs`, if asked for, has (token id, its figures) of each new token of the answer; their text may come with a later delta.
    """

    text: str
    usage: GenerationUsage
    finish_reason: FinishReason | None = None
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()


async def complete(
    generator: Generator, tokenizer: Tokenizer, request: GenerationRequest, stop: Sequence[str] = ()
) -> AsyncGenerator[TextDelta, None]:
    """Generate `request`'s text. Closing the result, or cancelling a wait for it, cancels the request.

    A stop string ends the text and cancels what the generator would still produce. `usage.completion_tokens` counts the tokens whose
    text was used. Raises what the generator raises, and DeadlineExceededError GRACE_S after the request's timeout.
    """
    stream = TextStream(tokenizer, request, stop)
    usage = GenerationUsage(prompt_tokens=len(request.tokens), cached_tokens=0, computed_tokens=0)
    deadline = asyncio.get_running_loop().time() + request.timeout + GRACE_S
    # A generator is what closing needs; the protocol promises no more than an iterator because it is also written as one.
    async with aclosing(cast(AsyncGenerator[GenerationDelta, None], generator.generate(request))) as deltas:
        while stream.finish_reason is None:
            delta = await _next(deltas, deadline, request)
            text = stream.push(delta)
            if stream.finish_reason == "cancelled":
                raise CancelledError(f"request {request.request_id} was cancelled by the cluster; send it again")
            usage = replace(delta.usage or usage, completion_tokens=stream.tokens)
            logprobs = tuple(zip(delta.tokens, delta.logprobs, strict=True))[: stream.shown] if delta.logprobs else ()
            yield TextDelta(text, usage, stream.finish_reason, logprobs)
        if delta.finish_reason is not None:
            # It has nothing more to say, but closing it before it could return would look like a cancelled request.
            with suppress(StopAsyncIteration, TimeoutError):
                await asyncio.wait_for(anext(deltas), GRACE_S)


async def _next(deltas: AsyncGenerator[GenerationDelta, None], deadline: float, request: GenerationRequest) -> GenerationDelta:
    try:
        async with asyncio.timeout_at(deadline):
            return await anext(deltas)
    except TimeoutError as error:
        raise DeadlineExceededError(f"request {request.request_id} took longer than its {request.timeout:g} s") from error
    except StopAsyncIteration as error:
        raise TransferError(f"the generation of {request.request_id} ended without a finish reason; send it again") from error
