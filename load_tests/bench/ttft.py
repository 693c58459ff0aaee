"""`dualpath bench ttft`: time to first token with a full hit in storage, beside recomputing the same prompt.

A real cluster on this machine. Every prompt length gets fresh random tokens in each round; the first request computes them (nothing
cached), the second finds all complete blocks in storage.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from typing import Any

import click
from rich.progress import Progress

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.requests import GenerationRequest
from load_tests.bench.figures import median, show, spread
from load_tests.bench.own_cluster import own_cluster


@click.command()
@with_settings
@click.option("--tokens", multiple=True, type=int, default=(1024, 2048, 4096), show_default=True, help="Prompt lengths.")
@click.option("--rounds", default=3, show_default=True, help="Prompts per length.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(settings: Settings, tokens: tuple[int, ...], rounds: int, as_json: bool) -> None:
    """Time to first token: full hit against recompute."""
    set_ray_defaults(settings.cluster.address)
    with tempfile.TemporaryDirectory(prefix="dualpath-bench-") as store:
        model = settings.model.model_copy(
            update={"threads": settings.model.threads or 1, "max_context": settings.model.max_context or max(tokens) + 64}
        )
        staging = settings.staging.model_copy(update={"resident_share": 0.0})  # hits are to come from storage
        storage = settings.storage.model_copy(update={"path": store})
        settings = settings.model_copy(update={"model": model, "storage": storage, "staging": staging})
        with own_cluster(settings):
            times = asyncio.run(_measure(settings, tokens, rounds, as_json))
    document: dict[str, Any] = {"model": settings.model.name, "lengths": {}}
    rows = []
    for length, (cold, hit, read) in times.items():
        speedup = median([a / b for a, b in zip(cold, hit, strict=True)])
        entry = {"ttft_recompute_s": spread(cold), "ttft_hit_s": spread(hit), "read_bytes": read, "speedup": speedup}
        document["lengths"][str(length)] = entry
        rows.append([str(length), f"{median(cold):.2f} s", f"{median(hit):.2f} s", f"{read / 1e6:.0f} MB", f"{speedup:.1f}x"])
    show(f"TTFT of {settings.model.name}", document, rows, ["prompt", "recompute", "full hit", "read", "faster"], as_json)


async def _measure(
    settings: Settings, lengths: tuple[int, ...], rounds: int, quiet: bool
) -> dict[int, tuple[list[float], list[float], int]]:
    from actors.client import ClusterClient

    client = ClusterClient.connect(settings.cluster.namespace)
    generator = random.Random(0)
    times: dict[int, tuple[list[float], list[float], int]] = {}
    with Progress(transient=True, disable=quiet) as progress:
        task = progress.add_task("prompts", total=len(lengths) * rounds)
        await _ttft(client, "warm-up", [generator.randrange(100, 400) for _ in range(128)])
        for length in lengths:
            cold: list[float] = []
            hit: list[float] = []
            read = 0
            for number in range(rounds):
                prompt = [generator.randrange(100, 400) for _ in range(length)]
                cold.append((await _ttft(client, f"cold-{length}-{number}", prompt))[0])
                await _until_idle(client)
                seconds, read = await _ttft(client, f"hit-{length}-{number}", prompt)
                hit.append(seconds)
                await _until_idle(client)
                progress.advance(task)
            times[length] = (cold, hit, read)
    return times


async def _ttft(client: Any, name: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and KV bytes read."""
    start = time.perf_counter()
    first = 0.0
    read = 0
    async for delta in client.generate(GenerationRequest(name, tuple(prompt), 2)):
        first = first or time.perf_counter() - start
        if delta.usage is not None:
            read = sum(delta.usage.read_bytes.values())
    return first, read


async def _until_idle(client: Any) -> None:
    """Blocks are written after the last token; the next request must find them."""
    while not all(state["idle"] for state in (await client.inspect()).values()):
        await asyncio.sleep(0.02)
