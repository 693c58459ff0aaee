"""The storage gateway as a Ray actor: one per node."""

from __future__ import annotations

import time
from typing import Any

from actors.engine_process import ClusterProcess, Identity, endpoint_settings
from actors.messages import attempt_name
from dualpath_ray.bandwidth import BandwidthEstimate
from dualpath_ray.config import Settings
from dualpath_ray.gateway import Gateway
from dualpath_ray.gateway_settings import GatewaySettings
from dualpath_ray.kv.residency import ResidencyChanges
from dualpath_ray.kv.staging import slot_bytes
from dualpath_ray.messages import Delivery, LeaseGrant, LeaseRequest, LoadOutcome, PersistBlock
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.store_keeper import StoreKeeper
from dualpath_ray.stores.open import keeper_settings, open_store
from dualpath_ray.telemetry import logs
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer.numa import choose_node, online_nodes
from policies.vocabulary import NodeLoad


class StorageGatewayActor(ClusterProcess):
    """See `dualpath_ray.gateway.Gateway`; this adds registration, load reports and metrics."""

    def __init__(self, settings: Settings, identity: Identity) -> None:
        super().__init__(settings, identity)
        self._gateway: Gateway | None = None
        self._keeper: StoreKeeper | None = None
        self._bandwidth = BandwidthEstimate()

    async def _bring_up(self) -> str:
        """Open the store, register memory, report to the scheduler."""
        settings, geometry = self._settings, self._facts.geometry
        store = open_store(settings.storage, self._facts.geometry, self._facts.fingerprint)
        slots = settings.staging.slot_count(slot_bytes(geometry), geometry.blocks_for(self._facts.max_context))
        options = GatewaySettings(
            resident_share=settings.staging.resident_share,
            huge_pages=settings.staging.huge_pages,
            numa_node=choose_node(settings.staging.numa_node, read_machine(), online_nodes()),
            layer_groups=store.layer_groups(),
        )
        transfers = endpoint_settings(settings, self._transports, TrafficClass.KV_READ)
        gateway = Gateway(self._identity.node_id, geometry, store, slots, options, transfers)
        residency = ResidencyChanges()
        reporter = self._reporter(gateway.endpoint.info, scan=gateway.scan, residency=residency)
        gateway.staging.residents.on_change = residency.note
        await gateway.start(reporter.index, lambda request_id, epoch: reporter.read(attempt_name(request_id, epoch)))
        self._gateway = gateway
        self._keeper = StoreKeeper(store, keeper_settings(settings.storage), reporter.index, reporter.told)
        self._keeper.start()
        reporter.start()
        return gateway.endpoint.agent_name

    @property
    def _running(self) -> Gateway:
        assert self._gateway is not None, "start() comes first"
        return self._gateway

    def _load(self) -> NodeLoad:
        gateway = self._running
        return NodeLoad(
            node_id=gateway.node_id,
            read_queue_tokens=gateway.loader.queue_tokens,
            read_queue_bytes=gateway.loader.queue_bytes,
            snic_bandwidth=self._bandwidth.update(gateway.stats.read_bytes, gateway.loader.busy_seconds(), time.monotonic()),
            cnic_bandwidth=0.0,
            free_slots=gateway.staging.available_slots,
            total_slots=gateway.staging.total_slots,
            reported_at=0.0,
        )

    def _figures(self) -> dict[str, float]:
        gateway = self._running
        pushed = gateway.endpoint.stats.pushed_bytes
        return {
            "read_bytes": gateway.stats.read_bytes,
            "read_busy_s": gateway.loader.busy_seconds(),
            "persisted_bytes": gateway.stats.persisted_bytes,
            "hit_layer_bytes": pushed["staging->window"],
            "full_block_bytes": pushed["staging->staging"],
            "pool_bytes": pushed["staging->pool"],
            "push_busy_s": gateway.endpoint.busy_seconds(),
            "corrupt_blocks": gateway.stats.corrupt_blocks,
            "oldest_lease_s": gateway.oldest_lease_s(),
        }

    async def close(self) -> None:
        """On the way out: returns when this process removes nothing from the store any more, so that it may be killed."""
        if self._keeper is not None:
            await self._keeper.close()

    async def lease(self, request: LeaseRequest) -> LeaseGrant:
        with logs.request(request.request_id):
            return await self._running.lease(request)

    async def loaded(self, lease_id: int, timeout_s: float) -> LoadOutcome:
        return await self._running.loaded(lease_id, timeout_s)

    async def complete(self, lease_id: int, timeout_s: float) -> LoadOutcome:
        return await self._running.complete(lease_id, timeout_s)

    async def deliver(self, delivery: Delivery) -> LoadOutcome:
        return await self._running.deliver(delivery)

    async def withdraw(self, request_id: str) -> None:
        await self._running.withdraw(request_id)

    async def release(self, lease_id: int, persist: tuple[PersistBlock, ...] = ()) -> None:
        await self._running.release(lease_id, persist)

    async def peer_died(self, agent: str) -> None:
        self._running.peer_died(agent)

    async def inspect(self) -> dict[str, Any]:
        """State for tests and diagnosis; checks integrity."""
        gateway = self._running
        gateway.check_integrity()
        return {
            "idle": gateway.idle,
            "free_slots": gateway.staging.available_slots,
            "resident_blocks": len(gateway.staging.residents),
            "dram_blocks": gateway.stats.dram_local_blocks + gateway.stats.dram_peer_blocks,
            "total_slots": gateway.staging.total_slots,
            "reading_tokens": gateway.loader.queue_tokens,
            "persisting_blocks": gateway.persisting_blocks,
            "read_bytes": gateway.stats.read_bytes,
            "persisted_blocks": gateway.stats.persisted_blocks,
            "corrupt_blocks": gateway.stats.corrupt_blocks,
            "pushed_bytes": dict(gateway.endpoint.stats.pushed_bytes),
            "store": gateway.store.stats(),
            "evicted_blocks": self._keeper.evicted_blocks if self._keeper is not None else 0,
        }

    async def metrics(self) -> str:
        metrics, gateway = self._metrics, self._running
        store = gateway.store.stats()
        staging = gateway.staging
        for state, slots in (
            ("free", staging.free_slots),
            ("leased", staging.total_slots - staging.available_slots),
            ("resident", staging.residents.evictable),
        ):
            metrics.staging_slots.labels(state=state).set(slots)
        for source, loaded in (
            ("dram_local", gateway.stats.dram_local_blocks),
            ("dram_peer", gateway.stats.dram_peer_blocks),
            ("storage", gateway.stats.read_blocks),
        ):
            metrics.advance(metrics.loaded_blocks, loaded, source=source)
        metrics.advance(metrics.resident_evictions, staging.residents.evicted)
        metrics.read_queue_tokens.set(gateway.loader.queue_tokens)
        metrics.read_queue_bytes.set(gateway.loader.queue_bytes)
        for direction, verb in (("read", "read"), ("write", "written")):
            metrics.advance(metrics.store_bytes, store.get(f"{verb}_bytes", 0.0), direction=direction)
            metrics.advance(metrics.store_seconds, store.get(f"{direction}_seconds", 0.0), direction=direction)
        for queue in ("read", "write"):
            metrics.store_queue.labels(direction=queue).set(store.get(f"queued_{queue}s", 0.0))
        metrics.store_used_bytes.set(gateway.store.budget.used_bytes)
        metrics.store_capacity_bytes.set(gateway.store.budget.capacity_bytes or 0)
        for reason, blocks in (
            ("full", store.get("refused_writes", 0.0)),
            ("failed", store.get("failed_writes", 0.0)),
            ("lagging", gateway.stats.persist_skipped),
        ):
            metrics.advance(metrics.store_skipped_blocks, blocks, reason=reason)
        if self._keeper is not None:
            metrics.advance(metrics.store_evicted_blocks, self._keeper.evicted_blocks)
            metrics.advance(metrics.store_evicted_bytes, self._keeper.evicted_bytes)
        metrics.advance(metrics.corrupt_blocks, gateway.stats.corrupt_blocks)
        metrics.advance(metrics.foreign_files, store.get("foreign_files", 0.0))
        metrics.leases.set(len(gateway.staging.leases))
        metrics.oldest_lease.set(gateway.oldest_lease_s())
        metrics.advance(metrics.snic_busy, gateway.loader.busy_seconds())
        metrics.advance(metrics.persisted_blocks, gateway.stats.persisted_blocks)
        metrics.advance(metrics.persist_failures, gateway.stats.persist_failures + gateway.stats.persist_skipped)
        self._count_pushes(gateway.endpoint, hit_layers="staging->window", full_blocks="staging->staging", pool="staging->pool")
        return metrics.render()
