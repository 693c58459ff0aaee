"""Several streams as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items of all `streams` as they come, each with its stream's index. Closes them all at its own end, however that comes.

    No stream runs ahead: the next item of one is asked for when its last one has been taken. The first failure ends all.
    """
    if len(streams) == 1:  # the common case, without a task per item
        try:
            async for item in streams[0]:
                yield 0, item
        finally:
            await streams[0].aclose()
        return
    waiting: dict[asyncio.Future[T], int] = {}
    try:
        for index, stream in enumerate(streams):
            waiting[asyncio.ensure_future(anext(stream))] = index
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # Failures first: while nothing of a reply has been sent they still become its status.
            for future in sorted(done, key=lambda one: (one.exception() is None, waiting[one])):
                index = waiting.pop(future)
                try:
                    item = future.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                waiting[asyncio.ensure_future(anext(streams[index]))] = index
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await asyncio.gather(*(stream.aclose() for stream in streams), return_exceptions=True)
