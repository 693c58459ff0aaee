"""What is used from memory counts as used in the store: seldom, together, and in time for the collector."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.collector import Collector, CollectorSettings, NoIndex
from dualpath_ray.use_notes import UseNotes
from tests.unit.services.harness import read_bytes, running_system, shared_model

KEYS = [bytes([number]) * 16 for number in range(8)]


def notes(touch: Callable[[Sequence[bytes]], None], interval_s: float = 0.01) -> UseNotes:
    return UseNotes(SimpleNamespace(touch=touch), interval_s)  # type: ignore[arg-type]


async def test_uses_are_handed_over_together_and_each_key_once() -> None:
    touched: list[list[bytes]] = []
    uses = notes(lambda keys: touched.append(list(keys)))
    for _ in range(1000):
        for key in KEYS:
            uses.note(key)
    assert touched == []
    async with asyncio.timeout(10):
        while not touched:
            await asyncio.sleep(0.001)
    uses.note(KEYS[3])
    await uses.close()
    await uses.close()
    assert touched == [KEYS, [KEYS[3]]]


async def test_a_store_that_fails_or_hangs_costs_notes_only(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualpath_ray.use_notes.MAX_KEYS", 4)
    calls: list[list[bytes]] = []

    def touch(keys: Sequence[bytes]) -> None:
        calls.append(list(keys))
        time.sleep(0.05)  # emulates a slow store: many intervals
        raise StoreError("emulated")

    uses = notes(touch, 0.001)
    uses.note(KEYS[0])
    async with asyncio.timeout(10):
        while not calls:
            await asyncio.sleep(0.001)
    for key in KEYS:  # meanwhile
        uses.note(key)
    await asyncio.sleep(0.01)
    assert calls == [[KEYS[0]]], "one call at a time"
    await uses.close()
    assert calls == [[KEYS[0]], KEYS[4:]], "the newest are kept"
    assert caplog.text.count("could not be noted") == 2


async def test_the_collector_spares_what_is_used_from_memory(tiny_llama: Path, tmp_path: Path) -> None:
    """Two long unused prompts lie in the store. One is asked for again and comes from memory alone; then half of the room must go."""
    hot, cold = ([random.Random(seed).randrange(3, 500) for _ in range(330)] for seed in (1, 2))
    async with running_system(shared_model(tiny_llama), tmp_path, resident_share=1.0) as system:
        store = system.gateways["d0"].store
        for prompt in (hot, cold):
            await system.ask(prompt, "recompute", max_new=1)
            await system.settle()
        long_ago = time.time() - 1000
        for file in (path for path in tmp_path.rglob("*") if path.is_file()):
            os.utime(file, (long_ago, long_ago))
        answer = await system.ask(hot, "decode", max_new=1)
        assert answer.usage.cached_tokens == 320 and not read_bytes(answer.usage)
        keys = {prompt: set(system.task(system.request(list(prompt)), "decode").keys[:20]) for prompt in (tuple(hot), tuple(cold))}
        inventory = store.inventory()
        assert {entry.key for entry in inventory.entries()} == keys[tuple(hot)] | keys[tuple(cold)]
    capacity = sum(entry.nbytes for entry in inventory.entries()) * 3 // 5
    Collector(inventory, CollectorSettings(capacity, grace_s=0.0), NoIndex()).collect()
    left = {entry.key for entry in inventory.entries()}
    assert keys[tuple(hot)] <= left and not keys[tuple(cold)] <= left
