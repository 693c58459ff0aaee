"""A prefill engine as a service: queue, batches, layer streams in, new KV out. One per GPU; no Ray here.

Requests wait until the first layers of their hit KV can be had, so that a slow storage read never holds up a forward batch; a batch
is then formed first come first served under the compute quota, and its layers stream through the window while it is computed. The
next batch is put behind it in the window's ring as soon as the running one needs no more of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dualpath_ray.background import Background
from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.prefill import PrefillChunk, PrefillRunner
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.errors import (
    CancelledError,
    ConfigError,
    DeadlineExceededError,
    DualPathError,
    InvalidRequestError,
    OverloadedError,
    StaleEpochError,
)
from dualpath_ray.gateway import WINDOW
from dualpath_ray.grammars import Grammars
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import REGION as STAGING
from dualpath_ray.messages import PrefillOutcome, PrefillTask
from dualpath_ray.prefill_batch import PrefillBatch, PrefillJob, PrefillStats, WholeBatchGate, WindowGate
from dualpath_ray.prefill_cost import PrefillCost
from dualpath_ray.requests import Drawn
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.feeds import ChunkFeed, HitSource, NewKV
from dualpath_ray.transfer.memory import dense_region
from dualpath_ray.transfer.sink import REFRESH_S, LayerSink

log = logging.getLogger(__name__)

BatchPolicy = Callable[[Sequence[tuple[int, int]]], list[int]]
"""(cached, new) token counts of the waiting requests in order -> new tokens to compute of each, from the head; later ones wait."""

MAX_ATTEMPTS = 3
CRAMPED_TOKENS = 1 << 40


@dataclass(frozen=True, slots=True)
class PrefillServiceSettings:
    max_requests: int = 64
    batch_timeout_s: float = 60.0  # a batch whose hit KV does not come within this time is given up
    layerwise: bool = True  # False: the window holds all layers; see WholeBatchGate


class PrefillService:
    """See the module's docstring. Every method must be called on the event loop that `start` was awaited on."""

    def __init__(
        self,
        engine_id: str,
        model: CausalModel,
        geometry: KVGeometry,
        window: LayerWindow,
        plan_batch: BatchPolicy,
        settings: PrefillServiceSettings | None = None,
        endpoint_settings: EndpointSettings | None = None,
    ) -> None:
        self.engine_id, self.geometry = engine_id, geometry
        self.settings = settings or PrefillServiceSettings()
        if not self.settings.layerwise and window.layers_resident < geometry.layers:
            raise ConfigError(f"without layerwise prefill the window must hold all {geometry.layers} layers, not {window.layers_resident}")
        self._gate_of = WindowGate if self.settings.layerwise else WholeBatchGate
        self.stats, self.cost = PrefillStats(), PrefillCost()
        self._model, self._window, self._plan_batch = model, window, plan_batch
        self._runner = PrefillRunner(model)
        self._grammars = Grammars(model.path, model.vocab_size, model.eos_token_ids)
        self.capacity_blocks = window.capacity_tokens // geometry.block_tokens
        device = window.tensor.device
        region = dense_region(WINDOW, window.data_ptr, window.nbytes, geometry.layer_block_bytes, device.type, device.index or 0)
        self.endpoint = Endpoint(engine_id, (region,), endpoint_settings)
        self.sink = LayerSink(self.endpoint, WINDOW, STAGING, geometry.layers, window.layers_resident, self.capacity_blocks)
        self._engine = ThreadPoolExecutor(1, thread_name_prefix="prefill")
        self._jobs: list[PrefillJob] = []
        self._in_batch: set[PrefillJob] = set()
        self._changed = asyncio.Event()
        self._background = Background(f"prefill engine {engine_id}")
        self._batches: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.sink.on_rows_freed = lambda: self._threadsafe(self._changed.set)
        self._background.spawn(self._plan())
        self._background.spawn(self._refresh())

    # ---- requests

    @property
    def unfinished_requests(self) -> int:
        return len(self._jobs)

    @property
    def unfinished_tokens(self) -> int:
        """Prompt tokens of the unfinished requests that are not computed yet, hits included (paper section 5.1, tok_e).

        More than any engine could have while the window is cramped: nothing new shall come here.
        """
        if self._cramped:
            return CRAMPED_TOKENS
        return sum(len(job.task.tokens) - job.computed for job in self._jobs)

    @property
    def _cramped(self) -> bool:
        """A lost gateway may still write to so much of the window that other engines serve new requests better."""
        return 2 * _longest(self.sink.free_rows()) < self.capacity_blocks

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        """Compute a prompt. When this returns, all its new KV is in the decode node's staging, and the gateway has been told so.

        The same holds, as far as it got, when it raises: no byte of this request is under way then.
        """
        if task.engine not in ("", self.endpoint.agent_name):
            raise StaleEpochError(f"prefill engine {self.engine_id} has been restarted since the request was assigned")
        if self._cramped:
            raise OverloadedError(f"the window of prefill engine {self.engine_id} waits for a lost gateway's last writes")
        if len(self._jobs) >= self.settings.max_requests:
            raise OverloadedError(
                f"prefill engine {self.engine_id} holds {len(self._jobs)} requests, the most that prefill.max_requests allows"
            )
        if len(task.tokens) > self._window.capacity_tokens:
            raise InvalidRequestError(
                f"a prompt of {len(task.tokens)} tokens does not fit the window of {self._window.capacity_tokens} tokens"
            )
        # Checked here, because in a batch one such request would fail the others.
        if task.tokens.min() < 0 or task.tokens.max() >= self._model.vocab_size:
            raise InvalidRequestError(f"request {task.request_id}: token ids must lie in [0, {self._model.vocab_size})")
        for peer in (task.gateway, *task.peers):
            self.endpoint.connect(peer)
        now = time.monotonic()
        job = PrefillJob(task, self._loop.create_future(), self._open_feed(task, 0), now, now + task.timeout_s)
        self._jobs.append(job)
        self._watch(job)
        try:
            async with asyncio.timeout(task.timeout_s):
                if not job.prepared:
                    await self._prepare(job)
                return await asyncio.shield(job.outcome)
        except TimeoutError:
            raise DeadlineExceededError(f"prefill of {task.request_id} did not end within {task.timeout_s:.1f} s") from None
        finally:
            if not job.outcome.done():
                self._cancel(job)
                await asyncio.wait([job.outcome])
                job.outcome.exception()

    async def _prepare(self, job: PrefillJob) -> None:
        """The rules of the first token. In a thread, because a large grammar takes a while to compile."""
        task = job.task
        tokens = task.tokens.tolist()
        prompt, generated = tokens[: len(tokens) - task.resumed_tokens], tokens[len(tokens) - task.resumed_tokens :]
        try:
            job.rules = await asyncio.to_thread(LogitRules.of, task.sampling, prompt, generated, self._model.vocab_size, self._grammars)
        except DualPathError as error:
            self._end(job, error)
        job.prepared = True
        self._changed.set()

    async def cancel(self, request_id: str, epoch: int) -> None:
        """Give up a request. Returns at once; its `prefill` call raises when nothing of it is under way."""
        for job in self._jobs:
            if job.task.request_id == request_id and job.task.epoch <= epoch:
                self._cancel(job)

    def give_back(self, request_id: str, epoch: int) -> bool:
        """Give up an attempt that has not begun, so that it can be placed on another engine. False if it has, or is not here."""
        for job in self._jobs:
            if (job.task.request_id, job.task.epoch) == (request_id, epoch) and not job.started:
                self._end(job, StaleEpochError(f"request {request_id} was taken back from {self.engine_id}, which fell behind"))
                return True
        return False

    def _cancel(self, job: PrefillJob) -> None:
        job.cancelled = True
        error = CancelledError(f"prefill of {job.task.request_id} was cancelled")
        if job not in self._in_batch:
            self._end(job, error)
        else:
            self.sink.give_up(job.feed, error)

    def peer_lost(self, agent: str) -> None:
        """A gateway cannot be had any more, but may still write (see `LayerSink.source_lost`)."""
        self.sink.source_lost(agent)

    def peer_died(self, agent: str) -> None:
        """A process is known to be dead: nothing of its is under way."""
        self.sink.source_died(agent)
        self.endpoint.forget(agent)

    def _open_feed(self, task: PrefillTask, computed: int) -> ChunkFeed:
        """Streams for the KV before the next chunk: the hits from where they were read, earlier chunks from the decode node."""
        hit_blocks, done_blocks = task.cached_tokens // self.geometry.block_tokens, computed // self.geometry.block_tokens
        sources = list(task.sources)
        if done_blocks:
            positions = tuple(range(hit_blocks, hit_blocks + done_blocks))
            sources.append(HitSource(task.gateway.agent, task.lease_id, positions, positions))
        first = hit_blocks + done_blocks
        return self.sink.open(sources, NewKV(task.gateway.agent, task.lease_id, task.slots[first:], first))

    def _watch(self, job: PrefillJob) -> None:
        def notice(_: Future[None]) -> None:
            job.ready_at = job.ready_at or time.monotonic()
            self._threadsafe(self._changed.set)

        job.feed.ready.add_done_callback(notice)

    # ---- batches

    async def _plan(self) -> None:
        """Form a batch whenever requests are ready and the window's ring has room behind the running batch."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._drop_failed()
            batch = self._form_batch()
            if batch is None:
                continue
            task = self._loop.create_task(self._run(batch))
            self._batches.add(task)
            task.add_done_callback(self._batches.discard)
            await asyncio.wait([task, asyncio.wrap_future(batch.gate.ring_free, loop=self._loop)], return_when=asyncio.FIRST_COMPLETED)
            if len(self._batches) > 1:
                await asyncio.wait(set(self._batches), return_when=asyncio.FIRST_COMPLETED)
            self._changed.set()

    async def _refresh(self) -> None:
        while True:
            await asyncio.sleep(REFRESH_S / 2)
            self.sink.refresh()

    def _drop_failed(self) -> None:
        for job in [job for job in self._jobs if job not in self._in_batch and job.feed.ready.done()]:
            error = job.feed.ready.exception()
            if error is not None:
                self._end(job, error if isinstance(error, DualPathError) else CancelledError(str(error)))

    def _form_batch(self) -> PrefillBatch | None:
        ready = [job for job in self._jobs if job.prepared and job not in self._in_batch and job.feed.ready.done()]
        runs = self.sink.free_rows()
        longest = _longest(runs)  # who needs more waits for rows that a lost gateway may still write to
        ready = [job for job in ready if self.geometry.blocks_for(len(job.task.tokens)) <= longest]
        if not ready:
            return None
        sizes = self._plan_batch([(job.cached, job.left) for job in ready])
        jobs: list[PrefillJob] = []
        chunks: list[PrefillChunk] = []
        first_rows: list[int] = []
        for job, size in zip(ready, sizes, strict=False):
            blocks = self.geometry.blocks_for(job.cached + size)
            run = next((index for index, run in enumerate(runs) if len(run) >= blocks), None)
            if run is None:
                break
            row, runs[run] = runs[run].start, runs[run][blocks:]
            task, start, first = job.task, job.cached, job.cached // self.geometry.block_tokens
            last = size == job.left
            job.feed.new_kv = NewKV(task.gateway.agent, task.lease_id, task.slots[first:blocks], first)
            chunks.append(
                PrefillChunk(
                    task.request_id,
                    task.tokens[start : start + size],
                    start,
                    row * self.geometry.block_tokens,
                    task.sampling if last else None,
                    task.masked_token_ids,
                    job.rules,
                )
            )
            jobs.append(job)
            first_rows.append(row)
        now = time.monotonic()
        for job in jobs:
            job.started = job.started or now
            job.attempts += 1
        self._in_batch.update(jobs)
        gate = self.sink.start_batch([job.feed for job in jobs], first_rows, self.settings.batch_timeout_s)
        return PrefillBatch(jobs, chunks, gate)

    async def _run(self, batch: PrefillBatch) -> None:
        start = time.monotonic()
        error: DualPathError | None = None
        tokens: list[Drawn | None] = []
        try:
            tokens = await self._loop.run_in_executor(self._engine, self._runner.run, batch.chunks, self._gate_of(batch.gate, self._window))
        except DualPathError as raised:
            error = raised
        except Exception as raised:
            log.exception("prefill engine %s: a batch failed", self.engine_id)
            error = DualPathError(f"prefill failed: {raised}")
        await asyncio.wrap_future(batch.gate.finish(error), loop=self._loop)
        batch.count(self.stats, self.geometry, time.monotonic() - start)
        if error is None:
            self.cost.add(*batch.cost())
        for index, job in enumerate(batch.jobs):
            self._in_batch.discard(job)
            self._settle(job, batch.chunks[index], error, tokens[index] if tokens else None, sum(batch.gate.times.waited))
        batch.trace(self.engine_id)
        self._changed.set()

    def _settle(self, job: PrefillJob, chunk: PrefillChunk, error: DualPathError | None, first: Drawn | None, waited_s: float) -> None:
        """Decide what becomes of a request after its batch has ended."""
        job.waited_s += waited_s
        if job.cancelled:
            self._end(job, CancelledError(f"prefill of {job.task.request_id} was cancelled"))
        elif job.feed.error is not None:
            self._end(job, job.feed.error)
        elif error is not None and (
            job.attempts >= MAX_ATTEMPTS or time.monotonic() > job.deadline or isinstance(error, InvalidRequestError)
        ):
            self._end(job, error)
        elif error is not None:  # another request of the batch was at fault, or was given up while the batch waited for it
            job.attempts -= isinstance(error, CancelledError)
            self._reopen(job)
        elif first is None:
            job.computed += len(chunk.tokens)
            job.attempts = 0
            self._reopen(job)
        else:
            now = time.monotonic()
            tracing.record("prefill.queue", job.task.trace, job.arrived, job.started, engine=self.engine_id)
            self._finish_writes(job, None)
            self._jobs.remove(job)
            self.stats.requests += 1
            queued_s = job.started - job.arrived
            awaited_s = min(queued_s, job.ready_at - job.arrived)
            self.stats.queue_s += queued_s - awaited_s
            outcome = PrefillOutcome(first, queued_s, now - job.started, job.waited_s, awaited_s, self.stats.peak_window_bytes)
            job.outcome.set_result(outcome)

    def _reopen(self, job: PrefillJob) -> None:
        job.feed = self._open_feed(job.task, job.computed)
        self._watch(job)

    def _end(self, job: PrefillJob, error: DualPathError) -> None:
        if job.outcome.done():
            return
        self.sink.close(job.feed)
        self._finish_writes(job, str(error))
        self._jobs.remove(job)
        job.outcome.set_exception(error)

    def _finish_writes(self, job: PrefillJob, error: str | None) -> None:
        self.endpoint.finish_writes(job.task.gateway.agent, job.task.lease_id, error)

    # ---- housekeeping

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._batches and self.sink.idle

    def check_integrity(self) -> None:
        self.sink.check_integrity()

    async def close(self) -> None:
        await self._background.close()
        for job in list(self._jobs):
            self._cancel(job)
        await asyncio.to_thread(self.endpoint.close)
        self._engine.shutdown(wait=False, cancel_futures=True)

    def _threadsafe(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:
            log.debug("prefill engine %s: the loop is closed", self.engine_id)


def _longest(runs: Sequence[range]) -> int:
    """Rows of the window that lie together and may be used, in blocks: all, unless a lost gateway may still write to some."""
    return max(map(len, runs), default=0)
