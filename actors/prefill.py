"""The prefill engine as a Ray actor: one per GPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.engine_process import ClusterProcess, device_of, endpoint_settings
from dualpath_ray.config import Settings
from dualpath_ray.messages import PrefillOutcome, PrefillTask
from dualpath_ray.telemetry import logs
from dualpath_ray.traffic.classes import TrafficClass
from policies.batch_quota import AttentionTimeModel, plan_batch
from policies.vocabulary import EngineLoad

NO_QUOTA_S = float("inf")


def batch_policy(settings: Settings, waiting: Sequence[tuple[int, int]]) -> list[int]:
    """How much of each waiting request the next batch computes (policies/batch_quota.py)."""
    prefill = settings.prefill
    model = AttentionTimeModel(prefill.attention_pair_s or 0.0)
    quota_s = NO_QUOTA_S if prefill.compute_quota_s is None else prefill.compute_quota_s
    return plan_batch(waiting, model, quota_s, prefill.max_batch_tokens, settings.model.block_tokens)


class PrefillActor(ClusterProcess):
    """See `dualpath_ray.prefill_service.PrefillService`; this adds registration, load reports and metrics."""

    role = "prefill"

    async def _bring_up(self) -> str:
        """Load the model, register memory, report to the scheduler."""
        import torch

        from dualpath_ray.engine.model import load_model
        from dualpath_ray.engine.window import LayerWindow
        from dualpath_ray.prefill_service import PrefillService, PrefillServiceSettings

        settings, geometry = self._settings, self._facts.geometry
        if settings.model.threads is not None:
            torch.set_num_threads(settings.model.threads)
        device = device_of(settings)
        model = load_model(Path(self._identity.model_path), device, settings.model.dtype, settings.model.kv_dtype)
        tokens = settings.prefill.window_tokens or self._facts.max_context
        capacity = geometry.blocks_for(max(tokens, settings.prefill.max_batch_tokens)) * geometry.block_tokens
        layers = settings.prefill.window_layers if settings.prefill.layerwise else geometry.layers
        window = LayerWindow(geometry, layers, capacity, device)
        self._service = PrefillService(
            self._identity.engine_id,
            model,
            geometry,
            window,
            functools.partial(batch_policy, settings),
            PrefillServiceSettings(settings.prefill.max_requests, layerwise=settings.prefill.layerwise),
            endpoint_settings(settings, self._transports, TrafficClass.KV_READ),
        )
        await self._service.start()
        self._reports = self._reporter(self._service.endpoint.info)
        self._reports.start()
        return self._service.endpoint.agent_name

    def _load(self) -> EngineLoad:
        cost = self._service.cost.fitted()
        return EngineLoad(
            engine_id=self._identity.engine_id,
            node_id=self._identity.node_id,
            role="prefill",
            unfinished_requests=self._service.unfinished_requests,
            unfinished_tokens=self._service.unfinished_tokens,
            free_hbm_tokens=0,
            reported_at=0.0,
            # Without the fixed part: requests of a batch share it, and it speaks neither for loading nor for computing.
            prefill_cost=None if cost is None else AttentionTimeModel(cost.pair_s, cost.token_s),
        )

    def _figures(self) -> dict[str, float]:
        stats, endpoint = self._service.stats, self._service.endpoint
        return {
            "requests": stats.requests,
            "busy_s": stats.compute_s,
            "queue_s": stats.queue_s,
            "computed_tokens": stats.computed_tokens,
            "cached_tokens": stats.cached_tokens,
            "new_layer_bytes": endpoint.stats.pushed_bytes["window->staging"],
            "push_busy_s": endpoint.busy_seconds(),
        }

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        self._reports.changed()
        try:
            with logs.request(task.request_id):
                return await self._service.prefill(task)
        finally:
            self._reports.changed()

    async def give_back(self, request_id: str, epoch: int) -> bool:
        """See `PrefillService.give_back`."""
        return self._service.give_back(request_id, epoch)

    async def cancel(self, request_id: str, epoch: int) -> None:
        await self._service.cancel(request_id, epoch)

    async def peer_lost(self, agent: str) -> None:
        self._service.peer_lost(agent)

    async def peer_died(self, agent: str) -> None:
        self._service.peer_died(agent)

    async def inspect(self) -> dict[str, Any]:
        """State for tests and diagnosis; checks integrity."""
        self._service.check_integrity()
        stats = self._service.stats
        return {
            "idle": self._service.idle,
            "batches": stats.batches,
            "computed_tokens": stats.computed_tokens,
            "cached_tokens": stats.cached_tokens,
            "compute_s": stats.compute_s,
            "layer_wait_s": stats.layer_wait_s,
            "peak_window_bytes": stats.peak_window_bytes,
            "peak_layer_bytes": stats.peak_layer_bytes,
            "pushed_bytes": dict(self._service.endpoint.stats.pushed_bytes),
        }

    async def metrics(self) -> str:
        metrics, service = self._metrics, self._service
        metrics.window_peak_bytes.set(service.stats.peak_window_bytes)
        metrics.advance(metrics.engine_busy, service.stats.compute_s)
        metrics.advance(metrics.engine_queue, service.stats.queue_s)
        self._count_pushes(service.endpoint, new_layers="window->staging")
        return metrics.render()
