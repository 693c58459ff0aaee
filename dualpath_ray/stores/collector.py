"""Keeps a place within its byte budget: what has not been used for longest goes, ends of chains first.

A round: one process at a time (`Inventory.collecting`) lists the place, plans (kv/eviction.py), has the blocks taken out of the index,
waits until requests that were planned before that have opened theirs, and removes the bytes, a few at a time and only while the store
reads nothing. A block used meanwhile is kept, with everything above it. Whoever comes too late finds a missing block, which is a miss:
removal can cost time, never a right answer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from dualpath_ray.kv.eviction import plan_eviction, total_bytes
from dualpath_ray.stores.inventory import Entry, Inventory, Usage

HIGH, LOW = 0.95, 0.90  # collect when fuller than the one, down to the other: shares of the capacity
BATCH = 32  # removals between two looks at the read queue


class IndexKeeper(Protocol):
    """Who must hear of removals. Called on the collector's thread."""

    def forget(self, entries: Sequence[Entry]) -> bool:
        """Take blocks out of the index; false if that is not known to have happened, so the bytes must stay."""
        ...

    def restore(self, entries: Sequence[Entry]) -> None:
        """Some of them stay after all."""
        ...


@dataclass(frozen=True, slots=True)
class Round:
    """What a round found and did. `skipped` says why it did nothing."""

    blocks: int = 0
    nbytes: int = 0
    evicted_blocks: int = 0
    evicted_bytes: int = 0
    orphan_blocks: int = 0
    kept_blocks: int = 0
    swept_files: int = 0
    damaged_files: int = 0
    seconds: float = 0.0
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class CollectorSettings:
    """`orphan_age_s`: what hangs on a missing block, and what crashes left behind, may do so for this long. `grace_s`: between the index
    and the bytes.
    """

    capacity_bytes: int | None = None
    orphan_age_s: float = 3600.0
    grace_s: float = 2.0


class Collector:
    """One place's collector. `wait_idle(timeout_s)` returns when the store reads nothing, true, or when the time is up, false."""

    def __init__(
        self,
        inventory: Inventory,
        settings: CollectorSettings,
        index: IndexKeeper,
        wait_idle: Callable[[float], bool] = lambda timeout_s: True,
        closing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._inventory, self._settings, self._index = inventory, settings, index
        self._wait_idle, self._closing = wait_idle, closing

    def collect(self, dry_run: bool = False) -> Round:
        """One round, whether room is needed or not (orphans and leftovers go in any case). A dry run writes nothing, not even a lock.

        Raises StoreError.
        """
        start = time.monotonic()
        with nullcontext(True) if dry_run else self._inventory.collecting() as alone:
            if not alone:
                return Round(skipped="another process is collecting")
            entries = list(self._inventory.entries())
            held, capacity = total_bytes(entries), self._settings.capacity_bytes
            excess = 0 if capacity is None or held <= HIGH * capacity else held - int(LOW * capacity)
            plan = plan_eviction(entries, excess, self._inventory.now() - self._settings.orphan_age_s)
            doomed = [entries[number] for number in (*plan.orphans, *plan.victims)]
            if dry_run:
                removed, swept = doomed, 0
            else:
                removed = self._remove(doomed)
                swept = self._inventory.sweep(self._settings.orphan_age_s)
                previous = self._inventory.usage()
                number = previous.number + 1 if previous is not None else 1
                left = Usage(number, held - total_bytes(removed), len(entries) - len(removed), self._inventory.now())
                self._inventory.publish(left)
            orphans = {entries[number].key for number in plan.orphans}
            return Round(
                blocks=len(entries), nbytes=held, evicted_blocks=len(removed), evicted_bytes=total_bytes(removed),
                orphan_blocks=sum(entry.key in orphans for entry in removed), kept_blocks=len(doomed) - len(removed), swept_files=swept,
                damaged_files=self._inventory.damaged, seconds=time.monotonic() - start,
            )  # fmt: skip

    def _remove(self, doomed: Sequence[Entry]) -> list[Entry]:
        """Remove in order; returns what was removed."""
        if not doomed or not self._index.forget(doomed):
            return []
        time.sleep(self._settings.grace_s)
        removed: list[Entry] = []
        kept: list[Entry] = []
        needed: set[bytes] = set()  # parents of blocks that stay
        for start in range(0, len(doomed), BATCH):
            while not self._wait_idle(1.0) and not self._closing():
                pass
            going: list[Entry] = []
            for entry in doomed[start : start + BATCH]:
                if self._closing() or entry.key in needed or self._inventory.used_since(entry):
                    needed.add(entry.parent)
                    kept.append(entry)
                else:
                    going.append(entry)
            self._inventory.remove(going)
            removed += going
        if kept:
            self._index.restore(kept)
        return removed


class NoIndex:
    """For places that no running cluster looks into through us (`dualpath store gc`): readers find missing blocks, and compute them."""

    def forget(self, entries: Sequence[Entry]) -> bool:
        return True

    def restore(self, entries: Sequence[Entry]) -> None:
        return
