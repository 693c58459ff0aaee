"""What a block store is: a place that keeps Full Blocks under their keys, durably.

A store is used by exactly one process (its gateway), from any thread. Its work runs in threads of its own; calls return
`concurrent.futures.Future`s at once. Memory named in a call belongs to the caller and must stay valid and untouched until
the call's future is done. Nothing here knows about Ray, NIXL peers, leases or requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from dualpath_ray.stores.budget import Budget
from dualpath_ray.stores.inventory import Inventory

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A block as listed by a store. `parent` is the previous block's key, or the root key for a first block."""

    key: bytes
    parent: bytes
    nbytes: int


@dataclass(frozen=True, slots=True)
class BlockBuffer:
    """A Full Block in memory: `data` is uint8 `[full_block_bytes]`, contiguous; page aligned when it lies in a registered arena."""

    key: bytes
    parent: bytes
    data: Bytes


class BlockReader(Protocol):
    """An open read of some blocks. No layer of a block is delivered before its header has been checked (key, parent, geometry, fingerprint,
    version).
    """

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        """Read layers `[first_layer, stop_layer)` of all the blocks into their buffers and verify their checksums.

        Reads of one reader complete in the order they were submitted. The future raises BlockError (which names the first bad
        block) or StoreError; bytes of `[first_layer, stop_layer)` are then undefined.
        """
        ...

    def close(self) -> None:
        """Free file handles after outstanding reads have ended. Idempotent."""
        ...


class BlockStore(Protocol):
    """Keeps Full Blocks. All methods may be called from any thread."""

    def register(self, arena: Bytes) -> None:
        """Name the memory that buffers will lie in, once, before the first read or write (for NIXL registration)."""
        ...

    def scan(self) -> Iterator[StoredBlock]:
        """List the blocks that belong to this geometry and fingerprint; skips (and counts) foreign or damaged entries."""
        ...

    def open(self, blocks: Sequence[BlockBuffer]) -> Future[BlockReader]:
        """Open blocks for reading; until the reader is closed the buffers are its own.

        The future raises BlockMissingError, BlockCorruptError or StoreError.
        """
        ...

    def write(self, blocks: Sequence[BlockBuffer]) -> Future[list[Exception | None]]:
        """Make blocks durable, each atomically; one outcome per block, None for success. A key that exists already is a success."""
        ...

    def remove(self, key: bytes) -> None:
        """Drop a block if it is there (used for corrupt ones)."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """These blocks were used without being read here (another memory had them). What is read or written is noted by the store."""
        ...

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no read is queued or under way; false when the time was up before."""
        ...

    @property
    def budget(self) -> Budget:
        """How full the place is; writes that do not fit fail with StoreError, and are counted as `refused_writes`."""
        ...

    def inventory(self) -> Inventory:
        """The place as a whole, for its collector."""
        ...

    def layer_groups(self) -> int:
        """Into how many layer ranges a read may usefully be cut (1 when ranges of layers cannot be read separately)."""
        ...

    def stats(self) -> dict[str, float]:
        """Counters since start: read_bytes, written_bytes, read_seconds, write_seconds, corrupt_blocks, foreign_files, ..."""
        ...

    def close(self) -> None:
        """Stop the threads after outstanding work has ended. Idempotent."""
        ...
