"""A storage gateway: one node's storage NIC and staging DRAM (architecture.md).

Owns the staging buffer and the only connection to the block store. Reads hit blocks into leased slots, streams them to prefill
windows, forwards them to the decode node, pushes whole prompts into decode pools, and makes new blocks durable. Runs on one asyncio
loop, without Ray; the store and the endpoint have threads of their own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from dualpath_ray.background import Background
from dualpath_ray.block_loader import BlockLoader
from dualpath_ray.block_writer import BlockWriter
from dualpath_ray.errors import DeadlineExceededError, DualPathError, InvalidRequestError, StaleEpochError, TransferError
from dualpath_ray.gateway_settings import GatewaySettings, GatewayStats
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.kv.staging import Lease, StagingBuffer
from dualpath_ray.messages import Delivery, LeaseGrant, LeaseRequest, LoadOutcome, PersistBlock
from dualpath_ray.slot_queue import SlotQueue
from dualpath_ray.staging_push import StagingPush, all_layers, threadsafe
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.messages import Quiesce, WriterDone
from dualpath_ray.transfer.source import StreamSource
from dualpath_ray.use_notes import UseNotes

WINDOW, POOL = "window", "pool"
QUIESCE_REPEAT_S = 1.0
IndexEvents = Callable[[list[tuple[bytes, bytes]], list[bytes]], None]
ReadEvents = Callable[[str, int], None]


@dataclass(slots=True, eq=False)
class _Work:
    """A lease's loads: `loaded` ends when they and their forwarding have ended."""

    lease: Lease
    loaded: asyncio.Future[LoadOutcome]
    quiet: asyncio.Event
    task: asyncio.Task[None] | None = None


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
        residents = round(slots * self.settings.resident_share)
        self.staging = StagingBuffer(geometry, slots, residents, self.settings.huge_pages, self.settings.numa_node)
        self.stats = GatewayStats()
        store.register(self.staging.arena)
        self.endpoint = Endpoint(f"gateway-{node_id}", (self.staging.region,), endpoint_settings)
        self.source = StreamSource(self.endpoint, STAGING, WINDOW, geometry.layers)
        self._push = StagingPush(self.endpoint)
        self._uses = UseNotes(store, self.settings.note_uses_s)
        self.loader = BlockLoader(
            node_id,
            self.staging,
            store,
            self.endpoint,
            self.source,
            self._push,
            self.stats,
            self.settings.layer_groups,
            lambda key: self._on_index([], [key]),
            lambda request: self._on_read(request.request_id, request.epoch),
            self._uses.note,
        )
        self.writer = BlockWriter(
            node_id, self.staging, store, self.stats, self.settings.max_persist_queue_blocks, lambda stored: self._on_index(stored, [])
        )
        self._loop: asyncio.AbstractEventLoop
        self._work: dict[int, _Work] = {}
        self._slots = SlotQueue(self.staging, self.settings.max_waiting_leases)
        self._background = Background(f"gateway {node_id}")
        self._on_index: IndexEvents = lambda added, removed: None
        self._on_read: ReadEvents = lambda request_id, epoch: None

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
        lease = self.staging.grant(request.owner, request.request_id, request.blocks, request.writers, request.load_keys)
        work = _Work(lease, self._loop.create_future(), asyncio.Event())
        work.loaded.add_done_callback(lambda future: future.cancelled() or future.exception())
        self._work[lease.lease_id] = work
        for writer in request.writers:
            if self.endpoint.is_dead(writer):  # we were told before this lease was made, and shall not be told again
                self._writer_done(lease.lease_id, writer, "died")
        self.source.add_lease(lease.lease_id, lease.slots, 0 if request.loads else self.geometry.layers)
        if request.loads:
            self.staging.hold(lease)
            work.task = self._background.spawn(self._load(work, request))
        else:
            work.loaded.set_result(LoadOutcome())
        return LeaseGrant(self.endpoint.agent_name, lease.lease_id, lease.writable_slots)

    async def withdraw(self, request_id: str) -> None:
        """A request that waits for slots needs them no longer: its `lease` call raises CancelledError. Others are left alone."""
        self._slots.withdraw(request_id)

    async def loaded(self, lease_id: int, timeout_s: float = 60.0) -> LoadOutcome:
        """Wait until the lease's blocks are in memory and forwarded. Raises what went wrong."""
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(self._work_of(lease_id).loaded)
        except TimeoutError:
            raise DeadlineExceededError(f"blocks not read and forwarded within {timeout_s:.1f} s") from None

    async def complete(self, lease_id: int, timeout_s: float = 60.0) -> LoadOutcome:
        """Wait until the lease's blocks are in memory and forwarded, then release it. Raises what went wrong."""
        outcome = await self.loaded(lease_id, timeout_s)
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
            self._background.spawn(self._write(work.lease, blocks))
        if work.task is not None and not work.loaded.done():
            work.loaded.set_exception(StaleEpochError("the lease was released"))
        work.quiet.set()  # a delivery that waits shall see that there is nothing left to wait for
        self._retire(work.lease)

    def _retire(self, lease: Lease) -> None:
        self.staging.hold(lease)
        self.staging.release(lease)
        self.source.drop_lease(lease.lease_id, lambda: self._threadsafe(self._unhold, lease))
        self._background.spawn(self._quiesce(lease))

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
            self._background.spawn(self.release(work.lease.lease_id))

    # ---- between staging and storage

    async def _load(self, work: _Work, request: LeaseRequest) -> None:
        try:
            outcome = await self.loader.load(work.lease, request)
            if not work.loaded.done():
                work.loaded.set_result(outcome)
        except DualPathError as error:
            if not work.loaded.done():
                work.loaded.set_exception(error)
        finally:
            self._unhold(work.lease)

    async def _write(self, lease: Lease, blocks: list[PersistBlock]) -> None:
        try:
            await self.writer.write(lease, blocks)
        finally:
            self._unhold(lease)

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
            local = all_layers(lease.slots[: len(delivery.pool_blocks)], self.geometry.layers, layers)
            pool_size = delivery.peer.region(POOL).blocks // self.geometry.layers
            remote = (layers[:, None] * np.int32(pool_size) + delivery.pool_blocks[None, :]).T.reshape(-1)
            self.staging.hold(lease)
            try:
                await asyncio.shield(self._push(delivery.peer, POOL, local, np.ascontiguousarray(remote)))
            finally:
                self._unhold(lease)
        await self.release(delivery.lease_id, delivery.persist)
        return outcome

    # ---- housekeeping

    def oldest_lease_s(self) -> float:
        """Age of the lease that holds its slots for the longest time; 0 without any."""
        return max((time.monotonic() - lease.granted_at for lease in self.staging.leases), default=0.0)

    @property
    def persisting_blocks(self) -> int:
        """Blocks that are being made durable."""
        return self.writer.queue_blocks

    @property
    def idle(self) -> bool:
        """No lease is out, nothing is being read or written."""
        return not self._work and not self.staging.leases and not self.writer.queue_blocks and not len(self._slots)

    def check_integrity(self) -> None:
        self.staging.check_integrity()
        if self.idle and self.staging.available_slots != self.staging.total_slots:
            raise AssertionError(
                f"gateway {self.node_id} is idle, but {self.staging.total_slots - self.staging.available_slots} slots are taken"
            )

    async def close(self) -> None:
        await self._background.close()
        await asyncio.to_thread(self.endpoint.close)
        await self._uses.close()
        await asyncio.to_thread(self.store.close)

    def _work_of(self, lease_id: int) -> _Work:
        work = self._work.get(lease_id)
        if work is None:
            raise StaleEpochError(f"lease {lease_id} of gateway {self.node_id} is not valid (any more)")
        return work

    def _threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
        threadsafe(self._loop, function, *arguments)
