"""A gateway's keeper: it collects when room is needed, tells the index first, and several of them do not tread on each other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from dualpath_ray.kv.index import BlockIndex
from dualpath_ray.kv.keys import ROOT_TAG
from dualpath_ray.store_keeper import KeeperSettings, StoreKeeper
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from tests.unit.stores.conftest import FINGERPRINT, PAGED, make_blocks

SIZE = 4096 + PAGED.full_block_bytes


def chain(count: int, seed: int) -> list[BlockBuffer]:
    blocks = make_blocks(PAGED, count, seed)
    return [BlockBuffer(blocks[0].key, ROOT_TAG + blocks[0].parent[4:], blocks[0].data), *blocks[1:]]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_store_under_constant_writing_stays_within_its_budget(tmp_path: Path) -> None:
    """Two gateways write three times what fits; every block that the index names can be read at any moment, or was just forgotten."""
    capacity = 60 * SIZE
    index = BlockIndex()
    stores = [DirectoryStore(tmp_path, PAGED, FINGERPRINT, DirectorySettings(capacity_bytes=capacity)) for _ in range(2)]

    def on_index(added: list[tuple[bytes, bytes]], removed: list[bytes]) -> None:
        index.add(added)
        index.remove(removed)

    async def told(timeout_s: float) -> bool:
        return True

    keepers = [StoreKeeper(store, KeeperSettings(capacity, 0.05, grace_s=0.0), on_index, told) for store in stores]
    for keeper in keepers:
        keeper.start()
    written = rounds = 0
    async with asyncio.timeout(60):
        while rounds < 36 or sum(keeper.evicted_blocks for keeper in keepers) <= 30:  # many writes are refused if keepers are slow
            store, blocks = stores[rounds % 2], chain(5, rounds)
            rounds += 1
            try:
                await asyncio.wrap_future(store.write(blocks))
                index.add((block.key, block.parent) for block in blocks)
                written += 5
            except Exception as error:
                assert "capacity_bytes" in str(error)
                await asyncio.sleep(0.05)
            held = await asyncio.to_thread(lambda: sum(entry.nbytes for entry in stores[0].inventory().entries()))
            assert held <= capacity + 30 * SIZE  # what two gateways write between two looks
    for keeper in keepers:
        await keeper.close()
    present = {entry.key for entry in stores[0].inventory().entries()}
    known = {block.key for number in range(rounds) for block in chain(5, number) if block.key in index}
    assert known <= present
    assert sum(keeper.evicted_blocks for keeper in keepers) == written - len(present)
    parents = {entry.parent for entry in stores[0].inventory().entries()}
    assert all(parent in present or parent.startswith(ROOT_TAG) for parent in parents), "a chain was broken in the middle"
    for store in stores:
        store.close()


async def test_a_scheduler_that_does_not_answer_keeps_every_block(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, PAGED, FINGERPRINT)
    assert store.write(chain(8, 1)).result(10) == [None] * 8
    events: list[tuple[int, int]] = []

    async def told(timeout_s: float) -> bool:
        return False

    keeper = StoreKeeper(store, KeeperSettings(4 * SIZE, 60.0), lambda added, removed: events.append((len(added), len(removed))), told)
    keeper.start()
    await until(lambda: len(events) >= 2)
    await keeper.close()
    assert events == [(0, 5), (5, 0)]
    assert len(list(store.scan())) == 8
    store.close()


async def test_without_a_bound_nothing_runs(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path, PAGED, FINGERPRINT)

    async def told(timeout_s: float) -> bool:
        raise AssertionError

    keeper = StoreKeeper(store, KeeperSettings(), lambda added, removed: None, told)
    keeper.start()
    await asyncio.sleep(0.05)
    await keeper.close()
    store.close()
    assert not (tmp_path / ".usage.json").exists()
