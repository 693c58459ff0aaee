"""What a decode engine asks of the other processes. Ray proxies implement these in a cluster, the services themselves in one process."""

from __future__ import annotations

from typing import Protocol

from dualpath_ray.messages import Delivery, LeaseGrant, LeaseRequest, LoadOutcome, PersistBlock, PrefillOutcome, PrefillTask


class GatewayCalls(Protocol):
    """What a decode engine asks of a gateway; see `dualpath_ray.gateway.Gateway`."""

    async def lease(self, request: LeaseRequest) -> LeaseGrant: ...
    async def complete(self, lease_id: int, timeout_s: float) -> LoadOutcome: ...
    async def deliver(self, delivery: Delivery) -> LoadOutcome: ...
    async def withdraw(self, request_id: str) -> None: ...
    async def release(self, lease_id: int, persist: tuple[PersistBlock, ...] = ()) -> None: ...


class PrefillCalls(Protocol):
    """What a decode engine asks of a prefill engine; see `dualpath_ray.prefill_service.PrefillService`."""

    async def prefill(self, task: PrefillTask) -> PrefillOutcome: ...
    async def cancel(self, request_id: str, epoch: int) -> None: ...


class Directory(Protocol):
    """How to reach the other processes: by Ray actor handle in the cluster, directly in one process."""

    def gateway(self, node_id: str) -> GatewayCalls: ...
    def prefill(self, engine_id: str) -> PrefillCalls: ...
