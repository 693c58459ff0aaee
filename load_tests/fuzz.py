"""Malformed requests: `python -m load_tests.fuzz` throws them at the HTTP application, in one process, over an emulated cluster.

Bodies are valid ones with something wrong in them, in their JSON or in their bytes. Whatever comes, the answer must be below status 500 and
come in time, errors must have OpenAI's shape, and no request may be left behind. The same seed makes the same bodies.
"""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import click
import httpx
import psutil
from fastapi import FastAPI
from rich.progress import track

from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.models.tiny import make_tiny_model
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from load_tests.http.emulated_cluster import EmulatedCluster

DEADLINE_S = 20.0
MESSAGES = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"a": {"enum": [1]}}}}}
GOOD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1}, "n": 2}),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}},
    ),
    ("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "tools": [TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", {"model": "tiny", "messages": MESSAGES, "max_tokens": 2, "response_format": SCHEMA, "logprobs": True}),
    ("/v1/completions", {"model": "tiny", "prompt": [5, 6], "max_tokens": 2, "logprobs": 1, "seed": 3, "top_p": 0.5, "min_p": 0.1}),
    ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2, "structured_outputs": {"regex": "[a-z]{2}"}}),
    ("/tokenize", {"model": "tiny", "messages": MESSAGES, "tools": [TOOL]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/v1/batches", {"input_file_id": "file-0123456789abcdef01234567", "endpoint": "/v1/completions", "completion_window": "24h"}),
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 1e308, -1e-308, 2**31, 2**63, -(2**64), 0.1, "", " ", "a", "\x00", "\ud800", "\u202e", "é" * 50,
    "x" * 5000,
    [], {}, [[]], [None], [{}], {"": ""}, {"type": "object"}, {"$ref": "#"}, {"type": ["object", 3]}, "none", "auto", "user", "text", [-1],
    [2**40],
    "{{ 7 * 7 }}", "<tool_call>", "(((((a+)+)+)+)+", {"pattern": "("}, [{"role": "user"}], "../../etc/passwd",
)  # fmt: skip


def application(directory: Path) -> tuple[FastAPI, EmulatedCluster]:
    """The real application and service over an emulated cluster, with a tiny model's tokenizer and a directory for files."""
    model = make_tiny_model("llama", directory / "model")
    card = ModelCard.from_directory(model, "tiny", 1000)
    cluster = EmulatedCluster(card, 0.0, idle_tokens=1 << 30)
    serving = ServingSettings(files=directory / "files", max_body_bytes=1 << 20, default_max_tokens=4, max_tokens_limit=16)  # type: ignore[arg-type]
    return make_api(OpenAIService(cluster, Tokenizer.from_directory(model), card, serving), serving), cluster


def malformed(seed: int, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` times (path, body)."""
    chance = random.Random(seed)
    for _ in range(count):
        path, good = chance.choice(GOOD)
        body = json.loads(json.dumps(good))
        for _ in range(chance.choice((0, 1, 1, 2, 3))):
            _spoil(body, chance)
        text = bytearray(json.dumps(body).encode())
        for _ in range(chance.choice((0, 0, 0, 1, 3))):
            _spoil_bytes(text, chance)
        yield path, bytes(text)


async def attack(api: FastAPI, bodies: Iterator[tuple[str, bytes]]) -> Counter[int]:
    """Send all; how often each status came. Raises AssertionError, with the body, for an answer that must not be."""
    statuses: Counter[int] = Counter()
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        for path, body in bodies:
            try:
                async with asyncio.timeout(DEADLINE_S):
                    reply = await http.post(path, content=body)
            except TimeoutError:
                raise AssertionError(f"no answer within {DEADLINE_S:g} s for {path} {body[:2000]!r}") from None
            statuses[reply.status_code] += 1
            if reply.status_code >= 500:
                raise AssertionError(f"status {reply.status_code} for {path} {body[:2000]!r}: {reply.text[:500]}")
            if reply.status_code >= 400 and not {"message", "type", "param", "code"} <= reply.json()["error"].keys():
                raise AssertionError(f"an error without its parts for {path} {body[:2000]!r}")
    return statuses


def _spoil(body: dict[str, Any], chance: random.Random) -> None:
    """Change, remove or add one thing, at any depth."""
    places = list(_places(body))
    if not places:
        return
    holder, key = chance.choice(places)
    match chance.randrange(4):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[chance.choice(("n", "seed", "logprobs", "tools", "stop", "stream", "echo", "extra", "agent_hints"))] = copy.deepcopy(
                chance.choice(ODD)
            )
        case 2 if isinstance(holder, list):
            holder.extend([holder[key]] * chance.choice((1, 30)))
        case _:
            holder[key] = copy.deepcopy(chance.choice(ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _spoil_bytes(text: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(text) + 1)
    match chance.randrange(4):
        case 0:
            del text[at:]
        case 1:
            text[at:at] = chance.choice((b"\xff", b"\x00", b'"', b"{", b"[" * 2000, b"1e999", b"\xed\xa0\x80", b"\\u0000"))
        case 2:
            del text[at : at + chance.randrange(1, 5)]
        case _:
            text[at : at + 1] = bytes([chance.randrange(256)])


@click.command()
@click.option("--bodies", default=100_000, show_default=True, help="Malformed bodies to send.")
@click.option("--seed", default=0, show_default=True)
@click.option("--cases", default=200, show_default=True, help="Cases of schemathesis per operation.")
def command(bodies: int, seed: int, cases: int) -> None:
    """Throw malformed requests at the HTTP application."""
    from load_tests.openapi_cases import check_document

    with tempfile.TemporaryDirectory(prefix="dualpath-fuzz-") as directory:
        api, cluster = application(Path(directory))
        asyncio.run(attack(api, malformed(seed + 1, 1000)))  # whatever is allocated once
        sent = iter(track(malformed(seed, bodies), "bodies", total=bodies, transient=True))
        statuses: Counter[int] = Counter()
        held = [_held()]
        try:
            for count in (bodies // 2, bodies - bodies // 2):
                statuses += asyncio.run(attack(api, islice(sent, count)))
                held.append(_held())
            operations = check_document(api, cases)
        except AssertionError as error:
            raise click.ClickException(str(error)) from error
        click.echo(f"{bodies} bodies: {dict(sorted(statuses.items()))}; {cluster.running} requests left")
        for half, before, after in zip(("first", "second"), held, held[1:], strict=False):
            click.echo(f"{half} half: {after[0] - before[0]:+d} Python objects, {(after[1] - before[1]) / 2**20:+.0f} MiB")
        click.echo(f"{operations} operations of the OpenAPI document, up to {cases} cases each: no status of 500 or above")
        if cluster.running:
            raise click.ClickException("requests were left behind")


def _held() -> tuple[int, int]:
    """Python objects and bytes that this process holds: what leaks grows in both halves alike."""
    gc.collect()
    return len(gc.get_objects()), psutil.Process().memory_info().rss


if __name__ == "__main__":
    command()
