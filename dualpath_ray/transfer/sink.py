"""The receiving end of layer streams, and the ring of window layers they land in (paper section 2, layerwise prefill).

A prefill engine keeps KV of only `W` layers of its batch: a ring of W window layers. A ring slot goes round like this:

    free -> granted to the next layer of the oldest batch that wants one (credits go out to the layer's sources)
         -> filled (all sources' pushes have landed) -> computed on (engine: `enter` .. `leave`)
         -> its new KV pushed to the decode node's staging -> free

Batches follow each other through the same ring, so the first layers of the next batch arrive while the last ones of the current
batch are computed. Memory of a batch that failed is not reused before each of its sources has said that nothing is under way.
A source that is lost says nothing: the *rows* that it may write to stay taken, in all layers, until it is known to be dead; ring slots go
on round with the other rows.

Messages may be lost with a connection that breaks: what is not answered is said again (`refresh`), and sources know what they have heard.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from dualpath_ray.errors import BlockCorruptError, DeadlineExceededError, DualPathError, StoreError, TransferError
from dualpath_ray.transfer.batch_gate import BatchGate
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.feeds import ChunkFeed, HitSource, Incoming, NewKV
from dualpath_ray.transfer.messages import CloseStream, Credit, LayerLanded, OpenStream, StreamClosed, StreamReady
from dualpath_ray.transfer.push import Push
from dualpath_ray.transfer.window_rows import WindowRows, overlap

REFRESH_S = 1.0  # silence of a source after which it is asked again


class LayerSink:
    """See the module's docstring. One per prefill process.

    `window_region` has `ring_slots * capacity_blocks` Layer Blocks: ring slot s starts at block `s * capacity_blocks`.
    """

    def __init__(
        self, endpoint: Endpoint, window_region: str, staging_region: str, layers: int, ring_slots: int, capacity_blocks: int
    ) -> None:
        self._endpoint = endpoint
        self._window, self._staging = window_region, staging_region
        self.layers = layers
        self.ring_slots, self.capacity_blocks = ring_slots, capacity_blocks
        self.on_rows_freed: Callable[[], None] = lambda: None  # called on the endpoint's thread, or on that of `source_died`
        self._rows = WindowRows(capacity_blocks)
        self._lock = threading.Condition()
        self._numbers = itertools.count(1)
        self._incoming: dict[int, Incoming] = {}
        self._free_ring = deque(range(ring_slots))
        self._batches: deque[BatchGate] = deque()
        self._ending: dict[BatchGate, Future[None]] = {}
        endpoint.on(StreamReady, self._on_ready)
        endpoint.on(LayerLanded, self._on_landed)
        endpoint.on(StreamClosed, self._on_closed)

    # ---- opening and closing feeds (service's thread)

    def open(self, sources: Sequence[HitSource], new_kv: NewKV) -> ChunkFeed:
        """Open the streams of a chunk. The caller must pass the feed to `start_batch` or `close` later."""
        feed = ChunkFeed(new_kv)
        with self._lock:
            for source in sources:
                stream = Incoming(next(self._numbers), source, feed)
                feed.incoming.append(stream)
                self._incoming[stream.number] = stream
        for stream in feed.incoming:
            self._open(stream)
        if not feed.incoming:
            feed.ready.set_result(None)
        for agent in {source.agent for source in sources if self._endpoint.is_dead(source.agent)}:
            self.source_died(agent)  # we were told before these streams were opened, and shall not be told again
        return feed

    def close(self, feed: ChunkFeed) -> None:
        """Give up a feed that is in no batch."""
        for stream in feed.incoming:
            self._close(stream)

    def _open(self, stream: Incoming) -> None:
        self._endpoint.send(stream.source.agent, OpenStream(stream.number, stream.source.lease, list(stream.source.positions)))

    def _close(self, stream: Incoming) -> None:
        if not stream.closed:
            stream.closing = True
            self._endpoint.send(stream.source.agent, CloseStream(stream.number))

    def refresh(self) -> None:
        """Say again to sources that have been silent for REFRESH_S what they may not have heard. To be called now and then."""
        now = time.monotonic()
        with self._lock:
            silent = [stream for stream in self._incoming.values() if not stream.lost and now - stream.heard_at >= REFRESH_S]
            for stream in silent:
                stream.heard_at = now
                gate = stream.feed.gate
                if stream.closing or len(stream.landed) == self.layers:
                    self._close(stream)
                elif not stream.ready:
                    self._open(stream)
                elif gate is not None:
                    for layer, state in enumerate(gate.layers[: gate.granted]):
                        if layer not in stream.landed and state.ring_slot is not None:
                            self._credit(stream, layer, state.ring_slot)

    def start_batch(self, feeds: Sequence[ChunkFeed], first_row_blocks: Sequence[int], timeout_s: float) -> BatchGate:
        """Queue a batch for the ring. `first_row_blocks[i]` is where feed i's position 0 lies in every window layer, in blocks.

        It must lie in `free_rows`, which only `source_lost` takes from: call both from one thread.
        """
        gate = BatchGate(self, feeds, timeout_s)
        with self._lock:
            for feed, row in zip(feeds, first_row_blocks, strict=True):
                feed.first_row_block = row
                feed.gate = gate
                gate.error = gate.error or feed.error
            self._batches.append(gate)
            self._grant()
        return gate

    def give_up(self, feed: ChunkFeed, error: DualPathError) -> None:
        """The feed's request is cancelled: end its batch with `error` if that batch waits for one of its streams."""
        with self._lock:
            gate = feed.gate
            if gate is None or gate.error is not None or gate.waiting_for is None:
                return
            if any(gate.waiting_for not in stream.landed for stream in feed.incoming):
                gate.error = error
                self._lock.notify_all()

    def source_died(self, agent: str) -> None:
        """A gateway is known to be dead: nothing of its streams is under way any more."""
        with self._lock:
            numbers = [stream.number for stream in self._incoming.values() if stream.source.agent == agent]
        for number in numbers:
            self._on_closed(agent, StreamClosed(number, f"gateway {agent} died"))

    def source_lost(self, agent: str) -> None:
        """A gateway cannot be had any more, but is not known to be dead: what needs it fails now.

        Rows that were granted to it stay taken until `source_died`, or until it says itself that nothing is under way. A later batch that
        was laid over them, and has not got all its ring slots, fails too: it would get those of the batch that this source writes to.
        """
        error = TransferError(f"gateway {agent} is lost")
        with self._lock:
            for stream in self._incoming.values():
                if stream.source.agent != agent or stream.lost:
                    continue
                stream.lost = True
                stream.feed.fail(error)
                gate = stream.feed.gate
                if gate is None:
                    continue
                gate.error = gate.error or error
                self._rows.take(stream.number, stream.rows)
                for other in self._over(stream.rows):
                    if other is not gate:
                        other.error = other.error or TransferError(f"laid out over rows that {agent} may still write to")
            for gate in list(self._batches):
                self._end_if_quiet(gate)
            self._lock.notify_all()

    def free_rows(self) -> list[range]:
        """The runs of rows of the window layers that a batch may be laid out in, in blocks."""
        with self._lock:
            return self._rows.free()

    @property
    def idle(self) -> bool:
        """No stream is open and no batch holds ring slots."""
        with self._lock:
            return not self._incoming and not self._batches and len(self._free_ring) == self.ring_slots

    def check_integrity(self) -> None:
        """Each ring slot is free or granted to one layer of one batch, which will get none whose rows are taken. Raises AssertionError."""
        with self._lock:
            used = [state.ring_slot for gate in self._batches for state in gate.layers if state.ring_slot is not None]
            if sorted([*self._free_ring, *used]) != list(range(self.ring_slots)):
                raise AssertionError(f"window ring: free {sorted(self._free_ring)}, used {sorted(used)} of {self.ring_slots}")
            if any(gate.error is None for rows in self._rows.taken for gate in self._over(rows)):
                raise AssertionError(f"window rows: a batch will get rows that a lost source may write to: {self._rows.taken}")

    # ---- engine's thread, through the gate

    def wait_for_layer(self, gate: BatchGate, layer: int) -> int:
        state = gate.layers[layer]
        start = time.monotonic()
        self._endpoint.poke()
        with self._lock:
            gate.waiting_for = layer
            while gate.error is None and (state.ring_slot is None or not gate.filled(layer)):
                if not self._lock.wait(timeout=min(1.0, max(0.0, gate.deadline - time.monotonic()))) and time.monotonic() >= gate.deadline:
                    gate.error = DeadlineExceededError(f"hit KV of layer {layer} did not arrive in time")
            gate.waiting_for = None
            if gate.error is not None:
                raise gate.error
            assert state.ring_slot is not None
            gate.times.waited.append(time.monotonic() - start)
            gate.times.entered_at.append(time.monotonic())
            return state.ring_slot

    def push_new_kv(self, gate: BatchGate, layer: int, before_push: Callable[[], None] | None) -> None:
        state = gate.layers[layer]
        gate.times.left_at.append(time.monotonic())
        assert state.ring_slot is not None
        first_block = state.ring_slot * self.capacity_blocks
        with self._lock:
            state.pushes_left = len(gate.feeds)
            gate.pushing += len(gate.feeds)
        for feed in gate.feeds:
            new = feed.new_kv
            rows = first_block + feed.first_row_block + new.first_block + np.arange(len(new.slots), dtype=np.int32)
            push = Push(
                peer=new.agent,
                local=self._window,
                local_blocks=rows.astype(np.int32),
                remote=self._staging,
                remote_blocks=new.slots * np.int32(self.layers) + np.int32(layer),
                on_done=lambda error, feed=feed: self._new_kv_left(gate, layer, feed, error),  # type: ignore[misc]
                lease=new.lease,
                before=before_push,
            )
            self._endpoint.push(push)

    def finish_batch(self, gate: BatchGate, error: DualPathError | None) -> Future[None]:
        future: Future[None] = Future()
        with self._lock:
            gate.finished = True
            gate.error = gate.error or error
            self._ending[gate] = future
            if gate.error:
                for stream in gate.streams:
                    self._close(stream)
            self._end_if_quiet(gate)
        return future

    # ---- endpoint's thread

    def _on_ready(self, sender: str, message: StreamReady) -> None:
        with self._lock:
            stream = self._known(sender, message.stream)
            if stream is None:
                return
            stream.ready = True
            feed = stream.feed
            if all(other.ready for other in feed.incoming) and not feed.ready.done():
                feed.ready.set_result(None)

    def _on_landed(self, sender: str, message: LayerLanded) -> None:
        with self._lock:
            stream = self._known(sender, message.stream)
            if stream is not None and stream.feed.gate is not None and message.layer in range(self.layers):
                stream.landed.add(message.layer)
                self._lock.notify_all()

    def _on_closed(self, sender: str, message: StreamClosed) -> None:
        with self._lock:
            stream = self._known(sender, message.stream)
            if stream is None:
                return
            del self._incoming[stream.number]
            stream.closed = True
            feed, gate = stream.feed, stream.feed.gate
            if message.error is None and not stream.closing and gate is not None:  # ended by itself: all has landed, heard of or not
                stream.landed.update(range(self.layers))
            if message.error is not None:
                error: DualPathError = StoreError(message.error) if message.store else TransferError(message.error)
                if message.bad_key is not None:
                    error = BlockCorruptError(message.bad_key, message.error)
                feed.fail(error)
                if gate is not None:
                    gate.error = gate.error or error
            if gate is not None:
                self._end_if_quiet(gate)
            if stream.lost:
                self._rows.give_back(stream.number)
                self.on_rows_freed()
            self._lock.notify_all()

    def _known(self, sender: str, number: int) -> Incoming | None:
        stream = self._incoming.get(number)
        if stream is None or stream.source.agent != sender:
            return None
        stream.heard_at = time.monotonic()
        return stream

    def _new_kv_left(self, gate: BatchGate, layer: int, feed: ChunkFeed, error: DualPathError | None) -> None:
        with self._lock:
            gate.pushing -= 1
            if error is not None:
                feed.error = feed.error or error
            state = gate.layers[layer]
            state.pushes_left -= 1
            if state.pushes_left == 0 and state.ring_slot is not None:
                self._free_ring.append(state.ring_slot)
                state.ring_slot = None
                self._grant()
            self._end_if_quiet(gate)

    # ---- with the lock held

    def _over(self, rows: range) -> list[BatchGate]:
        """Batches laid out over some of `rows` that have not got all their ring slots."""
        gates = [gate for gate in self._batches if gate.granted < self.layers]
        return [gate for gate in gates if any(overlap(feed.rows, rows) for feed in gate.feeds)]

    def _grant(self) -> None:
        """Hand free ring slots to the next layers, oldest batch first, and credit their sources."""
        for gate in self._batches:
            while self._free_ring and gate.granted < self.layers and gate.error is None and not gate.finished:
                layer, gate.granted = gate.granted, gate.granted + 1
                ring_slot = self._free_ring.popleft()
                gate.layers[layer].ring_slot = ring_slot
                for stream in gate.streams:
                    self._credit(stream, layer, ring_slot)
                gate.peak_ring_slots = max(gate.peak_ring_slots, sum(state.ring_slot is not None for state in gate.layers))
                self._lock.notify_all()
            if gate.granted == self.layers and not gate.ring_free.done():
                gate.ring_free.set_result(None)

    def _credit(self, stream: Incoming, layer: int, ring_slot: int) -> None:
        rows = [stream.feed.first_row_block + block for block in stream.source.blocks] if layer == 0 else None
        self._endpoint.send(stream.source.agent, Credit(stream.number, layer, ring_slot * self.capacity_blocks, rows))

    def _end_if_quiet(self, gate: BatchGate) -> None:
        """Free what a finished batch still holds once nothing can write to it or read from it."""
        future = self._ending.get(gate)
        if future is None or gate.pushing or not gate.quiet:
            return
        del self._ending[gate]
        for state in gate.layers:
            if state.ring_slot is not None:
                self._free_ring.append(state.ring_slot)
                state.ring_slot = None
        self._batches.remove(gate)
        self._grant()
        if not gate.ring_free.done():
            gate.ring_free.set_result(None)
        future.set_result(None)
