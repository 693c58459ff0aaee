"""Latency and bandwidth of the block store from this machine, with blocks that are removed again."""

from __future__ import annotations

import statistics
import time
import uuid

from dualpath_ray.config.storage import StorageSettings
from dualpath_ray.doctor.check import Check, failed, ok
from dualpath_ray.errors import DualPathError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, BlockStore
from dualpath_ray.stores.open import open_store
from dualpath_ray.transfer.memory import allocate

GEOMETRY = KVGeometry(layers=16, kv_heads=8, head_dim=128, dtype="bfloat16", block_tokens=64)  # blocks of 4 MiB
BLOCKS = 16
LOOKS = 5
TIMEOUT_S = 60.0


def check_store(storage: StorageSettings) -> list[Check]:
    """Write, read and remove some blocks of nobody's."""
    name = f"store {storage.s3.bucket if storage.kind == 's3' else storage.path}"
    remedy = "check storage.kind, storage.path or storage.s3, and this machine's rights there"
    try:
        store = open_store(storage, GEOMETRY, f"doctor-{uuid.uuid4().hex}")
        try:
            return [ok(name, _measure(store))]
        finally:
            store.close()
    except TimeoutError:
        return [failed(name, f"no answer within {TIMEOUT_S:.0f} s", remedy)]
    except DualPathError as error:
        return [failed(name, str(error), remedy)]


def _measure(store: BlockStore) -> str:
    size = GEOMETRY.full_block_bytes
    arena = allocate(BLOCKS * size)
    store.register(arena)
    parts = arena.reshape(BLOCKS, size)
    keys = [uuid.uuid4().bytes for _ in range(BLOCKS + 1)]
    blocks = [BlockBuffer(keys[number + 1], keys[number], parts[number]) for number in range(BLOCKS)]
    arena[:] = 1
    try:
        start = time.perf_counter()
        for outcome in store.write(blocks).result(TIMEOUT_S):
            if outcome is not None:
                raise outcome
        wrote_s = time.perf_counter() - start
        looks = [_read(store, blocks[:1], 1) for _ in range(LOOKS)]
        read_s = _read(store, blocks, GEOMETRY.layers)
    finally:
        for block in blocks:
            store.remove(block.key)
    total = BLOCKS * size
    return (
        f"first layer of one block {1e3 * statistics.median(looks):.1f} ms, {BLOCKS} blocks of {size >> 20} MiB: "
        f"read {total / read_s / 1e6:.0f} MB/s, write {total / wrote_s / 1e6:.0f} MB/s"
    )


def _read(store: BlockStore, blocks: list[BlockBuffer], layers: int) -> float:
    start = time.perf_counter()
    reader = store.open(blocks).result(TIMEOUT_S)
    reader.read(0, layers).result(TIMEOUT_S)
    reader.close()
    return time.perf_counter() - start
