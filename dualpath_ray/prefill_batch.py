"""What a prefill engine computes: requests, batches of their chunks, and the gate between a batch and the window."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import torch

from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.prefill import PrefillChunk
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.messages import PrefillOutcome, PrefillTask
from dualpath_ray.telemetry import tracing
from dualpath_ray.transfer.batch_gate import BatchGate
from dualpath_ray.transfer.feeds import ChunkFeed


@dataclass(slots=True, eq=False)
class PrefillJob:
    """A request at a prefill engine, from when it came until its outcome is set."""

    task: PrefillTask
    outcome: asyncio.Future[PrefillOutcome]
    feed: ChunkFeed
    arrived: float
    deadline: float
    computed: int = 0  # tokens after the hits whose KV is on the decode node already
    attempts: int = 0
    started: float = 0.0
    ready_at: float = 0.0  # the first layers of its hits can be had
    cancelled: bool = False
    waited_s: float = 0.0
    rules: LogitRules | None = None  # of the first token, unless its sampling is plain
    prepared: bool = field(init=False)

    def __post_init__(self) -> None:
        self.prepared = self.task.sampling.plain

    @property
    def cached(self) -> int:
        return self.task.cached_tokens + self.computed

    @property
    def left(self) -> int:
        return len(self.task.tokens) - self.cached


@dataclass(slots=True)
class PrefillStats:
    """Counters since start."""

    batches: int = 0
    requests: int = 0
    queue_s: float = 0.0  # of requests that could have been computed, until they were
    computed_tokens: int = 0
    cached_tokens: int = 0
    compute_s: float = 0.0
    layer_wait_s: float = 0.0
    peak_window_bytes: int = 0
    peak_layer_bytes: int = 0  # one layer's KV of the batch that reached peak_window_bytes


@dataclass(slots=True)
class PrefillBatch:
    """Chunks of requests that are computed together; the lists belong to each other."""

    jobs: list[PrefillJob]
    chunks: list[PrefillChunk]
    gate: BatchGate

    def count(self, stats: PrefillStats, geometry: KVGeometry, seconds: float) -> None:
        """Count the batch, which took `seconds`, after its gate has finished."""
        stats.batches += 1
        stats.computed_tokens += sum(len(chunk.tokens) for chunk in self.chunks)
        stats.cached_tokens += sum(chunk.cached_tokens for chunk in self.chunks)
        stats.compute_s += seconds
        stats.layer_wait_s += sum(self.gate.times.waited)
        layer_bytes = sum(geometry.blocks_for(chunk.total_tokens) for chunk in self.chunks) * geometry.layer_block_bytes
        resident = self.gate.peak_ring_slots * layer_bytes
        if resident > stats.peak_window_bytes:
            stats.peak_window_bytes, stats.peak_layer_bytes = resident, layer_bytes

    def cost(self) -> tuple[list[tuple[int, int]], float]:
        """(cached, new) tokens of the chunks, and the seconds for which layers were computed (not waited for). Only after a run."""
        times = self.gate.times
        sizes = [(chunk.cached_tokens, len(chunk.tokens)) for chunk in self.chunks]
        return sizes, times.left_at[-1] - times.entered_at[0] - sum(times.waited[1:])

    def trace(self, engine_id: str) -> None:
        """Record one span per layer and request, from the gate's clock: `waited_s` shows which layer's KV came late."""
        if not tracing.enabled():
            return
        times = self.gate.times
        for job in self.jobs:
            for layer, (entered, left, waited) in enumerate(zip(times.entered_at, times.left_at, times.waited, strict=False)):
                tracing.record("prefill.layer", job.task.trace, entered - waited, left, layer=layer, waited_s=waited, engine=engine_id)


class WindowGate:
    """The engine's LayerGate: ring slots of the sink as tensors of the window."""

    def __init__(self, gate: BatchGate, window: LayerWindow) -> None:
        self._gate, self._window = gate, window

    def enter(self, layer: int) -> torch.Tensor:
        return self._window.view(self._gate.enter(layer))

    def leave(self, layer: int) -> None:
        self._gate.leave(layer)


class WholeBatchGate(WindowGate):
    """Prefill as without layerwise streaming, for comparisons: nothing is computed before the hit KV of all layers is there, and new KV
    leaves when all layers have been computed."""

    def __init__(self, gate: BatchGate, window: LayerWindow) -> None:
        super().__init__(gate, window)
        self._ring_slots: list[int] = []

    def enter(self, layer: int) -> torch.Tensor:
        if not self._ring_slots:
            self._ring_slots = [self._gate.enter(each) for each in range(len(self._gate.layers))]
        return self._window.view(self._ring_slots[layer])

    def leave(self, layer: int) -> None:
        if layer == len(self._gate.layers) - 1:
            for each in range(layer + 1):
                self._gate.leave(each)
