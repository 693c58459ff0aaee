"""A decode engine as a service: it orchestrates a request from assignment to last token. One per GPU; no Ray here.

    arm (lease the whole prompt's slots on this node's gateway) -> have hit blocks read, here or on another node -> have the rest
    computed -> first token -> pool blocks -> KV from staging to pool -> continuous batch -> tokens; completed blocks to storage

Everything a request holds is released on every way out: end, error, cancel. Whoever is told to release asks the writers first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np

from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence, StepOutput
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.pool import BlockIds, PagedPool
from dualpath_ray.errors import CancelledError, DeadlineExceededError, DualPathError, OverloadedError, TransferError
from dualpath_ray.gateway import POOL
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.keys import block_keys
from dualpath_ray.messages import (
    BlockLoad,
    DecodeTask,
    Delivery,
    Forward,
    LeaseGrant,
    LeaseRequest,
    LoadOutcome,
    PersistBlock,
    PrefillOutcome,
    PrefillTask,
    ReadPart,
)
from dualpath_ray.persister import Persister, PoolBlock
from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationUsage
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint, EndpointSettings
from dualpath_ray.transfer.memory import PeerInfo, Region
from dualpath_ray.transfer.sink import HitSource

log = logging.getLogger(__name__)
T = TypeVar("T")


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


@dataclass(frozen=True, slots=True)
class DecodeServiceSettings:
    max_requests: int = 256
    max_batch: int = 16
    persist: bool = True


@dataclass(slots=True)
class DecodeStats:
    """Counters since start."""

    requests: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    failed_requests: int = 0
    cancelled_requests: int = 0


@dataclass(slots=True, eq=False)
class _Flow:
    """One request's way through the engine, and everything it holds."""

    task: DecodeTask
    rule: FinishRule
    started: float
    deadline: float
    events: asyncio.Queue[StepOutput | DualPathError] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)  # generated ones
    lease: LeaseGrant | None = None  # on this node's gateway, until delivered
    remote_leases: dict[str, int] = field(default_factory=dict)  # node -> lease on another gateway
    prefilling: bool = False
    pool_blocks: BlockIds | None = None
    running: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    read_bytes: dict[str, int] = field(default_factory=dict)
    read_s: float = 0.0
    prefill: PrefillOutcome | None = None
    delivery: asyncio.Future[LoadOutcome] | None = None
    keys: list[bytes] = field(default_factory=list)  # root, then the keys of the complete blocks so far

    @property
    def name(self) -> str:
        return self.task.request.request_id

    def time_left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())


class DecodeService:
    """See the module's docstring. Every method must be called on the event loop that `start` was awaited on."""

    def __init__(
        self,
        engine_id: str,
        model: CausalModel,
        geometry: KVGeometry,
        pool: PagedPool,
        directory: Directory,
        settings: DecodeServiceSettings | None = None,
        endpoint_settings: EndpointSettings | None = None,
    ) -> None:
        self.engine_id, self.geometry, self.model = engine_id, geometry, model
        self.settings = settings or DecodeServiceSettings()
        self.stats = DecodeStats()
        self._pool, self._directory = pool, directory
        self._runner = DecodeRunner(model, pool, self.settings.max_batch)
        device = pool.tensor.device
        region = Region(
            POOL,
            pool.data_ptr,
            geometry.layer_block_bytes,
            geometry.layers * pool.blocks,
            pool.nbytes,
            kind="VRAM" if device.type == "cuda" else "DRAM",
            device=device.index or 0,
        )
        self.endpoint = Endpoint(engine_id, (region,), endpoint_settings)
        self.persister = Persister(self.endpoint, geometry, pool.blocks)
        self._flows: dict[str, _Flow] = {}
        self._pool_waiters: deque[tuple[int, asyncio.Future[BlockIds]]] = deque()
        self._quarantine: dict[str, list[BlockIds]] = {}  # agent of a gateway -> pool blocks it may still write to
        self._tasks: set[asyncio.Task[None]] = set()
        self._admissions: deque[DecodeSequence] = deque()  # the engine thread's
        self._commands: deque[Callable[[], None]] = deque()
        self._work = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._decode, name=f"decode-{engine_id}", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.persister.start()
        self._thread.start()

    # ---- load

    @property
    def unfinished_requests(self) -> int:
        return len(self._flows)

    @property
    def unfinished_tokens(self) -> int:
        return sum(len(flow.task.request.tokens) + flow.rule.max_new_tokens for flow in self._flows.values())

    @property
    def free_tokens(self) -> int:
        return self._pool.free_blocks * self.geometry.block_tokens

    @property
    def pool_tokens(self) -> int:
        return self._pool.blocks * self.geometry.block_tokens

    # ---- one request

    async def generate(self, task: DecodeTask) -> AsyncGenerator[GenerationDelta, None]:
        """Serve one attempt of a request. Closing the iterator cancels it. Raises DualPathError; retryable ones may be tried again."""
        request = task.request
        if len(self._flows) >= self.settings.max_requests:
            raise OverloadedError(
                f"decode engine {self.engine_id} holds {len(self._flows)} requests, the most that decode.max_requests allows"
            )
        if request.request_id in self._flows:
            raise OverloadedError(f"an earlier attempt of request {request.request_id} is still being cleaned up")
        now = time.monotonic()
        flow = _Flow(task, FinishRule.for_request(request, self.model.max_context), now, now + request.timeout)
        self._flows[flow.name] = flow
        try:
            first = await self._unless_cancelled(flow, self._prefill(flow))
            flow.tokens.append(first)
            yield GenerationDelta((first,))
            reason = flow.rule.reason(first, 1)
            await self._unless_cancelled(flow, self._take_over(flow, reason))
            if reason is not None:
                yield GenerationDelta((), reason, self._usage(flow))
                return
            joined = time.monotonic()
            async for delta in self._stream(flow):
                if delta.finish_reason is not None:
                    tracing.record("decode", request.trace, joined, time.monotonic(), engine=self.engine_id, tokens=len(flow.tokens))
                yield delta
        except (CancelledError, GeneratorExit, asyncio.CancelledError):
            self.stats.cancelled_requests += 1
            raise
        except DualPathError:
            self.stats.failed_requests += 1
            raise
        finally:
            # In the background: the client need not wait for it, and nothing can cancel it.
            self._spawn(self._clean_up(flow))

    def cancel(self, request_id: str, epoch: int) -> None:
        """Give up a request (all attempts up to `epoch`). Returns at once."""
        flow = self._flows.get(request_id)
        if flow is not None and flow.task.route.epoch <= epoch:
            flow.cancelled.set()
            flow.events.put_nowait(CancelledError(f"request {request_id} was cancelled"))

    async def _unless_cancelled(self, flow: _Flow, work: Coroutine[None, None, T]) -> T:
        """Do `work`, but stop it when the request is cancelled."""
        task = asyncio.ensure_future(work)
        cancelled = asyncio.ensure_future(flow.cancelled.wait())
        try:
            await asyncio.wait([task, cancelled], return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise CancelledError(f"request {flow.name} was cancelled")
            return task.result()
        finally:
            cancelled.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])

    # ---- prefill

    async def _prefill(self, flow: _Flow) -> int:
        """Arm this node, have the hits read and the rest computed. Returns the first token."""
        request, route = flow.task.request, flow.task.route
        prefill_peer, gateway_peer = route.peers[route.prefill_engine], route.peers[route.decode_node]
        self.endpoint.connect(gateway_peer)
        readers = {part.node_id: route.peers[part.node_id] for part in route.reads if part.node_id != route.decode_node}
        local = LeaseRequest(
            request.request_id,
            self.endpoint.agent_name,
            self.geometry.blocks_for(len(request.tokens)),
            tuple(
                load
                for part in route.reads
                if part.node_id == route.decode_node
                for load in self._loads(flow, part.first_block, part.blocks, 0)
            ),
            frozenset([prefill_peer.agent, *(peer.agent for peer in readers.values())]),
            (prefill_peer, *readers.values(), self.endpoint.info),
            timeout_s=flow.time_left(),
            trace=request.trace,
        )
        with tracing.span("decode.arm", request.trace, engine=self.engine_id, blocks=local.blocks):
            grant = flow.lease = await self._lease(route.decode_node, local)
            _check_incarnation(grant, gateway_peer)
            # The decode node's slots always come first, so that no request waits for them while it holds slots of another node.
            for node_id in sorted(readers):
                await self._lease_remote(flow, grant, node_id)
        sources = tuple(
            HitSource(route.peers[part.node_id].agent, lease, positions, part.first_block)
            for part, lease, positions in self._placed(flow, grant)
        )
        prefill = PrefillTask(
            request.request_id,
            route.epoch,
            np.array(request.tokens, dtype=np.int32),
            route.hit_blocks * self.geometry.block_tokens,
            sources,
            gateway_peer,
            grant.lease_id,
            grant.slots,
            tuple(readers.values()),
            request.sampling,
            flow.rule.forbidden(0),
            flow.time_left(),
            request.trace,
        )
        flow.prefilling = True
        with tracing.span("prefill", request.trace, engine=route.prefill_engine, cached_tokens=prefill.cached_tokens):
            flow.prefill = await self._directory.prefill(route.prefill_engine).prefill(prefill)
        flow.prefilling = False
        return flow.prefill.token

    def _loads(self, flow: _Flow, first: int, blocks: int, position_offset: int) -> list[BlockLoad]:
        keys, root = flow.task.keys, flow.task.root
        return [
            BlockLoad(block - position_offset, keys[block], keys[block - 1] if block else root) for block in range(first, first + blocks)
        ]

    def _parts_by_node(self, flow: _Flow, node_id: str) -> list[tuple[int, int]]:
        return [(part.first_block, part.blocks) for part in flow.task.route.reads if part.node_id == node_id]

    async def _lease_remote(self, flow: _Flow, grant: LeaseGrant, node_id: str) -> None:
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
            self.endpoint.agent_name,
            len(loads),
            tuple(loads),
            peers=(route.peers[route.prefill_engine], forward.peer, self.endpoint.info),
            forward=forward,
            timeout_s=flow.time_left(),
            trace=request.trace,
        )
        remote = await self._lease(node_id, wanted)
        flow.remote_leases[node_id] = remote.lease_id
        _check_incarnation(remote, route.peers[node_id])

    def _placed(self, flow: _Flow, grant: LeaseGrant) -> list[tuple[ReadPart, int, tuple[int, ...]]]:
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
            self._spawn(self._give_back(gateway, wanted.request_id, asked))
            raise

    async def _give_back(self, gateway: GatewayCalls, request_id: str, asked: asyncio.Future[LeaseGrant]) -> None:
        with contextlib.suppress(DualPathError):
            await gateway.withdraw(request_id)
            await gateway.release((await asked).lease_id)

    # ---- prompt KV into the pool, then decode

    async def _take_over(self, flow: _Flow, reason: FinishReason | None) -> None:
        """Take the prompt's KV over from staging, once it is complete, and join the batch unless the request has ended already."""
        request, route = flow.task.request, flow.task.route
        tokens = len(request.tokens)
        into_pool: BlockIds = np.empty(0, dtype=np.int32)
        if reason is None:
            with tracing.span("decode.allocate", request.trace, engine=self.engine_id):
                flow.pool_blocks = await self._allocate(self.geometry.blocks_for(tokens + flow.rule.max_new_tokens - 1), flow)
            into_pool = flow.pool_blocks[: self.geometry.blocks_for(tokens)]
        keys, root = flow.task.keys, flow.task.root
        persist = tuple(
            PersistBlock(block, keys[block], keys[block - 1] if block else root)
            for block in range(route.hit_blocks, tokens // self.geometry.block_tokens)
            if self.settings.persist
        )
        assert flow.lease is not None
        delivery = Delivery(flow.lease.lease_id, self.endpoint.info, into_pool, persist, flow.time_left(), request.trace)
        flow.delivery = asyncio.ensure_future(self._directory.gateway(route.decode_node).deliver(delivery))
        forwards = {
            node_id: asyncio.ensure_future(self._directory.gateway(node_id).complete(lease, flow.time_left()))
            for node_id, lease in flow.remote_leases.items()
        }
        local, *remote = await asyncio.gather(asyncio.shield(flow.delivery), *forwards.values())
        flow.lease, flow.delivery = None, None
        flow.remote_leases.clear()
        self._note_read(flow, route.decode_node, local)
        for node_id, outcome in zip(forwards, remote, strict=True):
            self._note_read(flow, node_id, outcome)
        if reason is None:
            assert flow.pool_blocks is not None
            sequence = DecodeSequence(flow.name, tokens, flow.tokens[0], flow.pool_blocks, request.sampling, flow.rule)
            flow.running = True
            self._command(lambda: self._admissions.append(sequence))

    def _note_read(self, flow: _Flow, node_id: str, outcome: LoadOutcome) -> None:
        route = flow.task.route
        side = "decode_node" if node_id == route.decode_node else "prefill_node" if node_id == route.prefill_node else "other_nodes"
        flow.read_bytes[side] = flow.read_bytes.get(side, 0) + outcome.read_bytes
        flow.read_s = max(flow.read_s, outcome.read_s)

    async def _allocate(self, blocks: int, flow: _Flow) -> BlockIds:
        """Pool blocks, in order of asking."""
        if not self._pool_waiters and self._pool.free_blocks >= blocks:
            return self._pool.allocate(blocks)
        turn: asyncio.Future[BlockIds] = self._loop.create_future()
        self._pool_waiters.append((blocks, turn))
        try:
            return await asyncio.wait_for(asyncio.shield(turn), flow.time_left())
        except TimeoutError:
            raise DeadlineExceededError(f"decode engine {self.engine_id}: no {blocks} KV blocks came free in time") from None
        finally:
            if (blocks, turn) in self._pool_waiters:
                self._pool_waiters.remove((blocks, turn))
            elif turn.done() and flow.pool_blocks is None:
                flow.pool_blocks = turn.result()  # granted while we were being cancelled: the clean-up gives them back

    def _free_pool_blocks(self, blocks: BlockIds) -> None:
        self._pool.release(blocks)
        while self._pool_waiters and self._pool.free_blocks >= self._pool_waiters[0][0]:
            wanted, turn = self._pool_waiters.popleft()
            turn.set_result(self._pool.allocate(wanted))

    async def _stream(self, flow: _Flow) -> AsyncIterator[GenerationDelta]:
        """Hand on tokens as they come, several at once when they came faster than they were taken."""
        while True:
            try:
                events = [await asyncio.wait_for(flow.events.get(), flow.time_left())]
            except TimeoutError:
                raise DeadlineExceededError(f"request {flow.name} was not finished in time") from None
            while not flow.events.empty():
                events.append(flow.events.get_nowait())
            tokens: list[int] = []
            for event in events:
                if isinstance(event, DualPathError):
                    raise event
                tokens.append(event.token)
                if event.finish_reason is not None:
                    flow.running = False
                    yield GenerationDelta(tuple(tokens), event.finish_reason, self._usage(flow))
                    return
            yield GenerationDelta(tuple(tokens))

    def _usage(self, flow: _Flow) -> GenerationUsage:
        route, prompt = flow.task.route, len(flow.task.request.tokens)
        cached = route.hit_blocks * self.geometry.block_tokens
        return GenerationUsage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            computed_tokens=prompt - cached,
            completion_tokens=len(flow.tokens),
            read_bytes=dict(flow.read_bytes),
            attempts=route.epoch + 1,
            prefill_engine=route.prefill_engine,
            decode_engine=route.decode_engine,
            queue_s=route.queued_s + (flow.prefill.queued_s if flow.prefill else 0.0),
            read_s=flow.read_s,
            prefill_s=flow.prefill.computed_s if flow.prefill else 0.0,
        )

    # ---- the engine's thread

    def _command(self, command: Callable[[], None]) -> None:
        with self._work:
            self._commands.append(command)
            self._work.notify()

    def _decode(self) -> None:
        """Step as long as anything runs; between steps, admit and remove."""
        while True:
            with self._work:
                while not self._commands and not len(self._runner) and not self._admissions and not self._stopping:
                    self._work.wait()
                if self._stopping:
                    return
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            self._admit()
            if not len(self._runner):
                continue
            start = time.monotonic()
            try:
                outputs = self._runner.step()
            except Exception as error:
                log.exception("decode engine %s: a step failed", self.engine_id)
                self._fail_running(error)
                continue
            self.stats.steps += 1
            self.stats.step_s += time.monotonic() - start
            self._threadsafe(self._on_step, outputs)

    def _admit(self) -> None:
        while self._admissions and self._runner.can_admit():
            sequence = self._admissions.popleft()
            try:
                self._runner.admit(sequence)
            except DualPathError as error:
                self._threadsafe(self._fail, sequence.request_id, error)

    def _fail_running(self, error: Exception) -> None:
        wrapped = error if isinstance(error, DualPathError) else DualPathError(f"decoding failed: {error}")
        for name in list(self._flows):
            if self._runner.remove(name):
                self._threadsafe(self._fail, name, wrapped)

    def _remove(self, name: str, removed: Future[None]) -> None:
        self._runner.remove(name)
        self._admissions = deque(sequence for sequence in self._admissions if sequence.request_id != name)
        removed.set_result(None)

    # ---- the loop again

    def _fail(self, name: str, error: DualPathError) -> None:
        flow = self._flows.get(name)
        if flow is not None:
            flow.running = False
            flow.events.put_nowait(error)

    def _on_step(self, outputs: list[StepOutput]) -> None:
        for output in outputs:
            flow = self._flows.get(output.request_id)
            if flow is None:
                continue
            flow.tokens.append(output.token)
            self.stats.generated_tokens += 1
            flow.events.put_nowait(output)
            if self.settings.persist:
                self._persist(flow, output.kv_tokens)

    def _persist(self, flow: _Flow, kv_tokens: int) -> None:
        """Each block that has just become complete goes to storage at once (paper section 2.3)."""
        size, request = self.geometry.block_tokens, flow.task.request
        if not flow.keys:
            flow.keys = [flow.task.root, *flow.task.keys]
        while len(flow.keys) <= kv_tokens // size:
            block = len(flow.keys) - 1
            text = (*request.tokens, *flow.tokens)[block * size : (block + 1) * size]
            (key,) = block_keys(flow.keys[-1], text, size)
            flow.keys.append(key)
            assert flow.pool_blocks is not None
            route = flow.task.route
            entry = PoolBlock(flow.name, int(flow.pool_blocks[block]), key, flow.keys[-2])
            self.persister.submit(self._directory.gateway(route.decode_node), route.peers[route.decode_node], entry)

    async def _clean_up(self, flow: _Flow) -> None:
        """Give back everything the request still holds."""
        route = flow.task.route
        try:
            if flow.running:
                removed: Future[None] = Future()
                self._command(lambda: self._remove(flow.name, removed))
                await asyncio.wrap_future(removed)
            if flow.prefilling:
                with contextlib.suppress(DualPathError):
                    await self._directory.prefill(route.prefill_engine).cancel(flow.name, route.epoch)
            quarantine = await self._end_delivery(flow)
            for node_id, lease in [*flow.remote_leases.items(), *([(route.decode_node, flow.lease.lease_id)] if flow.lease else [])]:
                with contextlib.suppress(DualPathError):
                    await self._directory.gateway(node_id).release(lease)
            if flow.pool_blocks is not None:
                await self.persister.pushed(flow.name)
                if quarantine:
                    self._quarantine.setdefault(route.peers[route.decode_node].agent, []).append(flow.pool_blocks)
                else:
                    self._free_pool_blocks(flow.pool_blocks)
        finally:
            self._flows.pop(flow.name, None)
            self.stats.requests += 1

    async def _end_delivery(self, flow: _Flow) -> bool:
        """Wait until a delivery under way has ended. True if that cannot be known: the gateway may still write to the pool blocks."""
        if flow.delivery is None:
            return False
        try:
            await flow.delivery
            flow.lease = None
        except DeadlineExceededError:
            return flow.pool_blocks is not None
        except DualPathError:
            pass
        return False

    # ---- housekeeping

    def peer_died(self, agent: str) -> None:
        """A process is known to be dead: nothing of its is under way."""
        self.endpoint.forget(agent)
        for blocks in self._quarantine.pop(agent, []):
            self._free_pool_blocks(blocks)

    @property
    def idle(self) -> bool:
        return not self._flows and not self._tasks and self.persister.idle

    def check_integrity(self) -> None:
        self._pool.check_integrity()
        if self.idle and not self._quarantine and self._pool.free_blocks != self._pool.blocks:
            raise AssertionError(
                f"decode engine {self.engine_id} is idle, but {self._pool.blocks - self._pool.free_blocks} pool blocks are taken"
            )

    async def close(self) -> None:
        for flow in list(self._flows.values()):
            self.cancel(flow.name, flow.task.route.epoch)
        await self.persister.close()
        with self._work:
            self._stopping = True
            self._work.notify()
        await asyncio.to_thread(self._thread.join, 10)
        await asyncio.to_thread(self.endpoint.close)

    def _spawn(self, coroutine: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("decode engine %s: the loop is closed", self.engine_id)


def _check_incarnation(grant: LeaseGrant, expected: PeerInfo) -> None:
    """The lease must be the incarnation's that the route, and so every other process, knows."""
    if grant.agent != expected.agent:
        raise TransferError(f"{expected.engine_id} has been restarted since the request was assigned")
