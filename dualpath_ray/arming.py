"""The first part of a request on its decode engine: slots leased, reads started, the rest of the prompt computed."""

from __future__ import annotations

import asyncio
import contextlib
import time

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
        readers = {part.node_id: route.peers[part.node_id] for part in route.reads if part.node_id != route.decode_node}
        local = LeaseRequest(
            request.request_id,
            self._endpoint.agent_name,
            self._geometry.blocks_for(len(request.tokens)),
            tuple(
                load
                for part in route.reads
                if part.node_id == route.decode_node
                for load in self._loads(flow, part.first_block, part.blocks, 0)
            ),
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
                await self._lease_remote(flow, grant, node_id)
        flow.allocate_s = time.monotonic() - asked_at
        sources = tuple(
            HitSource(route.peers[part.node_id].agent, lease, positions, part.first_block)
            for part, lease, positions in self._placed(flow, grant)
        )
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

    def _loads(self, flow: Flow, first: int, blocks: int, position_offset: int) -> list[BlockLoad]:
        keys, root = flow.task.keys, flow.task.root
        return [
            BlockLoad(block - position_offset, keys[block], keys[block - 1] if block else root) for block in range(first, first + blocks)
        ]

    def _parts_by_node(self, flow: Flow, node_id: str) -> list[tuple[int, int]]:
        return [(part.first_block, part.blocks) for part in flow.task.route.reads if part.node_id == node_id]

    async def _lease_remote(self, flow: Flow, grant: LeaseGrant, node_id: str) -> None:
        """Have another node read its part of the hits, stream it to the prefill engine and forward it to this node's slots."""
        request, route = flow.task.request, flow.task.route
        loads: list[BlockLoad] = []
        slots: list[int] = []
        for first, blocks in self._parts_by_node(flow, node_id):
            loads += self._loads(flow, first, blocks, first - len(loads))
            slots += grant.slots[first : first + blocks].tolist()
        forward = Forward(route.peers[route.decode_node], grant.lease_id, np.array(slots, dtype=np.int32))
        wanted = LeaseRequest(
            request.request_id,
            self._endpoint.agent_name,
            len(loads),
            tuple(loads),
            peers=(route.peers[route.prefill_engine], forward.peer, self._endpoint.info),
            forward=forward,
            timeout_s=flow.time_left(),
            trace=request.trace,
            epoch=route.epoch,
            gateway=route.peers[node_id].agent,
        )
        remote = await self._lease(node_id, wanted)
        flow.remote_leases[node_id] = remote.lease_id

    def _placed(self, flow: Flow, grant: LeaseGrant) -> list[tuple[ReadPart, int, tuple[int, ...]]]:
        """Each read part with its lease and the positions of its blocks in that lease."""
        placed: list[tuple[ReadPart, int, tuple[int, ...]]] = []
        used: dict[str, int] = {}
        for part in flow.task.route.reads:
            if part.node_id == flow.task.route.decode_node:
                placed.append((part, grant.lease_id, tuple(range(part.first_block, part.first_block + part.blocks))))
            else:
                start = used.get(part.node_id, 0)
                used[part.node_id] = start + part.blocks
                placed.append((part, flow.remote_leases[part.node_id], tuple(range(start, start + part.blocks))))
        return placed

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
