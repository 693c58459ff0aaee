"""What Ray's own calls between actors cost: the floor under everything that is made of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
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
    Processor seconds of sender and receiver per item, with as many streams as a batch has requests.
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
    sender, receiver = await actor.cpu_s.remote(), time.process_time()
    await asyncio.gather(*(_drain(actor, ITEMS) for _ in range(STREAMS)))
    receiver = time.process_time() - receiver
    sender = await actor.cpu_s.remote() - sender
    ray.kill(actor)
    items = STREAMS * ITEMS
    return {
        "call_s": median(calls),
        "first_item_s": median(firsts),
        "sender_cpu_s_per_item": sender / items,
        "receiver_cpu_s_per_item": receiver / items,
    }


async def _drain(actor: Any, count: int) -> None:
    async for reference in actor.items.options(num_returns="streaming").remote(count):
        await reference
