"""Staging's cache tier: Full Blocks that stay in their slots after their lease, under their keys, until the slots are needed.

A resident block is a copy of a durable one and is never written to. Leases that use it *pin* it (sharing its slot, not copying it);
a block that is not pinned may go at any time. Which one goes first is `dualpath_ray.kv.s3_fifo`'s choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from dualpath_ray.kv.s3_fifo import S3Fifo

Change = Callable[[bytes, bool], None]


@dataclass(slots=True)
class _Resident:
    slot: int
    pins: int


class ResidentBlocks:
    """At most `capacity` blocks. `on_change(key, resident)` hears of each that comes or goes. Used by `StagingBuffer` only."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.on_change: Change = lambda key, resident: None
        self._blocks: dict[bytes, _Resident] = {}
        self._order = S3Fifo(max(1, capacity))
        self._pinned = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def evictable(self) -> int:
        return len(self._blocks) - self._pinned

    def pinned_among(self, keys: Iterable[bytes]) -> int:
        """How many of `keys` are in use by leases already, so that one more lease of them takes no slot."""
        if not self._pinned:
            return 0
        return sum((block := self._blocks.get(key)) is not None and block.pins > 0 for key in keys)

    def pin(self, key: bytes) -> int | None:
        """The slot of a block that must stay until `unpin`; None if the block is not here."""
        block = self._blocks.get(key)
        if block is None:
            return None
        self._order.touch(key)
        self._pinned += block.pins == 0
        block.pins += 1
        return block.slot

    def unpin(self, key: bytes) -> None:
        block = self._blocks.get(key)
        if block is None:
            raise AssertionError(f"block {key.hex()} went while it was in use")
        block.pins -= 1
        self._pinned -= block.pins == 0

    def add(self, key: bytes, slot: int) -> bool:
        """Make the block in `slot` resident, pinned once. False if it is already, or if there is no room: ask `evict` first."""
        if key in self._blocks or len(self._blocks) >= self.capacity:
            return False
        self._blocks[key] = _Resident(slot, pins=1)
        self._pinned += 1
        self._order.add(key)
        self.on_change(key, True)
        return True

    def __contains__(self, key: object) -> bool:
        return key in self._blocks

    def evict(self) -> int | None:
        """Forget a block that nobody uses; returns its slot. None if all are pinned."""
        if not self.evictable:
            return None
        key = self._order.evict(lambda key: self._blocks[key].pins > 0)
        if key is None:
            return None
        self.evicted += 1
        self.on_change(key, False)
        return self._blocks.pop(key).slot

    def slots(self) -> dict[bytes, int]:
        return {key: block.slot for key, block in self._blocks.items()}

    def check_integrity(self, users: Iterable[bytes]) -> None:
        """`users`: the key of each use by a lease. Raises AssertionError if pins and uses differ."""
        uses: dict[bytes, int] = dict.fromkeys(self._blocks, 0)
        for key in users:
            if key not in uses:
                raise AssertionError(f"a lease uses block {key.hex()}, which is not resident")
            uses[key] += 1
        wrong = {key.hex(): (block.pins, uses[key]) for key, block in self._blocks.items() if block.pins != uses[key]}
        if wrong or self._pinned != sum(count > 0 for count in uses.values()) or len(self._order) != len(self._blocks):
            raise AssertionError(f"resident blocks: pins and uses differ: {wrong}, {self._pinned} counted as pinned")
