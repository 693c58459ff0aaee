"""Blocks to measure stores with, and how they are saved, loaded and timed."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualpath_ray.errors import StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, BlockStore, Bytes
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.transfer.memory import HugePages, allocate

LAYERS = 32
HEAD_DIM = 64
UNIT = LAYERS * 2 * HEAD_DIM * 2  # bytes of one token
FINGERPRINT = "benchmark"
REQUESTS, REQUEST_BLOCKS = 4, 16
READS = 3  # of all blocks in a round, by each side


class Unchecked(BlockFormat):
    """The format without verification of data, to tell what verification costs."""

    def verify(self, header: BlockHeader, data: Bytes, first_layer: int, stop_layer: int) -> None:
        return


@dataclass(frozen=True, slots=True)
class Case:
    """`blocks` of one size in one array `arena` of `pages`, `wanted` a copy of their bytes, `depth` how many may be under way."""

    block_bytes: int
    depth: int
    geometry: KVGeometry
    blocks: Sequence[BlockBuffer]
    arena: Bytes
    wanted: Bytes
    pages: HugePages

    @property
    def name(self) -> str:
        return f"{self.block_bytes >> 10} KiB, depth {self.depth}"

    def forget(self) -> None:
        self.arena[:] = 0

    def check(self) -> None:
        """The bytes in memory are those that were written."""
        if not np.array_equal(self.arena, self.wanted):
            raise StoreError("the store returned other bytes than were written")


def make_case(block_bytes: int, depth: int, total_bytes: int, pages: HugePages = "transparent") -> Case:
    """Random blocks of about `block_bytes`, `total_bytes` in all, at least one. Pages are by default as in a gateway."""
    block_bytes = max(UNIT, block_bytes // UNIT * UNIT)
    geometry = KVGeometry(LAYERS, 1, HEAD_DIM, "bfloat16", block_bytes // UNIT)
    count = max(1, total_bytes // block_bytes)
    random = np.random.default_rng(0)
    arena = allocate(count * block_bytes, pages)
    arena.view(np.uint64)[:] = random.integers(0, 1 << 63, arena.nbytes // 8, dtype=np.uint64)
    keys = [random.bytes(16) for _ in range(count + 1)]
    parts = arena.reshape(count, block_bytes)
    blocks = [BlockBuffer(keys[i + 1], keys[i], parts[i]) for i in range(count)]
    return Case(block_bytes, depth, geometry, blocks, arena, arena.copy(), pages)


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def save(store: BlockStore, case: Case) -> None:
    for outcome in store.write(case.blocks).result():
        if outcome is not None:
            raise outcome


def load(store: BlockStore, blocks: Sequence[BlockBuffer], layers: int) -> None:
    """As a gateway reads: all blocks of a request, one group of layers after the other, all groups asked for at once."""
    reader = store.open(blocks).result()
    groups = store.layer_groups()
    cuts = [layers * group // groups for group in range(groups + 1)]
    try:
        for future in [reader.read(first, stop) for first, stop in itertools.pairwise(cuts)]:
            future.result()
    finally:
        reader.close()


def load_requests(store: BlockStore, case: Case) -> None:
    """As a busy gateway reads: a few requests at once, so that one's headers are read during another's data."""
    size = min(REQUEST_BLOCKS, -(-len(case.blocks) // REQUESTS))
    requests = [case.blocks[start : start + size] for start in range(0, len(case.blocks), size)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda blocks: load(store, blocks, case.geometry.layers), requests))


def latencies(load_one: Callable[[int], None], case: Case) -> list[float]:
    """Seconds of each block's load, with `case.depth` loads under way."""
    numbers, seconds = iter(range(len(case.blocks))), [0.0] * len(case.blocks)
    lock = threading.Lock()

    def run() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            seconds[number] = timed(lambda number=number: load_one(number))  # type: ignore[misc]

    threads = [threading.Thread(target=run) for _ in range(case.depth)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds


def in_turns(number: int, sides: Sequence[Callable[[], None]], times: int) -> list[Callable[[], None]]:
    """The sides' actions `times` each, one after the other; who begins changes from time to time, and with the number of the round."""
    return [act for turn in range(number, number + times) for act in (sides if turn % 2 == 0 else sides[::-1])]


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast ours is: the median of the rounds' ratios, since both sides of a round meet the same noise."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


def rate(case: Case, seconds: Sequence[float]) -> float:
    """Median in GB/s."""
    return case.arena.nbytes / statistics.median(seconds) / 1e9


@contextlib.contextmanager
def scratch(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="dualpath-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
