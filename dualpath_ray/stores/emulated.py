"""A slow or faulty storage, emulated on top of a real store.

What is emulated: the bandwidth of one storage NIC and what lies behind it (reads share one, writes another, as on a full-duplex
link), latency, jitter, data that arrives late layer by layer, and failures. The bytes are really read and written by the inner
store; the emulation withholds completions until the emulated device would have been done, and reports failures that did not
happen. It cannot be faster than the inner store.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeVar

from dualpath_ray.errors import BlockCorruptError, ConfigError, StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, BlockReader, BlockStore, Bytes, StoredBlock
from dualpath_ray.stores.budget import Budget
from dualpath_ray.stores.inventory import Inventory

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class EmulationSettings:
    """Bandwidths in bytes/s (0: as fast as the inner store), times in seconds, rates as probabilities per call.

    Each call takes `latency_s` plus up to `jitter_s`. `delay_layer` holds back reads that contain a layer. `error_rate` fails a
    call with StoreError; `corrupt_rate` damages one block's bytes and reports it as a checksum would; `stall_rate` holds a call
    back for `stall_s` (infinity: until the store is closed). `seed` fixes the sequence of random choices.
    """

    read_bandwidth: float = 0.0
    write_bandwidth: float = 0.0
    latency_s: float = 0.0
    jitter_s: float = 0.0
    delay_layer: Mapping[int, float] = field(default_factory=dict)
    error_rate: float = 0.0
    corrupt_rate: float = 0.0
    stall_rate: float = 0.0
    stall_s: float = math.inf
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("read_bandwidth", "write_bandwidth", "latency_s", "jitter_s", "stall_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"storage emulation: {name} must be 0 or more, not {getattr(self, name)}")
        for name in ("error_rate", "corrupt_rate", "stall_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"storage emulation: {name} must be between 0 and 1, not {getattr(self, name)}")


class Link:
    """A link of `bandwidth` bytes/s that serves in order of request. Thread safe."""

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free_at = 0.0

    def reserve(self, nbytes: int, now: float) -> float:
        """When `nbytes` asked for at `now` will have passed."""
        if not self._bandwidth:
            return now
        with self._lock:
            self._free_at = max(self._free_at, now) + nbytes / self._bandwidth
            return self._free_at


class EmulatedStore:
    """A BlockStore that behaves like `inner` behind a slower device. Owns `inner`: `close` closes it."""

    def __init__(self, inner: BlockStore, geometry: KVGeometry, settings: EmulationSettings) -> None:
        self.inner = inner
        self.geometry = geometry
        self.settings = settings
        self._reads = Link(settings.read_bandwidth)
        self._writes = Link(settings.write_bandwidth)
        self._random = random.Random(settings.seed)
        self._condition = threading.Condition()
        self._withheld: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._closing = self._drained = False
        self._faults = dict.fromkeys(("emulated_errors", "emulated_corruptions", "emulated_stalls"), 0)
        self._timer = threading.Thread(target=self._run, name="store-emulation", daemon=True)
        self._timer.start()

    def register(self, arena: Bytes) -> None:
        self.inner.register(arena)

    def scan(self) -> Iterator[StoredBlock]:
        return self.inner.scan()

    def remove(self, key: bytes) -> None:
        self.inner.remove(key)

    def touch(self, keys: Sequence[bytes]) -> None:
        self.inner.touch(keys)

    def wait_idle(self, timeout_s: float) -> bool:
        return self.inner.wait_idle(timeout_s)

    @property
    def budget(self) -> Budget:
        return self.inner.budget

    def inventory(self) -> Inventory:
        return self.inner.inventory()

    def layer_groups(self) -> int:
        return self.inner.layer_groups()

    def open(self, blocks: Sequence[BlockBuffer]) -> Future[BlockReader]:
        due, failure = self._draw(time.monotonic())
        return self._withhold(self.inner.open(blocks), due, failure, lambda reader: EmulatedReader(self, reader, blocks))

    def write(self, blocks: Sequence[BlockBuffer]) -> Future[list[Exception | None]]:
        nbytes = len(blocks) * self.geometry.full_block_bytes
        due, failure = self._draw(self._writes.reserve(nbytes, time.monotonic()))
        return self._withhold(self.inner.write(blocks), due, None, lambda outcomes: [failure] * len(blocks) if failure else outcomes)

    def stats(self) -> dict[str, float]:
        with self._condition:
            return {**self.inner.stats(), **self._faults, "emulated": 1.0, "withheld": float(len(self._withheld))}

    def close(self) -> None:
        """Ends stalled calls with StoreError and everything else without further delay."""
        with self._condition:
            if self._closing:
                return
            self._closing = True
            self._condition.notify()
        self.inner.close()
        self._timer.join()
        while True:
            with self._condition:
                if not self._withheld:
                    self._drained = True
                    return
                end = heapq.heappop(self._withheld)[2]
            end()

    def schedule_read(self, nbytes: int, layers: range, not_before: float) -> tuple[float, StoreError | None]:
        """When a read of these layers is due, if it fails in itself, and takes its share of the link."""
        due, failure = self._draw(self._reads.reserve(nbytes, time.monotonic()))
        late = max((delay for layer, delay in self.settings.delay_layer.items() if layer in layers), default=0.0)
        return max(due + late, not_before), failure

    def draw_corruption(self, blocks: int) -> tuple[int, random.Random] | None:
        with self._condition:
            if not blocks or self._random.random() >= self.settings.corrupt_rate:
                return None
            self._faults["emulated_corruptions"] += 1
            return self._random.randrange(blocks), random.Random(self._random.random())

    def _draw(self, passed_at: float) -> tuple[float, StoreError | None]:
        settings = self.settings
        with self._condition:
            due = passed_at + settings.latency_s + self._random.random() * settings.jitter_s
            if self._random.random() < settings.stall_rate:
                self._faults["emulated_stalls"] += 1
                due += settings.stall_s
            if self._random.random() >= settings.error_rate:
                return due, None
            self._faults["emulated_errors"] += 1
        return due, StoreError("emulated storage failure")

    def _withhold(self, inner: Future[T], due: float, failure: Exception | None, convert: Callable[[T], object]) -> Future:  # type: ignore[type-arg]
        """A future that ends as `inner` does (its result converted), but not before `due`, or fails with `failure`."""
        outer: Future = Future()  # type: ignore[type-arg]
        outer.set_running_or_notify_cancel()

        def end() -> None:
            error = inner.exception() or failure
            if error is None and math.isinf(due):
                error = StoreError("emulated stall: the store was closed")
            try:
                result = None if error is not None else convert(inner.result())
            except Exception as conversion:
                error = conversion
            if error is not None:
                outer.set_exception(error)
            else:
                outer.set_result(result)

        def landed(_: object) -> None:
            with self._condition:
                drained = self._drained
                if not drained:
                    heapq.heappush(self._withheld, (due, next(self._numbers), end))
                    self._condition.notify()
            if drained:
                end()

        inner.add_done_callback(landed)
        return outer

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closing:
                    return
                now = time.monotonic()
                wait = self._withheld[0][0] - now if self._withheld else None
                if wait is None or wait > 0:
                    self._condition.wait(None if wait is None or math.isinf(wait) else wait)
                    continue
                end = heapq.heappop(self._withheld)[2]
            end()


class EmulatedReader:
    """A BlockReader of EmulatedStore."""

    def __init__(self, store: EmulatedStore, inner: BlockReader, blocks: Sequence[BlockBuffer]) -> None:
        self._store = store
        self._inner = inner
        self._blocks = blocks
        self._lock = threading.Lock()
        self._last_due = 0.0

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        size = self._store.geometry.layer_block_bytes
        with self._lock:
            inner = self._inner.read(first_layer, stop_layer)
            nbytes = len(self._blocks) * (stop_layer - first_layer) * size
            due, failure = self._store.schedule_read(nbytes, range(first_layer, stop_layer), self._last_due)
            self._last_due = due
        corruption = self._store.draw_corruption(len(self._blocks))

        def damage(_: None) -> None:
            if corruption is None:
                return
            index, choice = corruption
            block = self._blocks[index]
            block.data[choice.randrange(first_layer * size, stop_layer * size)] ^= 1 << choice.randrange(8)
            raise BlockCorruptError(block.key, f"block {block.key.hex()}: emulated damage")

        return self._store._withhold(inner, due, failure, damage)

    def close(self) -> None:
        self._inner.close()
