"""One forward batch between the engine that computes its layers and the window that they pass through."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dualpath_ray.errors import DualPathError
from dualpath_ray.transfer.feeds import ChunkFeed

if TYPE_CHECKING:
    from dualpath_ray.transfer.sink import LayerSink


@dataclass(slots=True)
class LayerState:
    ring_slot: int | None = None
    pushes_left: int = 0


@dataclass(slots=True)
class GateTimes:
    """Seconds per layer spent waiting in `enter`, for the trace; clock readings at the end of each wait and of each layer."""

    waited: list[float] = field(default_factory=list)
    entered_at: list[float] = field(default_factory=list)
    left_at: list[float] = field(default_factory=list)


class BatchGate:
    """The layer gate of one forward batch; see `dualpath_ray.engine.prefill.LayerGate`. Made by `LayerSink.start_batch`."""

    def __init__(self, sink: LayerSink, feeds: Sequence[ChunkFeed], timeout_s: float) -> None:
        self._sink = sink
        self.feeds = tuple(feeds)
        self.layers = [LayerState() for _ in range(sink.layers)]
        self.streams = tuple(stream for feed in feeds for stream in feed.incoming)
        self.granted = 0
        self.waiting_for: int | None = None  # layer that the engine waits for
        self.pushing = 0
        self.error: DualPathError | None = None
        self.finished = False
        self.deadline = time.monotonic() + timeout_s
        self.ring_free: Future[None] = Future()  # done when this batch needs no more ring slots: the next one may be queued
        self.peak_ring_slots = 0
        self.times = GateTimes()

    @property
    def quiet(self) -> bool:
        """Nothing is written to its rows any more, but for those that a lost source keeps taken."""
        return all(stream.closed or stream.lost for stream in self.streams)

    def filled(self, layer: int) -> bool:
        """All of the layer's hit KV is in the window."""
        return all(layer in stream.landed for stream in self.streams)

    def enter(self, layer: int) -> int:
        """Block until `layer`'s hit KV is in the window; returns its ring slot. Raises what aborts the batch."""
        return self._sink.wait_for_layer(self, layer)

    def leave(self, layer: int, before_push: Callable[[], None] | None = None) -> None:
        """The layer has been computed: push its new KV on, then reuse its memory. `before_push` runs right before the first byte goes."""
        self._sink.push_new_kv(self, layer, before_push)

    def finish(self, error: DualPathError | None = None) -> Future[None]:
        """The engine is done with the batch (or gave it up, with `error`).

        The future ends when no byte is under way in either direction, but for what a lost source may still write to rows that stay taken.
        """
        return self._sink.finish_batch(self, error)
