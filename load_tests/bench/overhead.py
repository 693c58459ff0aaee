"""`dualpath bench overhead`: what the whole path adds to a request, beside the bare engine.

The same prompt (nothing cached) and continuation, taking turns: by the engine's runners alone in this process, through the cluster
client (scheduler, gateways, transfers, both engines), and through HTTP. A Ray Serve application that streams as many events and does
nothing else shows how much of the last one's time is Serve's. Of the cluster's time to the first token it is said which part passed in
queues, in waiting for memory and for bytes, and in the engine; messages between processes are the rest. `ray` is what they cost without us.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import tempfile
import time
from typing import Any

import click
from rich.progress import track

from dualpath_ray.commands.options import with_settings
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.requests import GenerationRequest
from load_tests.bench.figures import median, show, spread


@click.command()
@with_settings
@click.option("--prompt", default=512, show_default=True, help="Prompt tokens.")
@click.option("--generate", "count", default=16, show_default=True, help="Generated tokens.")
@click.option("--rounds", default=8, show_default=True, help="Rounds; the three ways take turns in each.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")
def command(settings: Settings, prompt: int, count: int, rounds: int, as_json: bool) -> None:
    """Latency of a request through the cluster and through HTTP, against the bare engine."""
    set_ray_defaults(settings.cluster.address)
    from ray import serve

    from deploy.running_service import running_service
    from load_tests.bench import ray_calls
    from load_tests.bench.bare_engine import BareEngine
    from load_tests.http.applications import nothing

    # Ray prints what its processes have to say to the standard output of its driver, where one document is expected.
    with tempfile.TemporaryDirectory(prefix="dualpath-bench-") as store, contextlib.redirect_stdout(sys.stderr):
        model = settings.model.model_copy(
            update={"threads": settings.model.threads or 1, "max_context": settings.model.max_context or 2048}
        )
        settings = settings.model_copy(
            update={
                "model": model,
                "storage": settings.storage.model_copy(update={"path": store}),
                "serving": settings.serving.model_copy(update={"port": 0}),
            }
        )
        bare = BareEngine(settings)
        with running_service(settings) as address:
            serve.run(nothing(), name="nothing", route_prefix="/nothing")
            times, parts = asyncio.run(_measure(settings, address, bare, prompt, count, rounds, as_json))
            serve.delete("nothing")
            rays = asyncio.run(ray_calls.measure())
    document: dict[str, Any] = {"model": settings.model.name, "prompt_tokens": prompt, "generated_tokens": count}
    rows = []
    for name, (first, total) in times.items():
        own_first, own_total = times["bare"]
        document[name] = {"ttft_s": spread(first), "total_s": spread(total)}
        compared = ("", "")
        if name != "nothing":
            added = median([a - b for a, b in zip(first, own_first, strict=True)])
            ratio = median([a / b for a, b in zip(total, own_total, strict=True)])
            document[name] |= {"added_ttft_s": added, "total_vs_bare": ratio}
            compared = (f"{1e3 * added:+.1f} ms", f"{ratio:.2f}")
        rows.append([name, f"{1e3 * median(first):.1f} ms", compared[0], f"{1e3 * median(total):.1f} ms", compared[1]])
    document["cluster"]["first_token_s"] = {part: median([each[part] for each in parts]) for part in parts[0]}
    document["ray"] = rays
    rows.append(["Ray: a call", f"{1e3 * rays['call_s']:.1f} ms", "", "", ""])
    rows.append(["Ray: first item", f"{1e3 * rays['first_item_s']:.1f} ms", "", "", ""])
    columns = ["way", "TTFT", "added to TTFT", "whole request", "vs bare"]
    told = ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in document["cluster"]["first_token_s"].items())
    title = f"{settings.model.name}: {prompt} prompt tokens, {count} generated; cluster's TTFT in ms: {told}"
    show(title, document, rows, columns, as_json)


Times = dict[str, tuple[list[float], list[float]]]


async def _measure(
    settings: Settings, address: str, bare: Any, prompt: int, count: int, rounds: int, quiet: bool
) -> tuple[Times, list[dict[str, float]]]:
    """(Seconds to the first token and to the last, by way; parts of the cluster's times to the first token), round by round."""
    from openai import AsyncOpenAI

    from actors.client import ClusterClient

    client = ClusterClient.connect(settings.cluster.namespace)
    openai = AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    serve_alone = AsyncOpenAI(base_url=f"{address}/nothing/v1", api_key="none", max_retries=0)
    generator = random.Random(0)
    times: Times = {name: ([], []) for name in ("bare", "cluster", "http", "nothing")}
    parts: list[dict[str, float]] = []
    for number in track(range(rounds + 1), description="rounds", transient=True, disable=quiet):
        tokens = [[generator.randrange(100, 400) for _ in range(prompt)] for _ in range(3)]
        bare_times = await asyncio.to_thread(bare.generate, tokens[0], count)
        cluster_times, cluster_parts = await _cluster(client, f"cluster-{number}", tokens[1], count)
        measured = {
            "bare": bare_times,
            "cluster": cluster_times,
            "http": await _http(openai, settings.model.name, tokens[2], count),
            "nothing": await _http(serve_alone, settings.model.name, tokens[2], count),
        }
        if number:  # the first round pays for connections
            parts.append(cluster_parts)
            for name, (first, total) in measured.items():
                times[name][0].append(first)
                times[name][1].append(total)
    return times, parts


async def _cluster(client: Any, name: str, prompt: list[int], count: int) -> tuple[tuple[float, float], dict[str, float]]:
    start = time.perf_counter()
    first = 0.0
    parts: dict[str, float] = {}
    async for delta in client.generate(GenerationRequest(name, tuple(prompt), count, min_new_tokens=count)):
        first = first or time.perf_counter() - start
        if delta.usage is not None:
            parts = dict(delta.usage.first_token_s)
    return (first, time.perf_counter() - start), parts


async def _http(openai: Any, model: str, prompt: list[int], count: int) -> tuple[float, float]:
    start = time.perf_counter()
    first = 0.0
    stream = await openai.completions.create(
        model=model, prompt=prompt, max_tokens=count, temperature=0, stream=True, extra_body={"ignore_eos": True, "min_tokens": count}
    )
    async for _ in stream:
        first = first or time.perf_counter() - start
    return first, time.perf_counter() - start
