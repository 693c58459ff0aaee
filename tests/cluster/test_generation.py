"""A cluster of real actors: the text is right, both paths carry bytes, tenants are apart, and KV goes around the object store."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import torch

from actors.client import ClusterClient
from actors.object_store import created_bytes
from tests.cluster.conftest import RunningCluster


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 500) for _ in range(length)]


def reference(model_path: Path, tokens: list[int], count: int) -> list[int]:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    out = plain.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(tokens) :].tolist()


async def test_eight_turns_equal_the_reference(shared: RunningCluster, client: ClusterClient, tiny_llama: Path) -> None:
    history = prompt(1, 120)
    created = created_bytes()
    for turn in range(8):
        answer = await shared.ask(client, f"turn{turn}", history)
        assert answer.tokens == reference(tiny_llama, history, 8)
        assert answer.usage is not None
        assert answer.usage.computed_tokens + answer.usage.cached_tokens == len(history)
        if turn:
            assert answer.usage.cached_tokens >= (len(history) - 40) // 16 * 16
        history += answer.tokens + prompt(100 + turn, 20)
        await shared.settle(client)
    # Control messages may be large enough for the object store; one KV block of this model alone has 32 KiB.
    assert created_bytes() - created < 16 * 1024


async def test_concurrent_requests_use_both_paths(shared: RunningCluster, client: ClusterClient, tiny_llama: Path) -> None:
    """With reads queued on one side the scheduler takes the other; bytes per side are geometry times blocks."""
    prompts = [prompt(200 + i, 400) for i in range(8)]
    first = await asyncio.gather(*(shared.ask(client, f"warm{i}", tokens) for i, tokens in enumerate(prompts)))
    before = await shared.settle(client)
    again = await asyncio.gather(*(shared.ask(client, f"hit{i}", tokens) for i, tokens in enumerate(prompts)))
    after = await shared.settle(client)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in first]
    facts = await client.facts()
    sides = {"prefill_node": 0, "decode_node": 0}
    for answer in again:
        assert answer.usage is not None
        assert sum(answer.usage.read_bytes.values()) == 24 * facts.geometry.full_block_bytes
        for side in sides:
            sides[side] += answer.usage.read_bytes.get(side, 0)
    assert sides["prefill_node"] > 0
    assert sides["decode_node"] > 0
    for node, side in (("p0", "prefill_node"), ("d0", "decode_node")):
        assert after[node]["read_bytes"] - before[node]["read_bytes"] == sides[side]
    assert again[0].tokens == reference(tiny_llama, prompts[0], 8)


async def test_tenants_share_nothing_and_sessions_of_one_tenant_share_prefixes(shared: RunningCluster, client: ClusterClient) -> None:
    common = prompt(300, 128)
    first = await shared.ask(client, "a1", common, tenant="a")
    await shared.settle(client)
    other = await shared.ask(client, "b1", common, tenant="b")
    session = await shared.ask(client, "a2", common + prompt(301, 30), tenant="a")
    assert first.usage is not None and other.usage is not None and session.usage is not None
    assert first.usage.cached_tokens == 0
    assert other.usage.cached_tokens == 0
    assert other.tokens == first.tokens
    assert session.usage.cached_tokens == 128


async def test_layerwise_window_is_all_the_memory_prefill_takes(shared: RunningCluster, client: ClusterClient) -> None:
    """Must hold 3: resident prefill KV never exceeds window layers times one layer's KV of the batch."""
    await shared.ask(client, "long", prompt(400, 900))
    state = (await shared.settle(client))["prefill-p0-0"]
    facts = await client.facts()
    window = shared.cluster.settings.prefill.window_layers
    assert window < facts.geometry.layers
    assert 900 * facts.geometry.token_layer_bytes <= state["peak_layer_bytes"] <= facts.max_context * facts.geometry.token_layer_bytes
    assert 0 < state["peak_window_bytes"] <= window * state["peak_layer_bytes"]
