"""A generator's deltas at a pace that a stream's reader can use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from dualpath_ray.requests import GenerationDelta

# How long a generator may take to end by itself once it has given its last delta.
END_S = 2.0


async def paced(deltas: AsyncGenerator[GenerationDelta, None], interval_s: float, deadline: float) -> AsyncGenerator[GenerationDelta, None]:
    """`deltas`, with those joined that come within `interval_s` of the last one given out: what follows costs per delta, not per token.

    The first delta, the last one, and any that comes later than that, are given out at once. What is held is bounded by the request's
    `max_new_tokens`. Owns `deltas`: closing this closes them, in the task that reads them. Raises what they raise, and TimeoutError when
    they have not ended at `deadline` (of the event loop's clock).
    """
    loop = asyncio.get_running_loop()
    held: list[GenerationDelta] = []
    ready = asyncio.Event()
    timer: asyncio.TimerHandle | None = None
    due = 0.0

    async def read() -> None:
        nonlocal timer
        try:
            async with aclosing(deltas), asyncio.timeout_at(deadline):
                async for delta in deltas:
                    held.append(delta)
                    if delta.finish_reason is not None or loop.time() >= due:
                        ready.set()
                    elif timer is None:
                        timer = loop.call_at(due, ready.set)
        finally:
            ready.set()

    reading = asyncio.ensure_future(read())
    try:
        while True:
            await ready.wait()
            ready.clear()
            if timer is not None:
                timer.cancel()
                timer = None
            if not held:
                await reading
                return
            joined = _joined(held)
            held.clear()
            due = loop.time() + interval_s
            yield joined
            if joined.finish_reason is not None:
                # It has nothing more to say, but closing it before it could return would look like a cancelled request.
                await asyncio.wait({reading}, timeout=END_S)
                return
            if reading.done():
                ready.set()
    finally:
        if timer is not None:
            timer.cancel()
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


def _joined(deltas: Sequence[GenerationDelta]) -> GenerationDelta:
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return GenerationDelta(
        tuple(token for delta in deltas for token in delta.tokens),
        last.finish_reason,
        next((delta.usage for delta in reversed(deltas) if delta.usage is not None), None),
        tuple(one for delta in deltas for one in delta.logprobs),
    )
