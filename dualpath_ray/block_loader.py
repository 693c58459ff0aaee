"""Storage to staging: reads the hit blocks of a lease range by range of layers, and forwards them to the decode node as they come."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence

import numpy as np

from dualpath_ray.busy_clock import BusyClock
from dualpath_ray.errors import BlockError, DualPathError, TransferError
from dualpath_ray.gateway_settings import GatewayStats
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.kv.staging import Lease, StagingBuffer
from dualpath_ray.messages import BlockLoad, LeaseRequest, LoadOutcome
from dualpath_ray.staging_push import StagingPush, all_layers
from dualpath_ray.stores.base import BlockBuffer, BlockReader, BlockStore
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.source import StreamSource

log = logging.getLogger(__name__)


class BlockLoader:
    """One per gateway, on its event loop. `on_bad(key)` hears of blocks that must not be used any more, `on_read(request)` when a request's
    storage reads have ended, well or badly (its blocks may still be on their way to the decode node), `on_hit(key)` of the deepest block
    that a request took from memory.
    """

    def __init__(
        self,
        node_id: str,
        staging: StagingBuffer,
        store: BlockStore,
        endpoint: Endpoint,
        source: StreamSource,
        push: StagingPush,
        stats: GatewayStats,
        layer_groups: int,
        on_bad: Callable[[bytes], None],
        on_read: Callable[[LeaseRequest], None],
        on_hit: Callable[[bytes], None],
    ) -> None:
        self._node_id, self._staging, self._store = node_id, staging, store
        self._geometry: KVGeometry = staging.geometry
        self._endpoint, self._source, self._push = endpoint, source, push
        self._stats, self._on_bad, self._on_read, self._on_hit = stats, on_bad, on_read, on_hit
        self._groups = max(1, min(layer_groups, store.layer_groups(), self._geometry.layers))
        self.queue_tokens = 0
        self._reading = BusyClock()  # bytes

    @property
    def queue_bytes(self) -> int:
        return self._reading.amount

    def busy_seconds(self) -> float:
        """Time since start during which something was being read: bytes read over it is the storage NIC's measured bandwidth."""
        return self._reading.seconds()

    async def load(self, lease: Lease, request: LeaseRequest) -> LoadOutcome:
        """Read and forward the request's blocks; resident ones need no reading. The caller holds the lease.

        When this ends, nothing is being read or forwarded, and what was read is resident. Raises what went wrong, also to the lease's
        streams and to the gateway that the blocks were to be forwarded to.
        """
        missing = [load for load in request.loads if load.position not in lease.shared]
        present = [load for load in request.loads if load.position in lease.shared]
        if present:
            self._on_hit(max(present, key=lambda load: load.position).key)
        nbytes = len(missing) * self._geometry.full_block_bytes
        forward_error: str | None = "the load failed"
        start, reads_end = time.monotonic(), self._reads_begin(request, len(missing))
        forwarded = self._forward(lease, request, present, 0, self._geometry.layers)

        def all_read() -> None:
            """What follows is forwarding: it may fail, the blocks are here all the same."""
            reads_end()
            for load in missing:
                self._staging.publish(lease, load.position, load.key)
            self._count(request, len(missing), len(present), time.monotonic() - start)

        try:
            with tracing.span("gateway.read", request.trace, node=self._node_id, blocks=len(missing), bytes=nbytes, resident=len(present)):
                if missing:
                    first_at = await self._read(lease, request, missing, all_read)
                else:
                    all_read()
                    self._source.layers_loaded(lease.lease_id, self._geometry.layers)
                    first_at = start
                await asyncio.gather(*forwarded)
            forward_error = None
            return LoadOutcome(nbytes, time.monotonic() - start, first_at - start, len(present) * self._geometry.full_block_bytes)
        except DualPathError as error:
            if isinstance(error, BlockError):
                self._stats.corrupt_blocks += 1
                self._on_bad(error.key)
            forward_error = str(error)
            self._source.load_failed(lease.lease_id, error)
            raise
        except Exception as error:
            log.exception("gateway %s: load failed", self._node_id)
            failure = TransferError(f"load failed: {error}")
            self._source.load_failed(lease.lease_id, failure)
            raise failure from error
        finally:
            reads_end()
            await asyncio.gather(*forwarded, return_exceptions=True)
            if request.forward is not None:
                self._endpoint.finish_writes(request.forward.peer.agent, request.forward.lease_id, forward_error)

    def _count(self, request: LeaseRequest, read: int, present: int, read_s: float) -> None:
        self._stats.read_bytes += read * self._geometry.full_block_bytes
        self._stats.read_blocks += read
        self._stats.read_s += read_s if read else 0.0
        if request.forward is None:
            self._stats.dram_local_blocks += present
        else:
            self._stats.dram_peer_blocks += present

    def _reads_begin(self, request: LeaseRequest, blocks: int) -> Callable[[], None]:
        """Account for a request's reads of `blocks` blocks; what is returned ends that, once."""
        nbytes, tokens = blocks * self._geometry.full_block_bytes, blocks * self._geometry.block_tokens
        self._reading.add(nbytes)
        self.queue_tokens += tokens
        under_way = True

        def end() -> None:
            nonlocal under_way
            if not under_way:
                return
            under_way = False
            self._reading.take(nbytes)
            self.queue_tokens -= tokens
            self._on_read(request)

        return end

    async def _read(self, lease: Lease, request: LeaseRequest, loads: Sequence[BlockLoad], all_read: Callable[[], None]) -> float:
        """Read `loads` from storage; returns when the first layers were in memory."""
        slots = [self._staging.slot(int(lease.slots[load.position])) for load in loads]
        buffers = [BlockBuffer(load.key, load.parent, data) for load, data in zip(loads, slots, strict=True)]
        reader = await asyncio.wrap_future(self._store.open(buffers))
        try:
            return await self._read_groups(lease, reader, request, loads, all_read)
        finally:
            reader.close()

    async def _read_groups(
        self, lease: Lease, reader: BlockReader, request: LeaseRequest, loads: Sequence[BlockLoad], all_read: Callable[[], None]
    ) -> float:
        """Read all blocks range by range of layers: the first layers can be streamed while the others are still being read."""
        edges = np.linspace(0, self._geometry.layers, self._groups + 1).astype(int).tolist()
        ranges = list(itertools.pairwise(edges))
        reads = [reader.read(first, stop) for first, stop in ranges]
        forwards: list[asyncio.Future[None]] = []
        first_at = 0.0
        try:
            for read, (first, stop) in zip(reads, ranges, strict=True):
                await asyncio.wrap_future(read)
                first_at = first_at or time.monotonic()
                self._source.layers_loaded(lease.lease_id, stop)
                forwards += self._forward(lease, request, loads, first, stop)
            all_read()
            await asyncio.gather(*forwards)
            return first_at
        finally:
            await asyncio.gather(*(asyncio.wrap_future(read) for read in reads), *forwards, return_exceptions=True)

    def _forward(
        self, lease: Lease, request: LeaseRequest, loads: Sequence[BlockLoad], first: int, stop: int
    ) -> list[asyncio.Future[None]]:
        """Push layers `[first, stop)` of `loads` on to the decode node, if that is another one."""
        forward = request.forward
        if forward is None or not loads:
            return []
        positions = np.array([load.position for load in loads], dtype=np.int32)
        layers = np.arange(first, stop, dtype=np.int32)
        local = all_layers(lease.slots[positions], self._geometry.layers, layers)
        remote = all_layers(forward.slots[positions], self._geometry.layers, layers)
        return [self._push(forward.peer, STAGING, local, remote, lease_id=forward.lease_id)]
