"""What Ray's own calls between actors cost: the floor under everything that is made of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import ray

from load_tests.bench.figures import median

CALLS = 100
SILENCE_S = 0.02  # before each call, as between the requests of one client
STREAMS, ITEMS = 16, 50


class _Answerer:
    """Does nothing."""

    async def call(self) -> None:
        return None

    async def items(self, count: int) -> AsyncIterator[int]:
        for number in range(count):
            await asyncio.sleep(SILENCE_S)
            yield number

    async def cpu_s(self) -> float:
        return time.process_time()


async def measure() -> dict[str, float]:
    """Ray must be connected. Seconds, medians: a call and its answer; a streaming call until its first item, less the pause before that.
    Processor seconds of caller and answerer per call, and of sender and receiver per item, with as many at once as a batch has requests.
    """
    remote: Any = ray.remote(_Answerer)
    actor = remote.options(num_cpus=0, max_concurrency=2 * STREAMS).remote()
    await actor.cpu_s.remote()
    calls, firsts = [], []
    for _ in range(CALLS):
        await asyncio.sleep(SILENCE_S)
        start = time.perf_counter()
        await actor.call.remote()
        calls.append(time.perf_counter() - start)
        start = time.perf_counter()
        await (await anext(actor.items.options(num_returns="streaming").remote(1)))
        firsts.append(time.perf_counter() - start - SILENCE_S)
    answerer, caller = await _cpu_s(actor, _call)
    sender, receiver = await _cpu_s(actor, _drain)
    ray.kill(actor)
    return {
        "call_s": median(calls),
        "first_item_s": median(firsts),
        "caller_cpu_s_per_call": caller,
        "answerer_cpu_s_per_call": answerer,
        "sender_cpu_s_per_item": sender,
        "receiver_cpu_s_per_item": receiver,
    }


async def _cpu_s(actor: Any, work: Callable[[Any, int], Awaitable[None]]) -> tuple[float, float]:
    """Processor seconds of the actor and of this process, for each of what `work` does ITEMS times, STREAMS at once."""
    theirs, ours = await actor.cpu_s.remote(), time.process_time()
    await asyncio.gather(*(work(actor, ITEMS) for _ in range(STREAMS)))
    ours = time.process_time() - ours
    theirs = await actor.cpu_s.remote() - theirs
    return theirs / (STREAMS * ITEMS), ours / (STREAMS * ITEMS)


async def _call(actor: Any, count: int) -> None:
    for _ in range(count):
        await actor.call.remote()


async def _drain(actor: Any, count: int) -> None:
    async for reference in actor.items.options(num_returns="streaming").remote(count):
        await reference
