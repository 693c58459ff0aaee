"""A storage gateway: one node's storage NIC and staging DRAM (architecture.md).

Owns the staging buffer and the only connection to the block store. Reads hit blocks into leased slots, streams them to prefill
windows, forwards them to the decode node, pushes whole prompts into decode pools, and makes new blocks durable. Runs on one asyncio
loop, without Ray; the store and the endpoint have threads of their own.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass

import numpy as np

from dualpath_ray.errors import (
    BlockError,
    DeadlineExceededError,
    DualPathError,
    InvalidRequestError,
    StaleEpochError,
    TransferError,
)
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.kv.staging import Lease, StagingBuffer
from dualpath_ray.messages import Delivery, Forward, LeaseGrant, LeaseRequest, LoadOutcome, PersistBlock
from dualpath_ray.slot_queue import SlotQueue
from dualpath_ray.stores.base import BlockBuffer, BlockReader, BlockStore
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.messages import Quiesce, WriterDone
from dualpath_ray.transfer.push import PRIORITY_POOL, Blocks, Push
from dualpath_ray.transfer.source import StreamSource

log = logging.getLogger(__name__)

WINDOW, POOL = "window", "pool"
QUIESCE_REPEAT_S = 1.0
IndexEvents = Callable[[list[tuple[bytes, bytes]], list[bytes]], None]
ReadEvents = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    max_waiting_leases: int = 1024
    max_persist_queue_blocks: int = 4096
    layer_groups: int = 4  # a Full Block is read in this many ranges of layers, first layers first


@dataclass(slots=True)
class GatewayStats:
    """Counters since start, in bytes, blocks and seconds."""

    read_bytes: int = 0
    read_blocks: int = 0
    read_s: float = 0.0
    persisted_blocks: int = 0
    persisted_bytes: int = 0
    persist_failures: int = 0
    persist_skipped: int = 0
    corrupt_blocks: int = 0
    leases: int = 0
    lease_wait_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Work:
    """A lease's loads: `loaded` ends when they and their forwarding have ended."""

    lease: Lease
    loaded: asyncio.Future[LoadOutcome]
    quiet: asyncio.Event
    task: asyncio.Task[None] | None = None
    reading: bool = False  # its storage reads are under way
    first_layers_at: float = 0.0


class Gateway:
    """See the module's docstring. Every method must be called on the event loop that `start` was awaited on."""

    def __init__(
        self,
        node_id: str,
        geometry: KVGeometry,
        store: BlockStore,
        slots: int,
        settings: GatewaySettings | None = None,
        endpoint_settings: EndpointSettings | None = None,
    ) -> None:
        self.node_id = node_id
        self.geometry = geometry
        self.store = store
        self.settings = settings or GatewaySettings()
        self.staging = StagingBuffer(geometry, slots)
        self.stats = GatewayStats()
        self.read_queue_tokens = 0
        self.read_queue_bytes = 0
        self._busy_s, self._busy_since = 0.0, 0.0
        store.register(self.staging.arena)
        self.endpoint = Endpoint(f"gateway-{node_id}", (self.staging.region,), endpoint_settings)
        self.source = StreamSource(self.endpoint, STAGING, WINDOW, geometry.layers)
        self._loop: asyncio.AbstractEventLoop
        self._work: dict[int, _Work] = {}
        self._slots = SlotQueue(self.staging, self.settings.max_waiting_leases)
        self._persist_queue_blocks = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._on_index: IndexEvents = lambda added, removed: None
        self._on_read: ReadEvents = lambda request_id, epoch: None
        self._groups = max(1, min(self.settings.layer_groups, store.layer_groups(), geometry.layers))

    async def start(self, on_index: IndexEvents, on_read: ReadEvents | None = None) -> None:
        """`on_index(added, removed)` hears of blocks that became durable, as (key, parent), or must not be used any more;
        `on_read(request_id, epoch)` when this node's storage reads of an attempt have ended, well or badly.
        """
        self._loop = asyncio.get_running_loop()
        self._on_index = on_index
        if on_read is not None:
            self._on_read = on_read
        self.endpoint.on(WriterDone, lambda agent, message: self._threadsafe(self._writer_done, message.lease, agent, message.error))

    async def scan(self) -> list[tuple[bytes, bytes]]:
        """All durable blocks of this model, as (key, parent)."""
        return await asyncio.to_thread(lambda: [(block.key, block.parent) for block in self.store.scan()])

    # ---- leases

    async def lease(self, request: LeaseRequest) -> LeaseGrant:
        """Lend slots, in order of asking, and start the request's loads.

        Raises InvalidRequestError if the arena is too small for ever, OverloadedError if too many wait already,
        DeadlineExceededError if no slots came free in time, StaleEpochError if another incarnation of this gateway is meant.
        """
        if request.gateway not in ("", self.endpoint.agent_name):
            raise StaleEpochError(f"gateway {self.node_id} has been restarted since the request was assigned")
        if request.blocks > self.staging.total_slots:
            raise InvalidRequestError(
                f"the request needs {request.blocks} staging slots, gateway {self.node_id} has {self.staging.total_slots}: "
                "raise staging.slots"
            )
        for peer in request.peers:
            self.endpoint.connect(peer)
        start = time.monotonic()
        await self._slots.wait(request)
        if self.endpoint.is_dead(request.owner):
            raise StaleEpochError(f"{request.owner} died before its lease was granted")
        self.stats.leases += 1
        self.stats.lease_wait_s += time.monotonic() - start
        lease = self.staging.grant(request.owner, request.request_id, request.blocks, request.writers)
        work = _Work(lease, self._loop.create_future(), asyncio.Event())
        work.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._work[lease.lease_id] = work
        for writer in request.writers:
            if self.endpoint.is_dead(writer):  # we were told before this lease was made, and shall not be told again
                self._writer_done(lease.lease_id, writer, "died")
        self.source.add_lease(lease.lease_id, lease.slots, 0 if request.loads else self.geometry.layers)
        if request.loads:
            self.staging.hold(lease)
            work.task = self._spawn(self._load(work, request))
        else:
            work.loaded.set_result(LoadOutcome())
        return LeaseGrant(self.endpoint.agent_name, lease.lease_id, lease.slots)

    async def withdraw(self, request_id: str) -> None:
        """A request that waits for slots needs them no longer: its `lease` call raises CancelledError. Others are left alone."""
        self._slots.withdraw(request_id)

    async def complete(self, lease_id: int, timeout_s: float = 60.0) -> LoadOutcome:
        """Wait until the lease's blocks are in memory and forwarded, then release it. Raises what went wrong."""
        try:
            async with asyncio.timeout(timeout_s):
                outcome = await asyncio.shield(self._work_of(lease_id).loaded)
        except TimeoutError:
            raise DeadlineExceededError(f"blocks not read and forwarded within {timeout_s:.1f} s") from None
        await self.release(lease_id)
        return outcome

    async def release(self, lease_id: int, persist: Iterable[PersistBlock] = ()) -> None:
        """Give the lease back, after making `persist` durable (in the background). Unknown leases are ignored."""
        work = self._work.pop(lease_id, None)
        if work is None:
            return
        blocks = list(persist)
        if blocks:
            self.staging.hold(work.lease)
            self._spawn(self._persist(work.lease, blocks))
        if work.task is not None and not work.loaded.done():
            work.loaded.set_exception(StaleEpochError("the lease was released"))
        work.quiet.set()  # a delivery that waits shall see that there is nothing left to wait for
        self._retire(work.lease)

    def _retire(self, lease: Lease) -> None:
        self.staging.hold(lease)
        self.staging.release(lease)
        self.source.drop_lease(lease.lease_id, lambda: self._threadsafe(self._unhold, lease))
        self._spawn(self._quiesce(lease))

    async def _quiesce(self, lease: Lease) -> None:
        """Ask those that may still write until they have answered or are known to be dead."""
        while lease.writers:
            for writer in list(lease.writers):
                self.endpoint.send(writer, Quiesce(lease.lease_id, self.endpoint.info.metadata))
            await asyncio.sleep(QUIESCE_REPEAT_S)

    def _unhold(self, lease: Lease) -> None:
        self.staging.unhold(lease)
        self._slots.serve()

    def _writer_done(self, lease_id: int, agent: str, error: str | None) -> None:
        lease = self.staging.writer_done(lease_id, agent, error)
        if lease is not None and lease.quiet and lease_id in self._work:
            self._work[lease_id].quiet.set()
        self._slots.serve()

    def peer_died(self, agent: str) -> None:
        """A process is known to be dead: nothing of its is under way, and what it owned is released."""
        self.source.forget_sink(agent)
        self.endpoint.forget(agent)
        for lease in self.staging.leases:
            self._writer_done(lease.lease_id, agent, "died")
        for work in [work for work in self._work.values() if work.lease.owner == agent]:
            self._spawn(self.release(work.lease.lease_id))

    # ---- storage to staging

    async def _load(self, work: _Work, request: LeaseRequest) -> None:
        lease = work.lease
        nbytes = len(request.loads) * self.geometry.full_block_bytes
        start = time.monotonic()
        self._reads_begin(work, request)
        forward_error: str | None = "the load failed"
        try:
            with tracing.span("gateway.read", request.trace, node=self.node_id, blocks=len(request.loads), bytes=nbytes):
                buffers = [BlockBuffer(load.key, load.parent, self.staging.slot(int(lease.slots[load.position]))) for load in request.loads]
                reader = await asyncio.wrap_future(self.store.open(buffers))
                try:
                    await self._read_groups(work, reader, request)
                finally:
                    reader.close()
            read_s = time.monotonic() - start
            self.stats.read_bytes += nbytes
            self.stats.read_blocks += len(request.loads)
            self.stats.read_s += read_s
            forward_error = None
            if not work.loaded.done():
                work.loaded.set_result(LoadOutcome(nbytes, read_s, work.first_layers_at - start))
        except DualPathError as error:
            if isinstance(error, BlockError):
                self.stats.corrupt_blocks += 1
                self._on_index([], [error.key])
            forward_error = str(error)
            self._load_failed(work, error)
        except Exception as error:
            log.exception("gateway %s: load failed", self.node_id)
            self._load_failed(work, TransferError(f"load failed: {error}"))
        finally:
            self._reads_end(work, request)
            if request.forward is not None:
                self.endpoint.finish_writes(request.forward.peer.agent, request.forward.lease_id, forward_error)
            self._unhold(lease)

    def _reads_begin(self, work: _Work, request: LeaseRequest) -> None:
        work.reading = True
        if not self.read_queue_bytes:
            self._busy_since = time.monotonic()
        self.read_queue_tokens += len(request.loads) * self.geometry.block_tokens
        self.read_queue_bytes += len(request.loads) * self.geometry.full_block_bytes

    def _reads_end(self, work: _Work, request: LeaseRequest) -> None:
        """The storage NIC has no part in this lease any more, though its blocks may still be on their way to the decode node."""
        if not work.reading:
            return
        work.reading = False
        self.read_queue_tokens -= len(request.loads) * self.geometry.block_tokens
        self.read_queue_bytes -= len(request.loads) * self.geometry.full_block_bytes
        if not self.read_queue_bytes:
            self._busy_s += time.monotonic() - self._busy_since
        self._on_read(request.request_id, request.epoch)

    def _load_failed(self, work: _Work, error: DualPathError) -> None:
        self.source.load_failed(work.lease.lease_id, error)
        if not work.loaded.done():
            work.loaded.set_exception(error)

    async def _read_groups(self, work: _Work, reader: BlockReader, request: LeaseRequest) -> None:
        """Read all blocks range by range of layers: the first layers can be streamed while the others are still being read."""
        lease = work.lease
        edges = np.linspace(0, self.geometry.layers, self._groups + 1).astype(int).tolist()
        ranges = list(itertools.pairwise(edges))
        reads = [reader.read(first, stop) for first, stop in ranges]
        forwards: list[asyncio.Future[None]] = []
        try:
            for read, (first, stop) in zip(reads, ranges, strict=True):
                await asyncio.wrap_future(read)
                work.first_layers_at = work.first_layers_at or time.monotonic()
                self.source.layers_loaded(lease.lease_id, stop)
                if request.forward is not None:
                    forwards.append(self._forward(lease, request, request.forward, first, stop))
            self._reads_end(work, request)
            await asyncio.gather(*forwards)
        finally:
            await asyncio.gather(*(asyncio.wrap_future(read) for read in reads), *forwards, return_exceptions=True)

    def _forward(self, lease: Lease, request: LeaseRequest, forward: Forward, first: int, stop: int) -> asyncio.Future[None]:
        positions = np.array([load.position for load in request.loads], dtype=np.int32)
        layers = np.arange(first, stop, dtype=np.int32)
        local = _all_layers(lease.slots[positions], self.geometry.layers, layers)
        remote = _all_layers(forward.slots[positions], self.geometry.layers, layers)
        return self._push(forward.peer, STAGING, local, remote, lease_id=forward.lease_id)

    def _push(self, peer: PeerInfo, region: str, local: Blocks, remote: Blocks, lease_id: int | None = None) -> asyncio.Future[None]:
        """Push staging blocks; the future ends when nothing is under way."""
        self.endpoint.connect(peer)
        future: asyncio.Future[None] = self._loop.create_future()

        def done(error: DualPathError | None) -> None:
            self._threadsafe(_resolve, future, error)

        self.endpoint.push(Push(peer.agent, STAGING, local, region, remote, done, lease=lease_id, priority=PRIORITY_POOL))
        return future

    # ---- staging to the decode pool

    async def deliver(self, delivery: Delivery) -> LoadOutcome:
        """Wait until the prompt's KV is complete in the lease, push it into the pool, then release the lease.

        Raises TransferError if a writer could not deliver its part. The lease stays with its owner when this raises.
        """
        work = self._work_of(delivery.lease_id)
        lease = work.lease
        with tracing.span("gateway.deliver", delivery.trace, node=self.node_id, blocks=len(delivery.pool_blocks)):
            try:
                async with asyncio.timeout(delivery.timeout_s):
                    outcome = await asyncio.shield(work.loaded)
                    if not lease.quiet:
                        await work.quiet.wait()
            except TimeoutError:
                raise DeadlineExceededError(
                    f"prompt KV incomplete after {delivery.timeout_s:.1f} s: waiting for {sorted(lease.writers)}"
                ) from None
            self.staging.get(delivery.lease_id)  # it may have been released while we waited
            if lease.write_errors:
                raise TransferError(f"prompt KV is incomplete: {'; '.join(lease.write_errors)}")
            layers = np.arange(self.geometry.layers, dtype=np.int32)
            local = _all_layers(lease.slots[: len(delivery.pool_blocks)], self.geometry.layers, layers)
            pool_size = delivery.peer.region(POOL).blocks // self.geometry.layers
            remote = (layers[:, None] * np.int32(pool_size) + delivery.pool_blocks[None, :]).T.reshape(-1)
            self.staging.hold(lease)
            try:
                await asyncio.shield(self._push(delivery.peer, POOL, local, np.ascontiguousarray(remote)))
            finally:
                self._unhold(lease)
        await self.release(delivery.lease_id, delivery.persist)
        return outcome

    # ---- staging to storage

    async def _persist(self, lease: Lease, blocks: list[PersistBlock]) -> None:
        try:
            while lease.writers:
                await asyncio.sleep(0.001)
            if lease.write_errors:
                return
            if self._persist_queue_blocks + len(blocks) > self.settings.max_persist_queue_blocks:
                self.stats.persist_skipped += len(blocks)
                log.warning("gateway %s: storage writes lag behind, %d blocks are not stored", self.node_id, len(blocks))
                return
            self._persist_queue_blocks += len(blocks)
            try:
                buffers = [BlockBuffer(b.key, b.parent, self.staging.slot(int(lease.slots[b.position]))) for b in blocks]
                outcomes = await asyncio.wrap_future(self.store.write(buffers))
            finally:
                self._persist_queue_blocks -= len(blocks)
            stored = [(b.key, b.parent) for b, outcome in zip(blocks, outcomes, strict=True) if outcome is None]
            for failure in [outcome for outcome in outcomes if outcome is not None][:1]:
                log.warning("gateway %s: %d blocks could not be stored: %s", self.node_id, len(blocks) - len(stored), failure)
            self.stats.persisted_blocks += len(stored)
            self.stats.persisted_bytes += len(stored) * self.geometry.full_block_bytes
            self.stats.persist_failures += len(blocks) - len(stored)
            self._on_index(stored, [])
        except DualPathError as error:
            self.stats.persist_failures += len(blocks)
            log.warning("gateway %s: %d blocks could not be stored: %s", self.node_id, len(blocks), error)
        finally:
            self._unhold(lease)

    # ---- housekeeping

    def busy_seconds(self) -> float:
        """Time since start during which something was being read: bytes read over it is the storage NIC's measured bandwidth."""
        return self._busy_s + (time.monotonic() - self._busy_since if self.read_queue_bytes else 0.0)

    def oldest_lease_s(self) -> float:
        """Age of the lease that holds its slots for the longest time; 0 without any."""
        return max((time.monotonic() - lease.granted_at for lease in self.staging.leases), default=0.0)

    @property
    def persisting_blocks(self) -> int:
        """Blocks that are being made durable."""
        return self._persist_queue_blocks

    @property
    def idle(self) -> bool:
        """No lease is out, nothing is being read or written."""
        return not self._work and not self.staging.leases and not self._persist_queue_blocks and not len(self._slots)

    def check_integrity(self) -> None:
        self.staging.check_integrity()
        if self.idle and self.staging.free_slots != self.staging.total_slots:
            raise AssertionError(
                f"gateway {self.node_id} is idle, but {self.staging.total_slots - self.staging.free_slots} slots are taken"
            )

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.to_thread(self.endpoint.close)
        await asyncio.to_thread(self.store.close)

    def _work_of(self, lease_id: int) -> _Work:
        work = self._work.get(lease_id)
        if work is None:
            raise StaleEpochError(f"lease {lease_id} of gateway {self.node_id} is not valid (any more)")
        return work

    def _threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("gateway %s: the loop is closed", self.node_id)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _all_layers(slots: Blocks, layers_per_slot: int, layers: Blocks) -> Blocks:
    """Layer Block indices of `layers` of each slot, slot by slot (so that consecutive ones merge into one descriptor)."""
    return np.ascontiguousarray((slots[:, None] * np.int32(layers_per_slot) + layers[None, :]).reshape(-1), dtype=np.int32)


def _resolve(future: asyncio.Future[None], error: DualPathError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
