"""`dualpath bench decode`: tokens per second of a batch through the cluster, beside the same batch in the bare decode loop.

A real cluster on this machine, and the engine's runners in this process, taking turns. Tokens are counted between the moment when the
last request has its first and the one when the first of them ends, so that prefill is no part of it. Processor time is that of the
decode engine, its computing included, and of the client.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from dataclasses import dataclass, field
from typing import Any

import click
import psutil
from rich.progress import track

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import ConfigError
from dualpath_ray.requests import GenerationRequest
from load_tests.bench.figures import median, show, spread
from load_tests.bench.own_cluster import own_cluster

PROMPT_TOKENS = 64


@dataclass(slots=True)
class _Times:
    """Tokens per second by way, and microseconds of processor time per token, round by round."""

    bare: list[float] = field(default_factory=list)
    cluster: list[float] = field(default_factory=list)
    engine_cpu_us: list[float] = field(default_factory=list)
    client_cpu_us: list[float] = field(default_factory=list)


@click.command()
@with_settings
@click.option("--streams", default=(1, 16), multiple=True, show_default=True, type=click.IntRange(1), help="Requests in the batch.")
@click.option("--generate", "count", default=200, show_default=True, type=click.IntRange(2), help="Tokens that each generates.")
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds; the two ways take turns in each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(settings: Settings, streams: tuple[int, ...], count: int, rounds: int, as_json: bool) -> None:
    """Tokens per second through the cluster, against the bare decode loop."""
    set_ray_defaults(settings.cluster.address)
    from load_tests.bench.bare_engine import BareEngine

    with tempfile.TemporaryDirectory(prefix="dualpath-bench-") as store:
        model = settings.model.model_copy(update={"threads": settings.model.threads or 1, "max_context": PROMPT_TOKENS + count})
        storage = settings.storage.model_copy(update={"path": store})
        room = max(streams) * -(-(PROMPT_TOKENS + count) // model.block_tokens)
        decode = settings.decode.model_copy(update={"max_batch": max(streams), "pool_blocks": room})
        settings = settings.model_copy(update={"model": model, "storage": storage, "decode": decode})
        bare = BareEngine(settings, max(streams))
        with own_cluster(settings):
            times = asyncio.run(_measure(settings, bare, streams, count, rounds, as_json))
    document: dict[str, Any] = {"model": settings.model.name, "generated_tokens": count, "streams": {}}
    rows = []
    for number, each in times.items():
        ratio = median([ours / bare for ours, bare in zip(each.cluster, each.bare, strict=True)])
        document["streams"][str(number)] = {
            "bare_tokens_per_s": spread(each.bare),
            "cluster_tokens_per_s": spread(each.cluster),
            "cluster_vs_bare": ratio,
            "engine_cpu_us_per_token": median(each.engine_cpu_us),
            "client_cpu_us_per_token": median(each.client_cpu_us),
        }
        cpu = [f"{median(each.engine_cpu_us):.0f} us", f"{median(each.client_cpu_us):.0f} us"]
        rows.append([str(number), f"{median(each.bare):.0f}/s", f"{median(each.cluster):.0f}/s", f"{ratio:.2f}", *cpu])
    columns = ["streams", "bare loop", "cluster", "ratio", "engine CPU per token", "client CPU per token"]
    show(f"{settings.model.name}: tokens per second", document, rows, columns, as_json)


async def _measure(settings: Settings, bare: Any, streams: tuple[int, ...], count: int, rounds: int, quiet: bool) -> dict[int, _Times]:
    from actors.client import ClusterClient

    client = ClusterClient.connect(settings.cluster.namespace)
    engines = [psutil.Process(process["pid"]) for process in (await client.status())["processes"].values() if process["role"] == "decode"]
    generator = random.Random(0)
    times = {number: _Times() for number in streams}
    for turn in track(range(rounds + 1), description="rounds", transient=True, disable=quiet):
        for number, each in times.items():
            prompts = [[generator.randrange(100, 400) for _ in range(PROMPT_TOKENS)] for _ in range(2 * number)]
            alone = await asyncio.to_thread(bare.decode, prompts[:number], count)
            before = sum(map(_cpu_s, engines)), time.process_time()
            rate = await _cluster(client, f"{turn}-{number}", prompts[number:], count)
            after = sum(map(_cpu_s, engines)), time.process_time()
            if turn:  # the first round pays for connections
                each.bare.append(alone)
                each.cluster.append(rate)
                for costs, begin, end in zip((each.engine_cpu_us, each.client_cpu_us), before, after, strict=True):
                    costs.append(1e6 * (end - begin) / (number * count))
    await client.aclose()
    return times


async def _cluster(client: Any, name: str, prompts: list[list[int]], count: int) -> float:
    """Tokens per second while all requests decode."""
    arrivals: list[list[tuple[float, int]]] = [[] for _ in prompts]

    async def ask(number: int, prompt: list[int]) -> None:
        async for delta in client.generate(GenerationRequest(f"{name}-{number}", tuple(prompt), count, min_new_tokens=count)):
            arrivals[number].append((time.perf_counter(), len(delta.tokens)))

    await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))
    begin, end = max(each[0][0] for each in arrivals), min(each[-1][0] for each in arrivals)
    if begin >= end:
        raise ConfigError(f"of {len(prompts)} requests the first ended before the last began: give a larger --generate than {count}")
    return sum(tokens for each in arrivals for at, tokens in each if begin < at <= end) / (end - begin)


def _cpu_s(process: psutil.Process) -> float:
    used = process.cpu_times()
    return float(used.user + used.system)
