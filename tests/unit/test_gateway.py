"""Leases of a gateway whose owners or writers die at awkward moments. (What leases are for is tested in tests/unit/services.)"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.errors import DualPathError, StaleEpochError
from dualpath_ray.gateway import POOL, Gateway
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import BlockLoad, Delivery, LeaseRequest, PersistBlock
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.transfer.memory import PeerInfo, Region

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=8, block_tokens=4)
SLOTS = 4


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Gateway]:
    made = Gateway("n0", GEOMETRY, DirectoryStore(tmp_path, GEOMETRY, "model", DirectorySettings()), SLOTS)
    await made.start(lambda added, removed: None)
    yield made
    await made.close()


async def settle(gateway: Gateway) -> None:
    async with asyncio.timeout(10):
        while not gateway.idle:
            await asyncio.sleep(0.001)
    gateway.check_integrity()
    assert gateway.staging.free_slots == SLOTS


def wanted(owner: str, blocks: int, *writers: str) -> LeaseRequest:
    return LeaseRequest(request_id="r", owner=owner, blocks=blocks, writers=frozenset(writers))


@pytest.mark.parametrize("death", ["before the lease", "while it is out", "after its release"])
async def test_slots_come_back_whenever_a_writer_dies(gateway: Gateway, death: str) -> None:
    if death == "before the lease":
        gateway.peer_died("writer")
    grant = await gateway.lease(wanted("owner", 2, "writer"))
    if death == "while it is out":
        gateway.peer_died("writer")
    await gateway.release(grant.lease_id)
    if death == "after its release":
        gateway.peer_died("writer")
    await settle(gateway)


async def test_blocks_whose_writer_died_are_not_stored_and_that_is_counted(gateway: Gateway) -> None:
    grant = await gateway.lease(wanted("owner", 2, "writer"))
    await gateway.release(grant.lease_id, [PersistBlock(0, b"k" * 16, b"p" * 16)])
    gateway.peer_died("writer")
    await settle(gateway)
    assert (gateway.stats.persisted_blocks, gateway.stats.persist_failures) == (0, 1)


async def test_what_a_dead_process_waits_for_is_not_lent(gateway: Gateway) -> None:
    first = await gateway.lease(wanted("owner", SLOTS))
    late = asyncio.ensure_future(gateway.lease(wanted("dead", SLOTS)))
    other = asyncio.ensure_future(gateway.lease(wanted("owner", SLOTS)))
    await asyncio.sleep(0)
    gateway.peer_died("dead")
    await gateway.release(first.lease_id)
    with pytest.raises(StaleEpochError, match="dead"):
        await late
    await gateway.release((await other).lease_id)
    await settle(gateway)


async def test_what_a_process_held_when_it_died_is_released(gateway: Gateway) -> None:
    await gateway.lease(wanted("owner", SLOTS))
    gateway.peer_died("owner")
    await settle(gateway)


async def test_a_delivery_learns_that_its_lease_was_released_while_it_waited(gateway: Gateway) -> None:
    grant = await gateway.lease(wanted("owner", 1, "writer"))
    pool = Region(POOL, 0, GEOMETRY.layer_block_bytes, 4, 4 * GEOMETRY.layer_block_bytes)
    peer = PeerInfo("decode", "decode-1", b"", (pool,))
    delivery = asyncio.ensure_future(gateway.deliver(Delivery(grant.lease_id, peer, np.array([0], dtype=np.int32), timeout_s=30.0)))
    await asyncio.sleep(0)
    await gateway.release(grant.lease_id)
    gateway.peer_died("writer")
    async with asyncio.timeout(5):
        with pytest.raises(StaleEpochError):
            await delivery
    await settle(gateway)


async def test_the_end_of_reads_is_told_once_and_takes_them_off_the_queue(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[tuple[str, int, int]] = []
    monkeypatch.setattr(gateway, "_on_read", lambda request_id, epoch: ended.append((request_id, epoch, gateway.loader.queue_tokens)))
    missing = BlockLoad(0, b"key" * 8, b"root" * 6)
    grant = await gateway.lease(LeaseRequest("r", "owner", 1, (missing,), epoch=2))
    await asyncio.sleep(0)
    assert gateway.loader.queue_tokens == GEOMETRY.block_tokens
    with pytest.raises(DualPathError):
        await gateway.complete(grant.lease_id)
    await gateway.release(grant.lease_id)
    await settle(gateway)
    assert ended == [("r", 2, 0)], "a failed read has ended, too"
