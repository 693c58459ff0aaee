"""The first part of a request on its decode engine: slots leased, reads started, the rest of the prompt computed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dualpath_ray.background import Background
from dualpath_ray.decode_calls import Directory, GatewayCalls
from dualpath_ray.decode_flow import Flow
from dualpath_ray.errors import DualPathError
from dualpath_ray.hedging import Hedging
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import BlockLoad, Forward, LeaseGrant, LeaseRequest, PrefillTask, ReadPart
from dualpath_ray.requests import Drawn
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.feeds import HitSource

log = logging.getLogger(__name__)


class Arming:
    """Notes in the flow what it leases, so that the flow's owner can give it back. One per decode engine."""

    def __init__(self, endpoint: Endpoint, geometry: KVGeometry, directory: Directory, hedging: Hedging) -> None:
        self._hedging = hedging
        self._endpoint, self._geometry, self._directory = endpoint, geometry, directory
        self._background = Background(endpoint.agent_name)

    @property
    def idle(self) -> bool:
        return not self._background

    async def prefill(self, flow: Flow) -> Drawn:
        """Arm this node, have the hits read and the rest computed. Returns the first token.

        Once per request, a source that lags is given up: all leases go back, and the request is armed again with other readers. Blocks
        that have been read are resident by then; new leases are a new epoch, so whatever the old readers still do is dropped.
        """
        blocks = _blocks_by_node(flow.task.route.reads)
        hedged = False
        while True:
            task = await self._arm(flow, blocks)
            computing = asyncio.ensure_future(self._compute(flow, task))
            try:
                late = None if hedged else await self._late(flow, blocks, computing)
                if late is None or not await self._give_up(flow, late, computing):
                    return await computing
            finally:
                if not computing.done():
                    computing.cancel()
                    await asyncio.wait([computing])
            hedged = True
            self._hedging.note_hedge(len(blocks[late]) * self._geometry.full_block_bytes)
            blocks = _without(blocks, late, self._other_reader(flow, late))

    async def _late(self, flow: Flow, blocks: Mapping[str, Sequence[int]], computing: asyncio.Future[Drawn]) -> str | None:
        """The node whose reads lag, if there is another one to read instead; None when prefill ends before that shows."""
        route = flow.task.route
        if not blocks or route.prefill_node == route.decode_node or not self._hedging.enabled:
            return None
        assert flow.lease is not None
        leases = {route.decode_node: flow.lease.lease_id, **flow.remote_leases}
        reads = {
            node_id: (
                len(taken) * self._geometry.full_block_bytes,
                self._directory.gateway(node_id).loaded(leases[node_id], flow.time_left()),
            )
            for node_id, taken in blocks.items()
        }
        watching = asyncio.ensure_future(self._hedging.late(reads))
        try:
            both: list[asyncio.Future[Any]] = [computing, watching]
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            return watching.result() if watching.done() and not computing.done() else None
        finally:
            watching.cancel()

    def _other_reader(self, flow: Flow, late: str) -> str:
        route = flow.task.route
        return route.prefill_node if late == route.decode_node else route.decode_node

    async def _give_up(self, flow: Flow, late: str, computing: asyncio.Future[Drawn]) -> bool:
        """End an armed request's prefill and give its leases back. False if prefill has succeeded meanwhile."""
        route = flow.task.route
        with contextlib.suppress(DualPathError):
            await self._directory.prefill(route.prefill_engine).cancel(flow.name, route.epoch)
        await asyncio.wait([computing], timeout=flow.time_left())
        if not computing.done() or computing.exception() is None:
            return False
        flow.prefilling = False
        assert flow.lease is not None
        for node_id, lease in [(route.decode_node, flow.lease.lease_id), *flow.remote_leases.items()]:
            self._background.spawn(self._release(node_id, lease))  # not waited for: the late one may hang
        flow.lease = None
        flow.remote_leases.clear()
        log.info("request %s: node %s lags, its blocks are read elsewhere", flow.name, late)
        return True

    async def _release(self, node_id: str, lease: int) -> None:
        with contextlib.suppress(DualPathError):
            await self._directory.gateway(node_id).release(lease)

    async def _arm(self, flow: Flow, blocks: Mapping[str, tuple[int, ...]]) -> PrefillTask:
        """Lease slots on all nodes, which starts the reads."""
        request, route = flow.task.request, flow.task.route
        prefill_peer, gateway_peer = route.peers[route.prefill_engine], route.peers[route.decode_node]
        self._endpoint.connect(gateway_peer)
        readers = {node_id: route.peers[node_id] for node_id in blocks if node_id != route.decode_node}
        local = LeaseRequest(
            request.request_id,
            self._endpoint.agent_name,
            self._geometry.blocks_for(len(request.tokens)),
            tuple(self._load(flow, block, block) for block in blocks.get(route.decode_node, ())),
            frozenset([prefill_peer.agent, *(peer.agent for peer in readers.values())]),
            (prefill_peer, *readers.values(), self._endpoint.info),
            timeout_s=flow.time_left(),
            trace=request.trace,
            epoch=route.epoch,
            gateway=gateway_peer.agent,
        )
        asked_at = time.monotonic()
        with tracing.span("decode.arm", request.trace, engine=flow.task.route.decode_engine, blocks=local.blocks):
            grant = flow.lease = await self._lease(route.decode_node, local)
            # The decode node's slots always come first, so that no request waits for them while it holds slots of another node.
            for node_id in sorted(readers):
                await self._lease_remote(flow, grant, node_id, blocks[node_id])
        flow.allocate_s = time.monotonic() - asked_at
        sources = tuple(self._source(flow, grant, node_id, taken) for node_id, taken in blocks.items())
        return PrefillTask(
            request.request_id,
            route.epoch,
            np.array(request.tokens, dtype=np.int32),
            route.hit_blocks * self._geometry.block_tokens,
            sources,
            gateway_peer,
            grant.lease_id,
            grant.slots,
            tuple(readers.values()),
            request.sampling,
            flow.rule.forbidden(0),
            request.resumed_tokens,
            flow.time_left(),
            request.trace,
            prefill_peer.agent,
        )

    async def _compute(self, flow: Flow, task: PrefillTask) -> Drawn:
        request, route = flow.task.request, flow.task.route
        flow.prefilling = True
        with tracing.span("prefill", request.trace, engine=route.prefill_engine, cached_tokens=task.cached_tokens):
            flow.prefill = await self._directory.prefill(route.prefill_engine).prefill(task)
        flow.prefilling = False
        return flow.prefill.first

    def _load(self, flow: Flow, block: int, position: int) -> BlockLoad:
        keys = flow.task.keys
        return BlockLoad(position, keys[block], keys[block - 1] if block else flow.task.root)

    async def _lease_remote(self, flow: Flow, grant: LeaseGrant, node_id: str, blocks: Sequence[int]) -> None:
        """Have another node read some of the hit blocks, stream them to the prefill engine and forward them to this node's slots."""
        request, route = flow.task.request, flow.task.route
        slots = grant.slots[list(blocks)]
        forward = Forward(route.peers[route.decode_node], grant.lease_id, slots)
        wanted = LeaseRequest(
            request.request_id,
            self._endpoint.agent_name,
            len(blocks),
            tuple(self._load(flow, block, position) for position, block in enumerate(blocks)),
            peers=(route.peers[route.prefill_engine], forward.peer, self._endpoint.info),
            forward=forward,
            timeout_s=flow.time_left(),
            trace=request.trace,
            epoch=route.epoch,
            gateway=route.peers[node_id].agent,
        )
        remote = await self._lease(node_id, wanted)
        flow.remote_leases[node_id] = remote.lease_id

    def _source(self, flow: Flow, grant: LeaseGrant, node_id: str, blocks: tuple[int, ...]) -> HitSource:
        """Where the blocks that a node reads can be had: its lease holds nothing else, this node's lease the whole prompt."""
        route = flow.task.route
        if node_id == route.decode_node:
            return HitSource(route.peers[node_id].agent, grant.lease_id, blocks, blocks)
        return HitSource(route.peers[node_id].agent, flow.remote_leases[node_id], tuple(range(len(blocks))), blocks)

    async def _lease(self, node_id: str, wanted: LeaseRequest) -> LeaseGrant:
        """A lease that is given back by itself when we are cancelled before we hear of it."""
        gateway = self._directory.gateway(node_id)
        asked = asyncio.ensure_future(gateway.lease(wanted))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            self._background.spawn(self._give_back(gateway, wanted.request_id, asked))
            raise

    async def _give_back(self, gateway: GatewayCalls, request_id: str, asked: asyncio.Future[LeaseGrant]) -> None:
        with contextlib.suppress(DualPathError):
            await gateway.withdraw(request_id)
            await gateway.release((await asked).lease_id)


def _blocks_by_node(reads: Iterable[ReadPart]) -> dict[str, tuple[int, ...]]:
    """Hit blocks that each node reads, in order."""
    blocks: dict[str, tuple[int, ...]] = {}
    for part in reads:
        blocks[part.node_id] = (*blocks.get(part.node_id, ()), *range(part.first_block, part.first_block + part.blocks))
    return blocks


def _without(blocks: Mapping[str, tuple[int, ...]], late: str, other: str) -> dict[str, tuple[int, ...]]:
    """The same blocks, those of `late` read by `other`."""
    left = {node_id: taken for node_id, taken in blocks.items() if node_id != late}
    left[other] = tuple(sorted((*left.get(other, ()), *blocks[late])))
    return left
