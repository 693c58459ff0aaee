"""LMCache's local-disk backend as a peer, run by the interpreter of a venv of its own (see peers.py for what goes over the pipe).

Only LMCache's own parts and what they need are imported here. Blocks lie in its pinned staging memory before a save is timed and are left
there by a load, as ours are, so neither side's copy to or from an engine is counted.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Any

WAIT_S = 120.0


class Disk:
    """Saves and loads `count` blocks of `block_bytes` under `folder`, as one process does."""

    def __init__(self, folder: str, block_bytes: int, count: int, direct: bool) -> None:
        import torch
        from lmcache.utils import CacheEngineKey
        from lmcache.v1.config import LMCacheEngineConfig
        from lmcache.v1.memory_management import MemoryFormat
        from lmcache.v1.metadata import LMCacheMetadata
        from lmcache.v1.storage_backend.local_cpu_backend import LocalCPUBackend
        from lmcache.v1.storage_backend.local_disk_backend import LocalDiskBackend

        layers, heads, head_dim = 32, 1, 64
        tokens = block_bytes // (layers * 2 * heads * head_dim * 2)
        room = 2.5 * count * block_bytes / 2**30 + 0.1
        config = LMCacheEngineConfig.from_defaults(
            chunk_size=tokens, local_cpu=False, max_local_cpu_size=room, local_disk=folder, max_local_disk_size=8 * room,
            extra_config={"use_odirect": direct},
        )  # fmt: skip
        metadata = LMCacheMetadata(
            model_name="bench", world_size=1, local_world_size=1, worker_id=0, local_worker_id=0, kv_dtype=torch.bfloat16,
            kv_shape=(layers, 2, tokens, heads, head_dim), chunk_size=tokens,
        )  # fmt: skip
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._memory = LocalCPUBackend(config, metadata, "cpu")
        self._disk = LocalDiskBackend(config, self._loop, self._memory, "cpu", None, metadata)
        shape = torch.Size([2, layers, tokens, heads * head_dim])
        self._count, self._round, self._folder = count, 0, folder
        self._key = lambda number: CacheEngineKey("bench", 1, 0, (self._round << 32) + number, torch.bfloat16)
        self._make = lambda: self._memory.allocate(shape, torch.bfloat16, MemoryFormat.KV_2LTD)
        self._wanted = Path(folder).parent.joinpath("blocks.bin").read_bytes()
        self._block_bytes = block_bytes

    def save(self) -> float:
        """Seconds until all blocks of a new round are on disk."""
        import torch

        self._round += 1
        objects = [self._make() for _ in range(self._count)]
        whole = torch.frombuffer(bytearray(self._wanted), dtype=torch.uint8).view(torch.bfloat16)
        for number, held in enumerate(objects):
            size = self._block_bytes // 2
            held.tensor.copy_(whole[number * size : (number + 1) * size].view(held.tensor.shape))
        landed = threading.Semaphore(0)
        start = time.perf_counter()
        for number, held in enumerate(objects):
            self._disk.submit_put_task(self._key(number), held, lambda key: landed.release())
        for _ in objects:
            if not landed.acquire(timeout=WAIT_S):
                raise RuntimeError("LMCache did not write a block in time")
        seconds = time.perf_counter() - start
        for held in objects:
            held.ref_count_down()
        return seconds

    def load(self) -> float:
        """Seconds; nothing is in the page cache, as after a restart or on another node."""
        for path in Path(self._folder).rglob("*"):
            if path.is_file():
                fd = os.open(path, os.O_RDONLY)
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
        start = time.perf_counter()
        objects = self._disk.batched_get_blocking([self._key(number) for number in range(self._count)])
        seconds = time.perf_counter() - start
        got = b"".join(bytes(held.byte_array) for held in objects if held is not None)
        for held in objects:
            if held is not None:
                held.ref_count_down()
        if got != self._wanted:
            raise RuntimeError("LMCache returned other bytes than were saved")
        return seconds


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    peer = Disk(**request)
    print("@ready", flush=True)
    for line in sys.stdin:
        seconds = {"save": peer.save, "load": peer.load}[line.strip()]()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(f"@{json.dumps({'seconds': seconds, 'peak_bytes': peak})}", flush=True)


if __name__ == "__main__":
    main()
