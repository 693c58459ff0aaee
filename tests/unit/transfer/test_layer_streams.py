"""Layer streams from staging slots through a ring of window layers and back, between real endpoints.

Two gateways (sources), one prefill process (sink). An emulated engine checks the bytes of each layer in `enter`, writes new KV and
leaves; after `finish` the new KV must be in the first gateway's staging.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from dualpath_ray.errors import BlockCorruptError, DualPathError, StoreError, TransferError
from dualpath_ray.transfer import sink as sink_module
from dualpath_ray.transfer.batch_gate import BatchGate
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.feeds import ChunkFeed, HitSource, NewKV
from dualpath_ray.transfer.memory import Region, allocate
from dualpath_ray.transfer.messages import CloseStream, Credit, LayerLanded, OpenStream, StreamClosed, StreamReady, WriterDone
from dualpath_ray.transfer.sink import LayerSink
from dualpath_ray.transfer.source import StreamSource

LAYERS, BLOCK_BYTES, CAPACITY = 5, 512, 24
SLOTS, HIT_SLOTS = 96, 32  # hits lie in the first slots, each new block gets one of the others for itself
WAIT_S = 8.0


class Node:
    """A gateway's staging `[SLOTS, LAYERS, BLOCK_BYTES]` of random bytes, and its end of the streams."""

    def __init__(self, name: str, random: np.random.Generator) -> None:
        self.staging = allocate(SLOTS * LAYERS * BLOCK_BYTES).reshape(SLOTS, LAYERS, BLOCK_BYTES)
        self.staging[:] = random.integers(0, 256, self.staging.shape)
        region = Region("staging", self.staging.ctypes.data, BLOCK_BYTES, LAYERS, LAYERS * BLOCK_BYTES, SLOTS)
        self.endpoint = Endpoint(name, (region,), EndpointSettings(max_post_bytes=3 * BLOCK_BYTES))
        self.source = StreamSource(self.endpoint, "staging", "window", LAYERS)
        self.leases = 0
        self.unused = iter(range(HIT_SLOTS, SLOTS))

    def lease(self, slots: Sequence[int], layers_ready: int) -> int:
        self.leases += 1
        self.source.add_lease(self.leases, np.array(slots, dtype=np.int32), layers_ready)
        return self.leases

    def drop(self, lease: int) -> None:
        """Take a lease back and wait until nothing is pushed from it."""
        quiet = threading.Event()
        self.source.drop_lease(lease, quiet.set)
        assert quiet.wait(WAIT_S)


class Cluster:
    """Two gateways and a prefill process with a window of `ring_slots` layers."""

    def __init__(self, ring_slots: int, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes = [Node("g0", self.random), Node("g1", self.random)]
        self.window = allocate(ring_slots * CAPACITY * BLOCK_BYTES).reshape(ring_slots, CAPACITY, BLOCK_BYTES)
        blocks = ring_slots * CAPACITY
        region = Region("window", self.window.ctypes.data, BLOCK_BYTES, blocks, blocks * BLOCK_BYTES)
        self.endpoint = Endpoint("prefill", (region,), EndpointSettings(max_post_bytes=3 * BLOCK_BYTES))
        self.sink = LayerSink(self.endpoint, "window", "staging", LAYERS, ring_slots, CAPACITY)
        for node in self.nodes:
            node.endpoint.connect(self.endpoint.info)
            self.endpoint.connect(node.endpoint.info)
        self.endpoints = [self.endpoint, *(node.endpoint for node in self.nodes)]

    def close(self) -> None:
        for endpoint in self.endpoints:
            endpoint.close()

    def settle(self) -> None:
        """Everything that was begun has ended, and nothing has leaked."""
        idle = threading.Event()
        for _ in range(int(WAIT_S / 0.002)):
            if self.sink.idle:
                break
            idle.wait(0.002)
        assert self.sink.idle
        self.sink.check_integrity()
        for node in self.nodes:
            quiet = threading.Event()
            node.endpoint.call(quiet.set)
            assert quiet.wait(WAIT_S)
            assert not node.source._streams
        assert not self.endpoint._lease_pushes


@pytest.fixture
def ring_slots() -> int:
    return 2


@pytest.fixture
def cluster(ring_slots: int) -> Iterator[Cluster]:
    made = Cluster(ring_slots)
    yield made
    made.close()


every_ring = pytest.mark.parametrize("ring_slots", [1, 2, 3])


class Chunk:
    """A chunk whose hits lie half on one gateway and half on the other, and whose new KV goes to the first."""

    def __init__(self, cluster: Cluster, hits: tuple[int, int], new: int, layers_ready: int = LAYERS) -> None:
        self.cluster, self.hits, self.new = cluster, hits, new
        slots = [cluster.random.permutation(HIT_SLOTS)[:count] for count in hits]
        self.leases = [node.lease(taken, layers_ready) for node, taken in zip(cluster.nodes, slots, strict=True)]
        # positions need not be in order: a lease may hold blocks of other parts, too
        positions = [cluster.random.permutation(count) for count in hits]
        self.expected = np.concatenate(
            [node.staging[taken[order]] for node, taken, order in zip(cluster.nodes, slots, positions, strict=True)]
        )
        starts = (0, hits[0])
        self.sources = [
            HitSource(node.endpoint.agent_name, lease, tuple(order.tolist()), tuple(range(start, start + len(order))))
            for node, lease, order, start in zip(cluster.nodes, self.leases, positions, starts, strict=True)
            if len(order)
        ]
        self.new_slots = np.array([next(cluster.nodes[0].unused) for _ in range(new)], dtype=np.int32)
        self.new_lease = cluster.nodes[0].lease(self.new_slots, LAYERS)
        self.produced = cluster.random.integers(0, 256, (new, LAYERS, BLOCK_BYTES), dtype=np.uint8)

    @property
    def blocks(self) -> int:
        return sum(self.hits) + self.new

    def open(self) -> ChunkFeed:
        new_kv = NewKV(self.cluster.nodes[0].endpoint.agent_name, self.new_lease, self.new_slots, sum(self.hits))
        return self.cluster.sink.open(self.sources, new_kv)

    def loaded(self, layers_ready: int) -> None:
        for node, lease in zip(self.cluster.nodes, self.leases, strict=True):
            node.source.layers_loaded(lease, layers_ready)

    def compute(self, layer: int, rows: np.ndarray) -> None:
        """`rows` are the chunk's rows of one window layer: check the hits, write the new blocks."""
        np.testing.assert_array_equal(rows[: sum(self.hits)], self.expected[:, layer])
        rows[sum(self.hits) :] = self.produced[:, layer]

    def assert_delivered(self) -> None:
        np.testing.assert_array_equal(self.cluster.nodes[0].staging[self.new_slots], self.produced)

    def drop(self) -> None:
        for node, lease in zip(self.cluster.nodes, self.leases, strict=True):
            node.drop(lease)
        self.cluster.nodes[0].drop(self.new_lease)


class Batch:
    """Chunks that are computed together, one behind the other in the window's rows from `first_row` on."""

    def __init__(self, cluster: Cluster, chunks: Sequence[Chunk], timeout_s: float = WAIT_S, first_row: int = 0) -> None:
        self.cluster, self.chunks = cluster, chunks
        self.feeds = [chunk.open() for chunk in chunks]
        self.rows = np.cumsum([first_row, *(chunk.blocks for chunk in chunks)]).tolist()
        self.timeout_s = timeout_s
        self.gate: BatchGate

    def start(self) -> None:
        for feed in self.feeds:
            feed.ready.result(WAIT_S)
        self.gate = self.cluster.sink.start_batch(self.feeds, self.rows[:-1], self.timeout_s)

    def run(self) -> None:
        """What the engine does with the batch. Raises what the gate raises, after it has ended the batch."""
        try:
            for layer in range(LAYERS):
                window = self.cluster.window[self.gate.enter(layer)]
                for chunk, first, stop in zip(self.chunks, self.rows, self.rows[1:], strict=False):
                    chunk.compute(layer, window[first:stop])
                self.cluster.sink.check_integrity()
                self.gate.leave(layer)
        except DualPathError as error:
            self.gate.finish(error).result(WAIT_S)
            raise
        self.gate.finish().result(WAIT_S)
        assert self.gate.peak_ring_slots <= self.cluster.sink.ring_slots
        for chunk, feed in zip(self.chunks, self.feeds, strict=True):
            assert feed.error is None
            chunk.assert_delivered()


@every_ring
def test_every_layer_passes_the_window_and_new_kv_comes_back(cluster: Cluster) -> None:
    batch = Batch(cluster, [Chunk(cluster, (5, 6), 3), Chunk(cluster, (4, 0), 2), Chunk(cluster, (0, 0), 1)])
    batch.start()
    batch.run()
    cluster.settle()
    for chunk in batch.chunks:
        chunk.drop()


@every_ring
def test_batches_follow_each_other_through_the_ring(cluster: Cluster) -> None:
    """All are queued before the first is computed, so that later ones fill slots as soon as earlier ones free them."""
    batches = [Batch(cluster, [Chunk(cluster, (3, 4), 2), Chunk(cluster, (2, 2), 1)]) for _ in range(4)]
    for batch in batches:
        batch.start()
    with ThreadPoolExecutor(1) as engine:
        for future in [engine.submit(batch.run) for batch in batches]:
            future.result(WAIT_S)
    cluster.settle()


@every_ring
def test_layers_may_come_from_storage_while_others_are_computed(cluster: Cluster) -> None:
    chunk = Chunk(cluster, (5, 6), 2, layers_ready=0)
    batch = Batch(cluster, [chunk])
    assert not batch.feeds[0].ready.done()
    chunk.loaded(1)
    batch.start()
    with ThreadPoolExecutor(1) as engine:
        run = engine.submit(batch.run)
        for layers in (2, 4, 3, LAYERS):  # a late notice of fewer layers takes nothing back
            chunk.loaded(layers)
        run.result(WAIT_S)
    cluster.settle()


@pytest.mark.parametrize("failing_layer", [0, 1, LAYERS - 1])
def test_a_failed_load_aborts_its_batch_and_the_next_one_runs(cluster: Cluster, failing_layer: int) -> None:
    good, bad = Chunk(cluster, (3, 3), 2), Chunk(cluster, (3, 3), 2, layers_ready=0)
    bad.loaded(max(1, failing_layer))
    batch, following = Batch(cluster, [good, bad]), Batch(cluster, [Chunk(cluster, (4, 4), 2)])
    batch.start()
    following.start()
    cluster.nodes[1].source.load_failed(bad.leases[1], BlockCorruptError(b"key", "block key is damaged"))
    with pytest.raises(BlockCorruptError, match="damaged") as raised:
        batch.run()
    assert raised.value.key == b"key"
    assert [type(feed.error) for feed in batch.feeds] == [type(None), BlockCorruptError], "only one chunk is at fault"
    following.run()
    cluster.settle()
    again = Batch(cluster, [good])
    again.start()
    again.run()
    cluster.settle()
    for chunk in (good, bad):
        chunk.drop()


def test_a_load_that_fails_before_the_batch_is_formed_fails_the_feed(cluster: Cluster) -> None:
    chunk = Chunk(cluster, (3, 3), 1, layers_ready=0)
    feed = chunk.open()
    cluster.nodes[0].source.load_failed(chunk.leases[0], StoreError("the disk is gone"))
    with pytest.raises(StoreError, match="the disk is gone"):
        feed.ready.result(WAIT_S)
    cluster.sink.close(feed)
    cluster.settle()


DEAD = "died|is closing"  # the latter is what an endpoint that is closed says itself, if it still can


@pytest.mark.parametrize("when", ["before it is opened", "before the batch", "in the batch"])
def test_a_dead_source_ends_what_came_from_it(cluster: Cluster, when: str) -> None:
    chunk, healthy = Chunk(cluster, (3, 3), 2), Chunk(cluster, (3, 0), 2)
    dead = cluster.nodes[1].endpoint

    def die() -> None:
        dead.close()
        cluster.sink.source_died(dead.agent_name)
        cluster.endpoint.forget(dead.agent_name)

    if when == "before it is opened":
        die()
        feed = chunk.open()
        with pytest.raises(TransferError, match=DEAD):
            feed.ready.result(WAIT_S)
        cluster.sink.close(feed)
    elif when == "before the batch":
        feed = chunk.open()
        feed.ready.result(WAIT_S)
        die()
        gate = cluster.sink.start_batch([feed], [0], WAIT_S)
        with pytest.raises(TransferError, match=DEAD):
            gate.enter(0)
        gate.finish().result(WAIT_S)
    else:
        chunk = Chunk(cluster, (3, 3), 2, layers_ready=0)
        chunk.loaded(2)
        batch = Batch(cluster, [chunk, healthy])
        batch.start()
        with ThreadPoolExecutor(1) as engine:
            run = engine.submit(batch.run)
            die()
            with pytest.raises(TransferError, match=DEAD):
                run.result(WAIT_S)
    cluster.nodes.pop()
    following = Batch(cluster, [healthy])
    following.start()
    following.run()
    cluster.settle()


def test_a_lost_source_keeps_only_its_rows(cluster: Cluster) -> None:
    """Its batch fails at once, others go on in the remaining rows; all may be used when it is known to be dead."""
    chunk = Chunk(cluster, (3, 3), 2, layers_ready=0)
    chunk.loaded(2)
    batch, over_it = Batch(cluster, [chunk]), Batch(cluster, [Chunk(cluster, (5, 0), 2)])
    beside_it = Batch(cluster, [Chunk(cluster, (5, 0), 2)], first_row=8)
    for each in (batch, over_it, beside_it):
        each.start()
    lost = cluster.nodes[1].endpoint
    with ThreadPoolExecutor(1) as engine:
        run = engine.submit(batch.run)
        lost.close()
        cluster.sink.source_lost(lost.agent_name)
        with pytest.raises(TransferError, match="lost"):
            run.result(WAIT_S)
    assert cluster.sink.free_rows() == [range(3), range(6, CAPACITY)]
    with pytest.raises(TransferError, match="laid out over"):
        over_it.run()
    beside_it.run()
    following = Batch(cluster, [Chunk(cluster, (2, 0), 1)])
    following.start()
    following.run()
    assert not cluster.sink.idle, "it may still write to the window"
    cluster.sink.source_died(lost.agent_name)
    assert cluster.sink.free_rows() == [range(CAPACITY)]
    cluster.nodes.pop()
    cluster.settle()


@pytest.mark.parametrize("seed", range(6))
def test_messages_may_be_lost_or_come_twice(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """As when a connection breaks and is made anew: every layer still lands once, and nothing waits for ever."""
    monkeypatch.setattr(sink_module, "REFRESH_S", 0.02)
    random = np.random.default_rng(seed)
    lost: Counter[str] = Counter()

    def unreliable(handler: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
        def handle(sender: str, message: Any) -> None:
            chance = random.random()
            if chance < 0.3:
                lost[type(message).__name__] += 1
                return
            for _ in range(2 if chance > 0.8 else 1):
                handler(sender, message)

        return handle

    for endpoint in cluster.endpoints:
        for kind in (OpenStream, StreamReady, Credit, LayerLanded, CloseStream, StreamClosed):
            if kind in endpoint._handlers:
                endpoint.on(kind, unreliable(endpoint._handlers[kind]))
    stop = threading.Event()

    def refresh() -> None:
        while not stop.wait(0.01):
            cluster.sink.refresh()

    refresher = threading.Thread(target=refresh)
    refresher.start()
    try:
        for _ in range(3):
            unused = Chunk(cluster, (2, 2), 0, layers_ready=0)
            feed = unused.open()
            batches = [Batch(cluster, [Chunk(cluster, (3, 4), 2), Chunk(cluster, (2, 2), 1)]) for _ in range(2)]
            for batch in batches:
                batch.start()
            for batch in batches:
                batch.run()
            cluster.sink.close(feed)
            cluster.settle()
    finally:
        stop.set()
        refresher.join()
    assert set(lost) >= {"StreamReady", "Credit", "LayerLanded", "StreamClosed"}


def test_feeds_that_are_not_used_leave_nothing(cluster: Cluster) -> None:
    for layers_ready in (0, LAYERS):
        chunk = Chunk(cluster, (3, 3), 1, layers_ready)
        cluster.sink.close(chunk.open())
        feed = chunk.open()
        if layers_ready:
            feed.ready.result(WAIT_S)
        cluster.sink.close(feed)
        cluster.settle()
        chunk.drop()


def test_streams_of_a_lease_that_is_taken_back_end(cluster: Cluster) -> None:
    chunk = Chunk(cluster, (3, 3), 1, layers_ready=0)
    chunk.loaded(1)
    batch = Batch(cluster, [chunk])
    batch.start()
    chunk.drop()
    with pytest.raises(TransferError, match="released"):
        batch.run()
    late = chunk.open()
    with pytest.raises(TransferError, match="not valid"):
        late.ready.result(WAIT_S)
    cluster.sink.close(late)
    cluster.settle()


def test_a_batch_that_waits_in_vain_gives_up_at_its_deadline(cluster: Cluster) -> None:
    chunk = Chunk(cluster, (3, 3), 1, layers_ready=0)
    chunk.loaded(1)
    batch = Batch(cluster, [chunk], timeout_s=0.3)
    batch.start()
    with pytest.raises(DualPathError, match="layer 1 did not arrive in time"):
        batch.run()
    cluster.settle()


@pytest.mark.parametrize("position", [3, -1])
def test_positions_outside_a_lease_are_refused(cluster: Cluster, position: int) -> None:
    lease = cluster.nodes[0].lease([1, 2, 3], LAYERS)
    agent = cluster.nodes[0].endpoint.agent_name
    feed = cluster.sink.open([HitSource(agent, lease, (0, position), (0, 1))], NewKV(agent, lease, np.array([1], dtype=np.int32), 2))
    with pytest.raises(TransferError, match="not valid"):
        feed.ready.result(WAIT_S)
    cluster.settle()


def test_new_kv_for_a_lease_that_was_withdrawn_is_refused_and_reported(cluster: Cluster) -> None:
    cluster.nodes[0].endpoint.on(WriterDone, lambda sender, message: None)
    withdrawn, good = Chunk(cluster, (2, 2), 2), Chunk(cluster, (2, 2), 2)
    before = cluster.nodes[0].staging[withdrawn.new_slots].copy()
    batch = Batch(cluster, [withdrawn, good])
    batch.start()
    cluster.endpoint.finish_writes(cluster.nodes[0].endpoint.agent_name, withdrawn.new_lease, "cancelled")
    with pytest.raises(AssertionError):
        batch.run()  # `feed.error is None` does not hold, all layers were computed
    assert [type(feed.error).__name__ for feed in batch.feeds] == ["StaleEpochError", "NoneType"]
    np.testing.assert_array_equal(cluster.nodes[0].staging[withdrawn.new_slots], before)
    good.assert_delivered()
    cluster.settle()


def test_messages_of_strangers_change_nothing(cluster: Cluster) -> None:
    chunk = Chunk(cluster, (3, 3), 1, layers_ready=0)
    chunk.loaded(1)
    batch = Batch(cluster, [chunk])
    batch.start()
    for number in range(1, 5):
        cluster.sink._on_closed("stranger", StreamClosed(number, "no"))
    chunk.loaded(LAYERS)
    batch.run()
    cluster.settle()


@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_end_with_nothing_left(seed: int) -> None:
    """Batches of random size; loads progress, fail and leases vanish at random moments while the engine runs."""
    random = np.random.default_rng(seed)
    cluster = Cluster(ring_slots=int(random.integers(1, 4)), seed=seed)
    try:
        batches: list[tuple[Batch, bool]] = []
        with ThreadPoolExecutor(1) as engine, ThreadPoolExecutor(4) as storage:
            for _ in range(5):
                chunks = [
                    Chunk(cluster, (int(random.integers(0, 5)), int(random.integers(0, 5))), int(random.integers(1, 3)), layers_ready=0)
                    for _ in range(int(random.integers(1, 3)))
                ]
                for chunk in chunks:
                    chunk.loaded(1)
                batch = Batch(cluster, chunks)
                batch.start()
                fails = random.random() < 0.4
                stops = np.sort(random.integers(1, LAYERS + 1, 3)).tolist()
                victim = chunks[int(random.integers(0, len(chunks)))]
                side = int(random.integers(0, 2))

                def load(
                    chunks: list[Chunk] = chunks, fails: bool = fails, stops: list[int] = stops, victim: Chunk = victim, side: int = side
                ) -> None:
                    for stop in stops:
                        for chunk in chunks:
                            chunk.loaded(stop)
                    if fails:
                        cluster.nodes[side].source.load_failed(victim.leases[side], StoreError("the disk is gone"))
                    for chunk in chunks:
                        chunk.loaded(LAYERS)

                storage.submit(load)
                batches.append((batch, fails))
                batch.result = engine.submit(batch.run)  # type: ignore[attr-defined]
            for batch, fails in batches:
                error = batch.result.exception(WAIT_S)  # type: ignore[attr-defined]
                assert error is None or (fails and isinstance(error, StoreError)), error
        cluster.settle()
        for batch, _ in batches:
            for chunk in batch.chunks:
                chunk.drop()
        cluster.settle()
    finally:
        cluster.close()


@pytest.mark.parametrize("ring_slots", [1])
def test_a_lease_is_quiet_only_when_its_pushes_have_ended(cluster: Cluster) -> None:
    """It is taken back between a credit and the push that answers it."""
    chunk, node = Chunk(cluster, (6, 0), 1), cluster.nodes[0]
    pushed_before_quiet: list[int] = []
    quiet = threading.Event()

    def on_quiet() -> None:
        pushed_before_quiet.append(node.endpoint.stats.pushes["staging->window"])
        quiet.set()

    def on_credit(sink: str, credit: Credit) -> None:
        node.source._on_credit(sink, credit)
        node.source.drop_lease(chunk.leases[0], on_quiet)

    node.endpoint.on(Credit, on_credit)
    batch = Batch(cluster, [chunk])
    batch.start()
    assert quiet.wait(WAIT_S)
    assert pushed_before_quiet == [1]
    with pytest.raises(TransferError, match="released"):
        batch.run()
    cluster.settle()
