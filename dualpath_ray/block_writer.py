"""Staging to storage: makes completed blocks durable, in the background and within a bound."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from dualpath_ray.errors import DualPathError
from dualpath_ray.gateway_settings import GatewayStats
from dualpath_ray.kv.staging import Lease, StagingBuffer
from dualpath_ray.messages import PersistBlock
from dualpath_ray.stores.base import BlockBuffer, BlockStore

log = logging.getLogger(__name__)


class BlockWriter:
    """One per gateway, on its event loop. `on_stored` hears of blocks that became durable, as (key, parent)."""

    def __init__(
        self,
        node_id: str,
        staging: StagingBuffer,
        store: BlockStore,
        stats: GatewayStats,
        max_queue_blocks: int,
        on_stored: Callable[[list[tuple[bytes, bytes]]], None],
    ) -> None:
        self._node_id, self._staging, self._store = node_id, staging, store
        self._stats, self._max_queue_blocks, self._on_stored = stats, max_queue_blocks, on_stored
        self.queue_blocks = 0

    async def write(self, lease: Lease, blocks: Sequence[PersistBlock]) -> None:
        """Store blocks of a lease that the caller holds, once its writers are done. What cannot be stored is counted and logged."""
        while lease.writers:
            await asyncio.sleep(0.001)
        if lease.write_errors:
            self._stats.persist_failures += len(blocks)
            log.warning("gateway %s: %d blocks are not stored: %s", self._node_id, len(blocks), "; ".join(lease.write_errors))
            return
        if self.queue_blocks + len(blocks) > self._max_queue_blocks:
            self._stats.persist_skipped += len(blocks)
            log.warning("gateway %s: storage writes lag behind, %d blocks are not stored", self._node_id, len(blocks))
            return
        self.queue_blocks += len(blocks)
        try:
            buffers = [BlockBuffer(b.key, b.parent, self._staging.slot(int(lease.slots[b.position]))) for b in blocks]
            outcomes = await asyncio.wrap_future(self._store.write(buffers))
        except DualPathError as error:
            self._stats.persist_failures += len(blocks)
            log.warning("gateway %s: %d blocks could not be stored: %s", self._node_id, len(blocks), error)
            return
        finally:
            self.queue_blocks -= len(blocks)
        durable = [block for block, outcome in zip(blocks, outcomes, strict=True) if outcome is None]
        for block in durable:
            self._staging.publish(lease, block.position, block.key)
        stored = [(block.key, block.parent) for block in durable]
        for failure in [outcome for outcome in outcomes if outcome is not None][:1]:
            log.warning("gateway %s: %d blocks could not be stored: %s", self._node_id, len(blocks) - len(stored), failure)
        self._stats.persisted_blocks += len(stored)
        self._stats.persisted_bytes += len(stored) * self._staging.geometry.full_block_bytes
        self._stats.persist_failures += len(blocks) - len(stored)
        self._on_stored(stored)
