"""Completed blocks of running sequences: from the decode pool to the gateway's staging, and on to storage.

Blocks that become complete while an earlier push is under way go out together, so the control messages are few. When storage lags
behind, the queue is bounded: blocks past the bound are not stored (they can be computed again), which is counted.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter, deque
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dualpath_ray.background import Background
from dualpath_ray.errors import DualPathError
from dualpath_ray.gateway import POOL
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.messages import LeaseGrant, LeaseRequest, PersistBlock
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.push import PRIORITY_PERSIST, Push

log = logging.getLogger(__name__)

MAX_QUEUED_BLOCKS = 1024
MAX_BLOCKS_AT_ONCE = 8  # not more than the slots that a gateway keeps for this (slot_queue.DRAIN_SLOTS)
LEASE_TIMEOUT_S = 30.0


class StagingCalls(Protocol):
    """The part of a gateway that persisting needs."""

    async def lease(self, request: LeaseRequest) -> LeaseGrant: ...
    async def release(self, lease_id: int, persist: tuple[PersistBlock, ...] = ()) -> None: ...


@dataclass(frozen=True, slots=True)
class PoolBlock:
    """A complete block of `request_id` in pool block `block`, to be stored under `key`."""

    request_id: str
    block: int
    key: bytes
    parent: bytes


class Persister:
    """One per decode engine, on its event loop. Pool blocks must stay untouched until `pushed` has returned for their request."""

    def __init__(self, endpoint: Endpoint, geometry: KVGeometry, pool_blocks: int) -> None:
        self._endpoint, self._geometry, self._pool_blocks = endpoint, geometry, pool_blocks
        self._queue: deque[tuple[StagingCalls, PeerInfo, PoolBlock]] = deque()
        self._pending: Counter[str] = Counter()
        self._changed = asyncio.Condition()
        self._numbers = itertools.count(1)
        self._background = Background(endpoint.agent_name)
        self._wake = asyncio.Event()
        self.skipped_blocks = 0
        self.pushed_blocks = 0

    def start(self) -> None:
        self._background.spawn(self._run())

    @property
    def idle(self) -> bool:
        return not self._pending

    def submit(self, gateway: StagingCalls, peer: PeerInfo, entry: PoolBlock) -> None:
        """Queue a block for storage through `gateway`, whose data-plane address is `peer`."""
        if len(self._queue) >= MAX_QUEUED_BLOCKS:
            self.skipped_blocks += 1
            return
        self._pending[entry.request_id] += 1
        self._queue.append((gateway, peer, entry))
        self._wake.set()

    async def pushed(self, request_id: str) -> None:
        """Wait until none of the request's blocks is read any more."""
        async with self._changed:
            await self._changed.wait_for(lambda: not self._pending[request_id])
            del self._pending[request_id]

    async def close(self) -> None:
        await self._background.close()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                gateway, peer, _ = self._queue[0]
                batch: list[PoolBlock] = []
                while self._queue and len(batch) < MAX_BLOCKS_AT_ONCE and self._queue[0][1].agent == peer.agent:
                    batch.append(self._queue.popleft()[2])
                try:
                    await self._store(gateway, peer, batch)
                except Exception as error:  # also a bug's: requests wait for their blocks to be settled
                    self.skipped_blocks += len(batch)
                    unexpected = not isinstance(error, DualPathError)
                    log.warning("%d blocks are not stored: %s", len(batch), error, exc_info=unexpected)
                finally:
                    await self._settle(batch)

    async def _settle(self, batch: list[PoolBlock]) -> None:
        async with self._changed:
            for entry in batch:
                self._pending[entry.request_id] -= 1
                if not self._pending[entry.request_id]:
                    del self._pending[entry.request_id]
            self._changed.notify_all()

    async def _store(self, gateway: StagingCalls, peer: PeerInfo, batch: list[PoolBlock]) -> None:
        agent = self._endpoint.agent_name
        wanted = LeaseRequest(
            f"persist-{next(self._numbers)}",
            agent,
            len(batch),
            writers=frozenset([agent]),
            peers=(self._endpoint.info,),
            timeout_s=LEASE_TIMEOUT_S,
            draining=True,
            gateway=peer.agent,
        )
        grant = await gateway.lease(wanted)
        error: str | None = "given up"
        entries: tuple[PersistBlock, ...] = ()
        try:
            await self._push(grant, batch)
            self.pushed_blocks += len(batch)
            error, entries = None, tuple(PersistBlock(i, entry.key, entry.parent) for i, entry in enumerate(batch))
        except DualPathError as raised:
            error = str(raised)
            raise
        finally:
            self._endpoint.finish_writes(grant.agent, grant.lease_id, error)
            await gateway.release(grant.lease_id, entries)

    async def _push(self, grant: LeaseGrant, batch: list[PoolBlock]) -> None:
        layers = np.arange(self._geometry.layers, dtype=np.int32)
        blocks = np.array([entry.block for entry in batch], dtype=np.int32)
        local = (layers[None, :] * np.int32(self._pool_blocks) + blocks[:, None]).reshape(-1)
        remote = (grant.slots[:, None] * np.int32(self._geometry.layers) + layers[None, :]).reshape(-1)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()

        def done(error: DualPathError | None) -> None:
            loop.call_soon_threadsafe(future.set_result, None) if error is None else loop.call_soon_threadsafe(future.set_exception, error)

        push = Push(
            grant.agent,
            POOL,
            local.astype(np.int32),
            STAGING,
            remote.astype(np.int32),
            done,
            lease=grant.lease_id,
            priority=PRIORITY_PERSIST,
        )
        self._endpoint.push(push)
        await asyncio.shield(future)
