from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate, round_up

PAGED = KVGeometry(layers=6, kv_heads=2, head_dim=16, dtype="float32", block_tokens=16)  # Layer Blocks of one page
ODD = KVGeometry(layers=5, kv_heads=1, head_dim=6, dtype="bfloat16", block_tokens=60)  # Layer Blocks of 1,440 bytes, 7,200 in all
FINGERPRINT = "model-a"

OpenStore = Callable[..., DirectoryStore]


def make_blocks(geometry: KVGeometry, count: int, seed: int = 0, memory: np.ndarray | None = None) -> list[BlockBuffer]:
    """Random blocks, each at a page of `memory` (page-aligned memory of their own by default)."""
    random = np.random.default_rng(seed)
    stride = round_up(geometry.full_block_bytes, PAGE_BYTES)
    memory = allocate(count * stride) if memory is None else memory
    blocks = []
    parent = random.bytes(16)
    for i in range(count):
        data = memory[i * stride : i * stride + geometry.full_block_bytes]
        data[:] = random.integers(0, 256, data.nbytes, dtype=np.uint8)
        key = random.bytes(16)
        blocks.append(BlockBuffer(key, parent, data))
        parent = key
    return blocks


def emptied(blocks: list[BlockBuffer]) -> list[BlockBuffer]:
    """Buffers to read the same blocks into, aligned like theirs."""
    stride = round_up(blocks[0].data.nbytes, PAGE_BYTES)
    memory = allocate(stride * len(blocks))
    return [BlockBuffer(block.key, block.parent, memory[i * stride : i * stride + block.data.nbytes]) for i, block in enumerate(blocks)]


def block_path(folder: Path, key: bytes) -> Path:
    return folder / key[:1].hex() / f"{key.hex()}.kv1"


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[OpenStore]:
    """Opens directory stores in one directory and closes them at the end; none may have a file open or work queued then."""
    stores = []

    def open_one(
        geometry: KVGeometry = PAGED, fingerprint: str = FINGERPRINT, path: Path | None = None, **settings: object
    ) -> DirectoryStore:
        store = DirectoryStore(path or tmp_path / "store", geometry, fingerprint, DirectorySettings(**settings))  # type: ignore[arg-type]
        stores.append(store)
        return store

    yield open_one
    for store in stores:
        store.close()
        left = store.stats()
        assert (left["open_files"], left["queued_reads"], left["queued_writes"]) == (0, 0, 0)
