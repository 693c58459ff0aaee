"""Streamed completions in numbers, as a client sees them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(slots=True)
class Streams:
    """What came of the requests of one client. Times are seconds."""

    first: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    events: int = 0
    failures: list[str] = field(default_factory=list)


async def one_stream(
    http: aiohttp.ClientSession, url: str, body: Mapping[str, Any], seen: Streams, headers: Mapping[str, str] = {}
) -> None:  # only read
    """Read one stream to its end; anything but a complete one is a failure."""
    started = time.perf_counter()
    first = 0.0
    tail = b""
    try:
        async with http.post(f"{url}/v1/completions", json=body, headers=headers) as reply:
            if reply.status != 200:
                seen.failures.append(f"{reply.status}: {(await reply.text())[:200]}")
                return
            async for part in reply.content.iter_any():
                first = first or time.perf_counter() - started
                seen.events += part.count(b"data: ")
                tail = (tail + part)[-32:]
    except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
        seen.failures.append(f"{type(error).__name__}: {error}")
        return
    if not tail.rstrip().endswith(b"[DONE]"):
        seen.failures.append("the stream ended early")
        return
    seen.first.append(first)
    seen.total.append(time.perf_counter() - started)


async def closed_loop(
    url: str, body: Mapping[str, Any], concurrency: int, seconds: float, headers: Mapping[str, str] = {}
) -> tuple[Streams, float]:
    """`concurrency` clients that each send the next request when the last one has ended; (what they saw, seconds it took)."""
    seen = Streams()
    async with session() as http:
        started = time.perf_counter()

        async def client() -> None:
            while time.perf_counter() - started < seconds:
                before = len(seen.failures)
                await one_stream(http, url, body, seen, headers)
                if len(seen.failures) > before:
                    await asyncio.sleep(0.05)  # a refused client does not hammer

        await asyncio.gather(*(client() for _ in range(concurrency)))
        return seen, time.perf_counter() - started


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=300, sock_connect=30))
