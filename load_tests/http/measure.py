"""The figures of `python -m load_tests.http`, each from one run on one machine, and ratios where machines differ."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from load_tests.http.applications import IDLE_PROMPT
from load_tests.http.streams import Streams, closed_loop, one_stream, session


def body(model: str, tokens: int, prompt: Sequence[int] = (300, 301, 302)) -> dict[str, Any]:
    return {"model": model, "prompt": list(prompt), "max_tokens": tokens, "stream": True, "ignore_eos": True, "temperature": 0}


def figures(seen: Streams, seconds: float) -> dict[str, Any]:
    told = {f"p{q}": float(np.percentile(seen.first, q)) for q in (50, 90, 99)} if seen.first else {}
    return {
        "streams_per_s": len(seen.total) / seconds,
        "events_per_s": seen.events / seconds,
        "ttft_s": told,
        "failures": len(seen.failures),
        "first_failure": next(iter(seen.failures), None),
    }


async def saturation(urls: dict[str, str], model: str, levels: Sequence[int], tokens: int, seconds: float) -> dict[str, Any]:
    """Throughput of each application at each concurrency; the applications take turns."""
    curves: dict[str, Any] = {name: {} for name in urls}
    for url in urls.values():
        await closed_loop(url, body(model, tokens), 2, 1.0)  # connections, first imports
    for level in levels:
        for name, url in urls.items():
            curves[name][level] = figures(*await closed_loop(url, body(model, tokens), level, seconds))
    best = {name: max(point["streams_per_s"] for point in curve.values()) for name, curve in curves.items()}
    return {
        "tokens": tokens,
        "curves": curves,
        "events_per_stream": {name: _events_per_stream(curve) for name, curve in curves.items()},
        "best_streams_per_s": best,
        "ratio_to_nothing": {name: best[name] / best["nothing"] for name in best},
    }


def _events_per_stream(curve: dict[int, Any]) -> float:
    """Tokens that come fast share one."""
    return float(sum(point["events_per_s"] for point in curve.values()) / (sum(point["streams_per_s"] for point in curve.values()) or 1.0))


async def idle_streams(url: str, model: str, count: int, hold_s: float) -> dict[str, Any]:
    """Open `count` streams that fall silent after their first token, hold them, and see whether others are still served meanwhile."""
    opened = ended = 0
    waiting = asyncio.Event()

    async with session() as http:

        async def hold() -> None:
            nonlocal opened, ended
            async with http.post(f"{url}/v1/completions", json=body(model, 100, [300] * IDLE_PROMPT)) as reply:
                if reply.status != 200:
                    return
                await reply.content.readany()
                opened += 1
                rest = asyncio.ensure_future(reply.content.readany())
                await asyncio.wait([rest, asyncio.ensure_future(waiting.wait())], return_when=asyncio.FIRST_COMPLETED)
                ended += rest.done() and not rest.result()
                rest.cancel()

        started = time.perf_counter()
        tasks = [asyncio.create_task(hold()) for _ in range(count)]
        while opened < count and time.perf_counter() - started < 120:
            await asyncio.sleep(0.05)
        opening_s = time.perf_counter() - started
        seen = Streams()
        until = time.perf_counter() + hold_s
        while time.perf_counter() < until:
            await one_stream(http, url, body(model, 8), seen)
            await asyncio.sleep(0.1)
        waiting.set()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {
        "asked": count,
        "opened": opened,
        "opening_s": opening_s,
        "lost_while_held": ended,
        "held_s": hold_s,
        "others": figures(seen, hold_s),
    }


async def fairness(url: str, model: str, tokens: int, seconds: float, clients: tuple[int, int] = (24, 6)) -> dict[str, Any]:
    """A greedy and a modest tenant at once, more than the engines can do: each one's throughput, and alone what the modest one gets."""
    alone, alone_s = await closed_loop(url, body(model, tokens), clients[1], seconds, {"X-Tenant": "alone"})
    (greedy, greedy_s), (modest, modest_s) = await asyncio.gather(
        closed_loop(url, body(model, tokens), clients[0], seconds, {"X-Tenant": "greedy"}),
        closed_loop(url, body(model, tokens), clients[1], seconds, {"X-Tenant": "modest"}),
    )
    parts = {"alone": figures(alone, alone_s), "greedy": figures(greedy, greedy_s), "modest": figures(modest, modest_s)}
    share = parts["modest"]["streams_per_s"] / (parts["modest"]["streams_per_s"] + parts["greedy"]["streams_per_s"] or 1.0)
    return {"clients": {"greedy": clients[0], "modest": clients[1]}, "share_of_modest": share, **parts}


async def drain(url: str, model: str, redeploy: Callable[[], None], seconds: float) -> dict[str, Any]:
    """Steady load while the application is deployed anew: requests that failed must be none."""
    thread = threading.Thread(target=redeploy, daemon=True)
    load = asyncio.ensure_future(closed_loop(url, body(model, 200), 8, seconds))
    await asyncio.sleep(min(2.0, seconds / 4))
    started = time.perf_counter()
    thread.start()
    await asyncio.to_thread(thread.join)
    took = time.perf_counter() - started
    return {"redeploy_s": took, **figures(*await load)}
