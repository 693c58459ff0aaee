"""A source that lags is given up, and its blocks are read elsewhere: the same text, no slot used twice, bounded extra reads."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from dualpath_ray.hedging import HedgeSettings, Hedging
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import LoadOutcome
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings
from tests.unit.services.harness import Side, System, running_system, shared_model

PROMPT = [random.Random(7).randrange(3, 500) for _ in range(330)]
HEDGE = HedgeSettings(factor=4.0, min_wait_s=0.3, extra_share=0.5)


def slow(bandwidth: float):  # type: ignore[no-untyped-def]
    def wrap(store: BlockStore, geometry: KVGeometry) -> BlockStore:
        return EmulatedStore(store, geometry, EmulationSettings(read_bandwidth=bandwidth))

    return wrap


async def gain_experience(system: System, blocks: int) -> None:
    """A read by the fast node of blocks that nothing else asks for."""
    other = [random.Random(8).randrange(3, 500) for _ in range(16 * blocks + 5)]
    await system.ask(other, "recompute")
    await system.settle()
    for gateway in system.gateways.values():  # what has just been written shall be read
        while (slot := gateway.staging.residents.evict()) is not None:
            gateway.staging._free.append(slot)
    await system.ask(other, "decode")
    await system.settle()


@pytest.mark.parametrize("side", ["prefill", "split"])
@pytest.mark.parametrize("layers_late", [0, 2])
async def test_blocks_of_a_slow_node_are_read_by_the_other_one(tiny_llama: Path, tmp_path: Path, side: Side, layers_late: int) -> None:
    """Also when the first layers have come and the batch is under way (`layers_late`)."""
    model = shared_model(tiny_llama)
    async with running_system(model, tmp_path) as system:
        expected = (await system.ask(PROMPT, "recompute")).tokens
        size = system.geometry.full_block_bytes

    def late(store: BlockStore, geometry: KVGeometry) -> BlockStore:
        if layers_late:
            return EmulatedStore(store, geometry, EmulationSettings(delay_layer={layers_late: 3.0}))
        return EmulatedStore(store, geometry, EmulationSettings(latency_s=3.0))

    async with running_system(model, tmp_path, resident_share=1.0, slow=late, hedge=HEDGE, window_layers=4) as system:
        await gain_experience(system, 20)
        started = asyncio.get_running_loop().time()
        answer = await system.ask(PROMPT, side)
        assert asyncio.get_running_loop().time() - started < 3.0, "the slow node was not waited for"
        assert answer.tokens == expected
        assert answer.usage.cached_tokens == 320
        hedged = 20 if side == "prefill" else 10
        assert system.decode_service.hedging.hedged_reads == 1
        assert system.decode_service.hedging.hedged_bytes == hedged * size
        assert answer.usage.read_bytes["decode_node"] == hedged * size, "what had been read already came from memory"
        await system.settle()  # the slow reads end, too, and are nobody's
        assert system.gateways["p0"].stats.read_blocks == hedged
        again = await system.ask(PROMPT, "decode")
        assert again.tokens == expected and not again.usage.read_bytes["decode_node"]


async def test_the_budget_bounds_what_is_read_twice(tiny_llama: Path, tmp_path: Path) -> None:
    model = shared_model(tiny_llama)
    async with running_system(model, tmp_path) as system:
        expected = (await system.ask(PROMPT, "recompute")).tokens
    late = slow(1e6)
    tight = HedgeSettings(factor=2.0, min_wait_s=0.05, extra_share=0.0)
    async with running_system(model, tmp_path, resident_share=0.0, slow=late, hedge=tight) as system:
        await gain_experience(system, 20)
        for _ in range(3):
            assert (await system.ask(PROMPT, "prefill")).tokens == expected
        assert system.decode_service.hedging.hedged_reads == 1


async def read(nbytes: int, seconds: float) -> LoadOutcome:
    await asyncio.sleep(seconds)
    return LoadOutcome(nbytes, seconds)


async def failing() -> LoadOutcome:
    raise RuntimeError("broken")


async def test_nothing_is_late_without_experience_and_failures_are_not_lateness() -> None:
    hedging = Hedging(HedgeSettings(factor=1.0, min_wait_s=0.01, extra_share=1.0))
    assert await hedging.late({"a": (100, read(100, 0.05))}) is None
    assert await hedging.late({"a": (100, failing()), "b": (100, read(100, 10.0))}) is None
    assert await hedging.late({"a": (100, read(100, 0.0)), "b": (100, read(100, 10.0))}) == "b"
    assert not Hedging(HedgeSettings()).enabled
