"""The first part of a request on its decode engine: slots leased, reads started, the rest of the prompt computed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence

import numpy as np

from dualpath_ray.decode_calls import Directory, GatewayCalls
from dualpath_ray.decode_flow import Flow
from dualpath_ray.errors import DualPathError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import BlockLoad, Forward, LeaseGrant, LeaseRequest, PrefillTask, ReadPart
from dualpath_ray.requests import Drawn
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.sink import HitSource


class Arming:
    """Notes in the flow what it leases, so that the flow's owner can give it back. One per decode engine."""

    def __init__(self, endpoint: Endpoint, geometry: KVGeometry, directory: Directory) -> None:
        self._endpoint, self._geometry, self._directory = endpoint, geometry, directory
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        return not self._tasks

    async def prefill(self, flow: Flow) -> Drawn:
        """Arm this node, have the hits read and the rest computed. Returns the first token."""
        request, route = flow.task.request, flow.task.route
        prefill_peer, gateway_peer = route.peers[route.prefill_engine], route.peers[route.decode_node]
        self._endpoint.connect(gateway_peer)
        blocks = _blocks_by_node(route.reads)
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
        prefill = PrefillTask(
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
        flow.prefilling = True
        with tracing.span("prefill", request.trace, engine=route.prefill_engine, cached_tokens=prefill.cached_tokens):
            flow.prefill = await self._directory.prefill(route.prefill_engine).prefill(prefill)
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
            self._spawn(wanted.request_id, gateway, asked)
            raise

    async def _give_back(self, gateway: GatewayCalls, request_id: str, asked: asyncio.Future[LeaseGrant]) -> None:
        with contextlib.suppress(DualPathError):
            await gateway.withdraw(request_id)
            await gateway.release((await asked).lease_id)

    def _spawn(self, flow_name: str, gateway: GatewayCalls, asked: asyncio.Future[LeaseGrant]) -> None:
        task = asyncio.get_running_loop().create_task(self._give_back(gateway, flow_name, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _blocks_by_node(reads: Iterable[ReadPart]) -> dict[str, tuple[int, ...]]:
    """Hit blocks that each node reads, in order."""
    blocks: dict[str, tuple[int, ...]] = {}
    for part in reads:
        blocks[part.node_id] = (*blocks.get(part.node_id, ()), *range(part.first_block, part.first_block + part.blocks))
    return blocks
