"""One request from tokens to text: the generator's deltas as text, within the deadline, with the generator always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import cast

from dualpath_ray.errors import CancelledError, DeadlineExceededError, TransferError
from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationRequest, GenerationUsage, Generator, TokenLogprobs
from dualpath_ray.serving.pacing import paced
from dualpath_ray.serving.text_stream import TextStream
from dualpath_ray.serving.tokenizer import Tokenizer

# The generator keeps the request's deadline itself; this one is for a generator that hangs.
GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text that became final. The last one has a finish_reason, and the usage.

    `logprobs`, if asked for, has (token id, its figures) of each new token of the answer; their text may come with a later delta.
    """

    text: str
    usage: GenerationUsage | None = None
    finish_reason: FinishReason | None = None
    logprobs: tuple[tuple[int, TokenLogprobs], ...] = ()


async def complete(
    generator: Generator, tokenizer: Tokenizer, request: GenerationRequest, stop: Sequence[str] = (), interval_s: float = 0.0
) -> AsyncGenerator[TextDelta, None]:
    """Generate `request`'s text, at most a piece every `interval_s`. Closing the result, or cancelling a wait for it, cancels the request.

    A stop string ends the text, and the generator with it, which is told that this is no cancellation. `usage.completion_tokens` counts
    the tokens whose text was used. Raises what the generator raises, and DeadlineExceededError GRACE_S after the request's timeout.
    """
    stream = TextStream(tokenizer, request, stop)
    known = GenerationUsage(len(request.tokens), cached_tokens=0, computed_tokens=0)
    deadline = asyncio.get_running_loop().time() + request.timeout + GRACE_S
    # A generator is what closing needs; the protocol promises no more than an iterator because it is also written as one.
    enough = asyncio.Event()
    generated = cast(AsyncGenerator[GenerationDelta, None], generator.generate(request, enough))
    try:
        async with aclosing(paced(generated, interval_s, deadline)) as deltas:
            async for delta in deltas:
                text = stream.push(delta)
                if stream.finish_reason == "cancelled":
                    raise CancelledError(f"request {request.request_id} was cancelled by the cluster; send it again")
                known = delta.usage or known
                usage = None
                if stream.finish_reason is not None:
                    enough.set()
                    usage = replace(known, completion_tokens=stream.tokens)
                logprobs = tuple(zip(delta.tokens, delta.logprobs, strict=True))[: stream.shown] if delta.logprobs else ()
                yield TextDelta(text, usage, stream.finish_reason, logprobs)
                if stream.finish_reason is not None and delta.finish_reason is None:
                    return  # at a stop string: what is still generated is of no use
    except TimeoutError as error:
        raise DeadlineExceededError(f"request {request.request_id} took longer than its {request.timeout:g} s") from error
    if stream.finish_reason is None:
        raise TransferError(f"the generation of {request.request_id} ended without a finish reason; send it again")
