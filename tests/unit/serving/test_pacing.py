from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest

from dualpath_ray.errors import TransferError
from dualpath_ray.requests import GenerationDelta, GenerationUsage, TokenLogprobs
from dualpath_ray.serving.pacing import paced

LONG_S = 3600.0


class Given:
    """Deltas as a test puts them in; `closed` once the generator has been closed before its end."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[GenerationDelta | Exception | None] = asyncio.Queue()
        self.closed = self.ended = False

    def put(self, *tokens: int, last: bool = False) -> None:
        usage = GenerationUsage(1, 0, 1) if last else None
        logprobs = tuple(TokenLogprobs(-float(token)) for token in tokens)
        self.queue.put_nowait(GenerationDelta(tokens, "length" if last else None, usage, logprobs))

    async def deltas(self) -> AsyncGenerator[GenerationDelta, None]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    break
            self.ended = True
        finally:
            self.closed = not self.ended


def pace(given: Given, interval_s: float, timeout_s: float = 60.0) -> AsyncGenerator[GenerationDelta, None]:
    return paced(given.deltas(), interval_s, asyncio.get_running_loop().time() + timeout_s)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_first_comes_at_once_and_the_last_brings_all_that_was_held() -> None:
    """The interval never passes here: what waited for it would hang the test."""
    given = Given()
    deltas = pace(given, LONG_S)
    given.put(1)
    assert (await anext(deltas)).tokens == (1,)
    given.put(2)
    given.put(3, 4)
    given.put(5, last=True)
    last = await anext(deltas)
    assert last.tokens == (2, 3, 4, 5)
    assert [figures.logprob for figures in last.logprobs] == [-2, -3, -4, -5]
    assert last.finish_reason == "length" and last.usage is not None
    assert [delta async for delta in deltas] == []
    assert given.ended and not given.closed


async def test_what_comes_within_the_interval_is_held_until_it_has_passed() -> None:
    given = Given()
    async with aclosing(pace(given, 0.02)) as deltas:
        given.put(1)
        await anext(deltas)
        loop = asyncio.get_running_loop()
        since = loop.time()
        given.put(2)
        given.put(3)
        assert (await anext(deltas)).tokens == (2, 3)
        assert loop.time() - since >= 0.015
    assert given.closed


async def test_without_an_interval_nothing_waits() -> None:
    given = Given()
    async with aclosing(pace(given, 0)) as deltas:
        for token in range(5):
            given.put(token)
            assert (await anext(deltas)).tokens == (token,)


async def test_a_slow_reader_finds_what_came_meanwhile_in_one() -> None:
    given = Given()
    async with aclosing(pace(given, 0)) as deltas:
        given.put(1)
        await anext(deltas)
        for token in (2, 3, 4):
            given.put(token)
        await settle()
        assert (await anext(deltas)).tokens == (2, 3, 4)


@pytest.mark.parametrize("end", [TransferError("gone"), None], ids=["failure", "end without a reason"])
async def test_what_was_held_comes_before_the_end(end: Exception | None) -> None:
    given = Given()
    deltas = pace(given, LONG_S)
    given.put(1)
    await anext(deltas)
    given.put(2)
    given.queue.put_nowait(end)
    assert (await anext(deltas)).tokens == (2,)
    with pytest.raises(StopAsyncIteration if end is None else TransferError):
        await anext(deltas)


async def test_a_generator_that_is_silent_at_the_deadline_is_closed() -> None:
    given = Given()
    with pytest.raises(TimeoutError):
        await anext(pace(given, 0, timeout_s=0.01))
    assert given.closed


async def test_cancelling_the_reader_closes_the_generator() -> None:
    given = Given()
    reader = asyncio.ensure_future(anext(pace(given, 0)))
    await settle()
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await settle()
    assert given.closed
