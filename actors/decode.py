"""The decode engine as a Ray actor: one per GPU. It orchestrates the requests that are assigned to it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from actors.calls import RayDirectory
from actors.engine_process import ClusterProcess, Identity, device_of, endpoint_settings
from actors.messages import attempt_name
from actors.outbox import Answer, Letter, Outbox, is_last
from actors.reporter import Reporter
from dualpath_ray.background import Background
from dualpath_ray.config import Settings
from dualpath_ray.errors import CancelledError, DualPathError
from dualpath_ray.hedging import HedgeSettings
from dualpath_ray.messages import DecodeTask
from dualpath_ray.telemetry import logs
from dualpath_ray.traffic.classes import TrafficClass
from policies.vocabulary import EngineLoad

log = logging.getLogger(__name__)


class DecodeActor(ClusterProcess):
    """See `dualpath_ray.decode_service.DecodeService`; this adds registration, load reports, metrics and the way back to clients."""

    role = "decode"

    def __init__(self, settings: Settings, identity: Identity) -> None:
        super().__init__(settings, identity)
        self._outboxes: dict[str, Outbox] = {}  # by client, of those that have attempts or a stream here
        self._serving = Background(identity.engine_id)
        self._begun = 0
        self._reports: Reporter

    async def _bring_up(self) -> str:
        """Load the model, register memory, report to the scheduler."""
        import torch

        from dualpath_ray.decode_service import DecodeService, DecodeServiceSettings
        from dualpath_ray.engine.model import load_model
        from dualpath_ray.engine.pool import PagedPool

        settings, geometry = self._settings, self._facts.geometry
        if settings.model.threads is not None:
            torch.set_num_threads(settings.model.threads)
        device = device_of(settings)
        model = load_model(Path(self._identity.model_path), device, settings.model.dtype, settings.model.kv_dtype)
        blocks = settings.decode.pool_size(geometry.full_block_bytes, geometry.blocks_for(self._facts.max_context))
        self._service = DecodeService(
            self._identity.engine_id,
            model,
            geometry,
            PagedPool(geometry, blocks, device),
            RayDirectory(self._calls),
            DecodeServiceSettings(settings.decode.max_requests, settings.decode.max_batch, hedge=_hedge(settings)),
            endpoint_settings(settings, self._transports, TrafficClass.KV_READ, TrafficClass.KV_WRITE),
        )
        await self._service.start()
        self._reports = self._reporter(self._service.endpoint.info, self._attempts)
        self._reports.start()
        return self._service.endpoint.agent_name

    def _load(self) -> EngineLoad:
        service = self._service
        return EngineLoad(
            engine_id=self._identity.engine_id,
            node_id=self._identity.node_id,
            role="decode",
            unfinished_requests=service.unfinished_requests,
            unfinished_tokens=service.unfinished_tokens,
            free_hbm_tokens=service.free_tokens,
            reported_at=0.0,
            hbm_capacity_tokens=service.pool_tokens,
        )

    def _figures(self) -> dict[str, float]:
        service = self._service
        return {
            "requests": service.stats.requests,
            "decoding": service.decoding_requests,
            "busy_s": service.loop_stats.step_s,
            "queue_s": service.stats.queue_s,
            "generated_tokens": service.stats.generated_tokens,
            "full_block_bytes": service.endpoint.stats.pushed_bytes["pool->staging"],
            "push_busy_s": service.endpoint.busy_seconds(),
        }

    async def begin(self, client: str, task: DecodeTask) -> tuple[str, int]:
        """Serve an attempt, to be answered by letter. Returns which incarnation of this engine does, and the attempt's number in it."""
        outbox = self._outboxes.setdefault(client, Outbox())
        attempt = attempt_name(task.request.request_id, task.route.epoch)
        self._begun += 1
        outbox.open(attempt, self._begun)
        self._serving.spawn(self._serve(client, outbox, attempt, task))
        return self._agent_name, self._begun

    async def letters(self, client: str) -> AsyncIterator[Letter]:
        """To one of the clients, for some seconds; see `Outbox.letters`."""
        outbox = self._outboxes.setdefault(client, Outbox())
        try:
            async with aclosing(outbox.letters(self._agent_name)) as letters:
                async for letter in letters:
                    yield letter
        finally:
            self._tidy(client, outbox)

    async def _serve(self, client: str, outbox: Outbox, attempt: str, task: DecodeTask) -> None:
        logs.bind(task.request.request_id)
        last: Answer = DualPathError(f"{self._identity.engine_id}: {attempt} ended early")
        first = True
        try:
            async with aclosing(self._service.generate(task)) as deltas:
                async for delta in deltas:
                    if first:
                        first = False
                        self._reports.prefilled(attempt)
                    if is_last(delta):
                        last = delta
                    else:
                        outbox.put(attempt, delta)
        except DualPathError as error:
            last = error
        except Exception as error:
            log.exception("%s failed", attempt)
            last = DualPathError(f"{self._identity.engine_id} failed: {error}")
        finally:
            if isinstance(last, CancelledError):
                outbox.drop(attempt)
            else:
                await outbox.close(attempt, last)
            self._tidy(client, outbox)
            self._reports.finished(attempt)

    def _attempts(self) -> frozenset[str]:
        """All that are under way, until their clients have taken the last answers."""
        return frozenset(attempt for outbox in self._outboxes.values() for attempt in outbox.attempts)

    def _tidy(self, client: str, outbox: Outbox) -> None:
        if not outbox.in_use and self._outboxes.get(client) is outbox:
            del self._outboxes[client]

    async def cancel(self, request_id: str, epoch: int) -> None:
        self._service.cancel(request_id, epoch)

    async def peer_died(self, agent: str) -> None:
        self._service.peer_died(agent)

    async def inspect(self) -> dict[str, Any]:
        """State for tests and diagnosis; checks integrity."""
        service = self._service
        service.check_integrity()
        return {
            "idle": service.idle and not self._attempts(),
            "phases": dict(service.phases()),
            "free_tokens": service.free_tokens,
            "pool_tokens": service.pool_tokens,
            "requests": service.stats.requests,
            "generated_tokens": service.stats.generated_tokens,
            "steps": service.loop_stats.steps,
            "step_s": service.loop_stats.step_s,
            "failed_requests": service.stats.failed_requests,
            "cancelled_requests": service.stats.cancelled_requests,
            "skipped_blocks": service.persister.skipped_blocks,
            "pushed_bytes": dict(service.endpoint.stats.pushed_bytes),
        }

    async def metrics(self) -> str:
        metrics, service = self._metrics, self._service
        block_tokens = self._facts.geometry.block_tokens
        free = service.free_tokens // block_tokens
        metrics.pool_blocks.labels(state="free").set(free)
        metrics.pool_blocks.labels(state="used").set(service.pool_tokens // block_tokens - free)
        metrics.batch_size.set(service.decoding_requests)
        metrics.advance(metrics.engine_busy, service.loop_stats.step_s)
        metrics.advance(metrics.engine_queue, service.stats.queue_s)
        metrics.advance(metrics.hedged_reads, service.hedging.hedged_reads)
        metrics.advance(metrics.hedged_bytes, service.hedging.hedged_bytes)
        self._count_pushes(service.endpoint, full_blocks="pool->staging")
        return metrics.render()


def _hedge(settings: Settings) -> HedgeSettings:
    storage = settings.storage
    factor = storage.hedge_factor if settings.staging.resident_share else 0.0
    return HedgeSettings(factor, storage.hedge_min_wait_s, storage.hedge_share)
