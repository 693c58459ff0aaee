"""The decode engine's KV memory: equal blocks, handed out and taken back."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch

from dualpath_ray.engine.memory import kv_tensor
from dualpath_ray.errors import DualPathError, OverloadedError
from dualpath_ray.kv.geometry import KVGeometry

BlockIds = npt.NDArray[np.int32]


class OutOfBlocksError(OverloadedError):
    """The pool has not as many free blocks; wait for running sequences to end."""


class PagedPool:
    """Tensor `[layers, blocks, block_tokens, 2, kv_heads, *]`: per layer an array of Layer Blocks. All methods are thread safe.

    Layer-major, because attention reads one layer of all sequences at a time. Page-aligned memory on the CPU.
    """

    def __init__(self, geometry: KVGeometry, blocks: int, device: str | torch.device = "cpu") -> None:
        if blocks < 1:
            raise ValueError(f"a pool needs at least 1 block, not {blocks}")
        self.geometry = geometry
        self.blocks = blocks
        self.tensor = kv_tensor((geometry.layers, blocks, geometry.block_tokens), geometry, device)
        self._free = np.ones(blocks, dtype=np.bool_)
        self._free_count = blocks
        self._lock = threading.Lock()

    @property
    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def free_blocks(self) -> int:
        return self._free_count

    def rows(self, layer: int) -> torch.Tensor:
        """A layer as `[blocks * block_tokens, 2, kv_heads, *]`: row `b * block_tokens + i` is token i of block b."""
        return self.tensor[layer].flatten(0, 1)

    def allocate(self, count: int) -> BlockIds:
        """Take `count` blocks; whoever holds them must `release` them. Raises OutOfBlocksError, taking none.

        One run of neighbours if there is one (attention then reads them in place): the shortest that suffices, so that long runs stay
        whole. Otherwise as few runs as possible.
        """
        with self._lock:
            if count > self._free_count:
                raise OutOfBlocksError(
                    f"{count} KV blocks wanted, {self._free_count} of {self.blocks} free; retry later or enlarge the decode pool"
                )
            starts, lengths = self._free_runs()
            sufficient = np.flatnonzero(lengths >= count)
            if len(sufficient):
                start = starts[sufficient[np.argmin(lengths[sufficient])]]
                ids = np.arange(start, start + count, dtype=np.int32)
            else:
                longest_first = np.argsort(-lengths, kind="stable")
                ids = np.concatenate([np.arange(starts[i], starts[i] + lengths[i], dtype=np.int32) for i in longest_first])[:count]
            self._free[ids] = False
            self._free_count -= count
            return ids

    def release(self, ids: Iterable[int]) -> None:
        """Give blocks back. Raises DualPathError, changing nothing, if one of them is not held: its holder has a bug."""
        wanted = np.fromiter(ids, dtype=np.int64)
        with self._lock:
            if ((wanted < 0) | (wanted >= self.blocks)).any():
                raise DualPathError(f"release of blocks outside the pool of {self.blocks}: {wanted.tolist()}")
            if self._free[wanted].any() or len(np.unique(wanted)) != len(wanted):
                raise DualPathError(f"release of blocks that are not held, or twice: {wanted.tolist()}")
            self._free[wanted] = True
            self._free_count += len(wanted)

    def check_integrity(self) -> None:
        """Raises DualPathError if the books do not balance."""
        with self._lock:
            counted = int(self._free.sum())
            if counted != self._free_count:
                raise DualPathError(f"pool books do not balance: {self._free_count} blocks counted free, {counted} marked free")

    def _free_runs(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        return edges[::2], edges[1::2] - edges[::2]
