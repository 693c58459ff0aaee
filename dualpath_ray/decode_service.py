"""A decode engine as a service: it orchestrates a request from assignment to last token. One per GPU; no Ray here.

    arm (lease the whole prompt's slots on this node's gateway) -> have hit blocks read, here or on another node -> have the rest
    computed -> first token -> pool blocks -> KV from staging to pool -> continuous batch -> tokens; completed blocks to storage

Everything a request holds is released on every way out: end, error, cancel. Whoever is told to release asks the writers first.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dualpath_ray.arming import Arming
from dualpath_ray.background import Background
from dualpath_ray.decode_calls import Directory
from dualpath_ray.decode_flow import Flow
from dualpath_ray.decode_loop import DecodeLoop, LoopStats
from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence, StepOutput
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.pool import BlockIds, PagedPool
from dualpath_ray.errors import CancelledError, DeadlineExceededError, DualPathError, OverloadedError, UnansweredError
from dualpath_ray.gateway import POOL
from dualpath_ray.grammars import Grammars
from dualpath_ray.hedging import HedgeSettings, Hedging
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.keys import block_keys
from dualpath_ray.messages import DecodeTask, Delivery, PersistBlock
from dualpath_ray.persister import Persister, PoolBlock
from dualpath_ray.pool_queue import PoolQueue
from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationUsage, TokenLogprobs
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.memory import dense_region

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class DecodeServiceSettings:
    max_requests: int = 256
    max_batch: int = 16
    persist: bool = True
    hedge: HedgeSettings = field(default_factory=HedgeSettings)


@dataclass(slots=True)
class DecodeStats:
    """Counters since start."""

    requests: int = 0
    queue_s: float = 0.0  # of prefilled requests, for pool blocks
    generated_tokens: int = 0
    failed_requests: int = 0
    cancelled_requests: int = 0


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
        self._grammars = Grammars(model.path, model.vocab_size, model.eos_token_ids)
        runner = DecodeRunner(model, pool, self.settings.max_batch)
        self._engine = DecodeLoop(
            engine_id,
            runner,
            lambda outputs: self._threadsafe(self._on_step, outputs),
            lambda name, error: self._threadsafe(self._fail, name, error),
        )
        device = pool.tensor.device
        region = dense_region(POOL, pool.data_ptr, pool.nbytes, geometry.layer_block_bytes, device.type, device.index or 0)
        self.endpoint = Endpoint(engine_id, (region,), endpoint_settings)
        self.persister = Persister(self.endpoint, geometry, pool.blocks)
        self._flows: dict[str, Flow] = {}
        self._pool_queue = PoolQueue(pool)
        self.hedging = Hedging(self.settings.hedge)
        self._arming = Arming(self.endpoint, geometry, directory, self.hedging)
        self._quarantine: dict[str, list[BlockIds]] = {}  # agent of a gateway -> pool blocks it may still write to
        self._background = Background(engine_id)
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.persister.start()
        self._engine.start()

    # ---- load

    @property
    def loop_stats(self) -> LoopStats:
        return self._engine.stats

    @property
    def decoding_requests(self) -> int:
        """Requests in the batch, or waiting for room in it; the others are being prefilled or handed over."""
        return len(self._engine)

    @property
    def unfinished_requests(self) -> int:
        return len(self._flows)

    def phases(self) -> Counter[str]:
        """Requests in each phase (`Flow.phase`)."""
        return Counter(flow.phase for flow in self._flows.values())

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
        flow = Flow(task, FinishRule.for_request(request, self.model.max_context), now, now + request.timeout)
        self._flows[flow.name] = flow
        try:
            first = await self._unless_cancelled(flow, self._arming.prefill(flow))
            flow.tokens.append(first.token)
            yield GenerationDelta((first.token,), usage=flow.usage(self.geometry.block_tokens), logprobs=_told(first.logprobs))
            reason = flow.rule.reason(first.token, 1)
            await self._unless_cancelled(flow, self._take_over(flow, reason))
            if reason is not None:
                yield GenerationDelta((), reason, flow.usage(self.geometry.block_tokens))
                return
            joined = time.monotonic()
            try:
                async for delta in self._stream(flow):
                    yield delta
            finally:
                tracing.record("decode", request.trace, joined, time.monotonic(), engine=self.engine_id, tokens=len(flow.tokens))
        except (CancelledError, GeneratorExit, asyncio.CancelledError):
            self.stats.cancelled_requests += 1
            raise
        except DualPathError:
            self.stats.failed_requests += 1
            raise
        finally:
            # In the background: the client need not wait for it, and nothing can cancel it.
            self._background.spawn(self._clean_up(flow))

    def cancel(self, request_id: str, epoch: int) -> None:
        """Give up a request (all attempts up to `epoch`). Returns at once."""
        flow = self._flows.get(request_id)
        if flow is not None and flow.task.route.epoch <= epoch:
            flow.cancelled.set()
            flow.events.put_nowait(CancelledError(f"request {request_id} was cancelled"))

    async def _unless_cancelled(self, flow: Flow, work: Coroutine[None, None, T]) -> T:
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

    # ---- prompt KV into the pool, then decode

    async def _take_over(self, flow: Flow, reason: FinishReason | None) -> None:
        """Take the prompt's KV over from staging, once it is complete, and join the batch unless the request has ended already."""
        request, route = flow.task.request, flow.task.route
        tokens = len(request.tokens)
        into_pool: BlockIds = np.empty(0, dtype=np.int32)
        if reason is None:
            with tracing.span("decode.allocate", request.trace, engine=self.engine_id):
                wanted = self.geometry.blocks_for(tokens + flow.rule.max_new_tokens - 1)
                asked_at = time.monotonic()
                flow.pool_blocks = await self._pool_queue.allocate(wanted, flow.time_left())
                self.stats.queue_s += time.monotonic() - asked_at
            into_pool = flow.pool_blocks[: self.geometry.blocks_for(tokens)]
        keys, root = flow.task.keys, flow.task.root
        persist = tuple(
            PersistBlock(block, keys[block], keys[block - 1] if block else root)
            for block in range(max(route.hit_blocks, route.stored_blocks), tokens // self.geometry.block_tokens)
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
        flow.note_read(route.decode_node, local)
        for node_id, outcome in zip(forwards, remote, strict=True):
            flow.note_read(node_id, outcome)
        if reason is None:
            assert flow.pool_blocks is not None
            rules = None if request.sampling.plain else await self._rules(flow)
            sequence = DecodeSequence(flow.name, tokens, flow.tokens[0], flow.pool_blocks, request.sampling, flow.rule, rules)
            flow.running = True
            self._engine.admit(sequence)

    async def _rules(self, flow: Flow) -> LogitRules:
        """As they stand after the first token, whichever process drew it. In a thread, because a large grammar takes a while."""
        request = flow.task.request
        split = len(request.tokens) - request.resumed_tokens
        generated = (*request.tokens[split:], *flow.tokens)
        return await asyncio.to_thread(
            LogitRules.of, request.sampling, request.tokens[:split], generated, self.model.vocab_size, self._grammars
        )

    async def _stream(self, flow: Flow) -> AsyncIterator[GenerationDelta]:
        """Hand on tokens as they come, several at once when they came faster than they were taken. The first have the usage: the prompt's
        reads have ended only now."""
        usage: GenerationUsage | None = flow.usage(self.geometry.block_tokens)
        while True:
            try:
                async with asyncio.timeout(flow.time_left()):
                    events = [await flow.events.get()]
            except TimeoutError:
                raise DeadlineExceededError(f"request {flow.name} was not finished in time") from None
            while not flow.events.empty():
                events.append(flow.events.get_nowait())
            tokens: list[int] = []
            logprobs: list[TokenLogprobs] = []
            for event in events:
                if isinstance(event, DualPathError):
                    raise event
                tokens.append(event.token)
                if event.logprobs is not None:
                    logprobs.append(event.logprobs)
                if event.finish_reason is not None:
                    flow.running = False
                    yield GenerationDelta(tuple(tokens), event.finish_reason, flow.usage(self.geometry.block_tokens), tuple(logprobs))
                    return
            yield GenerationDelta(tuple(tokens), usage=usage, logprobs=tuple(logprobs))
            usage = None

    # ---- from the engine's thread

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

    def _persist(self, flow: Flow, kv_tokens: int) -> None:
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

    async def _clean_up(self, flow: Flow) -> None:
        """Give back everything the request still holds."""
        route = flow.task.route
        try:
            if flow.running:
                await asyncio.wrap_future(self._engine.remove(flow.name))
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
                    self._pool_queue.release(flow.pool_blocks)
        finally:
            self._flows.pop(flow.name, None)
            self.stats.requests += 1

    async def _end_delivery(self, flow: Flow) -> bool:
        """Wait until a delivery under way has ended. True if that is not known: the gateway may still write to the pool blocks."""
        if flow.delivery is None:
            return False
        try:
            await flow.delivery
            flow.lease = None
        except UnansweredError:
            route = flow.task.route
            return not self.endpoint.is_dead(route.peers[route.decode_node].agent)
        except DualPathError:
            pass
        return False

    # ---- housekeeping

    def peer_died(self, agent: str) -> None:
        """A process is known to be dead: nothing of its is under way."""
        self.endpoint.forget(agent)
        for blocks in self._quarantine.pop(agent, []):
            self._pool_queue.release(blocks)

    @property
    def idle(self) -> bool:
        return not self._flows and not self._background and self._arming.idle and self.persister.idle

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
        await asyncio.to_thread(self._engine.stop)
        await asyncio.to_thread(self.endpoint.close)

    def _threadsafe(self, function: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            log.debug("decode engine %s: the loop is closed", self.engine_id)


def _told(logprobs: TokenLogprobs | None) -> tuple[TokenLogprobs, ...]:
    return () if logprobs is None else (logprobs,)
