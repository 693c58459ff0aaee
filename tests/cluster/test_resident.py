"""Blocks that gateways keep in memory: the scheduler hears of them and plans reads by them, and a gateway's death takes them away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.cluster.conftest import RunningCluster
from tests.cluster.test_generation import prompt


async def test_hits_come_from_memory_until_their_gateway_dies(start_cluster: Callable[..., RunningCluster], tiny_llama: Path) -> None:
    cluster = start_cluster(f"model.spec={tiny_llama}", "staging.resident_share=1", "scheduling.min_split_blocks=2")
    client = cluster.client()
    tokens = prompt(700, 400)
    first = await cluster.ask(client, "first", tokens)
    before = await cluster.settle(client)
    await cluster.wait_for(client, lambda status: status["resident_blocks"] == 25)  # 400 tokens: the decode node's gateway wrote them all
    second = await cluster.ask(client, "second", tokens)
    after = await cluster.settle(client)
    assert second.tokens == first.tokens
    assert second.usage is not None and second.usage.cached_tokens == 384
    assert not sum(second.usage.read_bytes.values())
    assert after["d0"]["dram_blocks"] - before["d0"]["dram_blocks"] == 24
    await cluster.kill(client, "d0")
    assert not (await client.status())["resident_blocks"]
    third = await cluster.ask(client, "third", tokens)
    assert third.tokens == first.tokens
    assert third.usage is not None and sum(third.usage.read_bytes.values()) > 0
    await cluster.check_no_leaks(client)
