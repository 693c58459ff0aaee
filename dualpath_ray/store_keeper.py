"""A gateway's share in keeping the store it uses within its budget.

Every gateway looks from time to time; whoever finds that room is needed and is first makes it, for all (stores/collector.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from dualpath_ray.errors import DualPathError
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.collector import HIGH, Collector, CollectorSettings, Round
from dualpath_ray.stores.inventory import Entry, Inventory, Usage

log = logging.getLogger(__name__)

TOLD_TIMEOUT_S = 30.0
INDEX_PART = 10_000  # blocks per report


@dataclass(frozen=True, slots=True)
class KeeperSettings:
    """Without `capacity_bytes` nothing is collected. Times in seconds; `grace_s` lies between the index and the bytes."""

    capacity_bytes: int | None = None
    interval_s: float = 30.0
    orphan_age_s: float = 3600.0
    grace_s: float = 2.0


class StoreKeeper:
    """Used on one event loop; the work is done on a thread.

    `on_index(added, removed)` is told of blocks that go or stay, `told(timeout_s)` waits until that has been taken note of.
    """

    def __init__(
        self,
        store: BlockStore,
        settings: KeeperSettings,
        on_index: Callable[[list[tuple[bytes, bytes]], list[bytes]], None],
        told: Callable[[float], Awaitable[bool]],
    ) -> None:
        self._store, self._settings = store, settings
        self._on_index, self._told = on_index, told
        self._loop: asyncio.AbstractEventLoop
        self._task: asyncio.Task[None] | None = None
        self._closing = False
        self._name = uuid.uuid4().hex
        self._inventory: Inventory | None = None
        self.evicted_blocks = 0
        self.evicted_bytes = 0

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        if self._settings.capacity_bytes is not None:
            self._task = self._loop.create_task(self._run())

    async def close(self) -> None:
        """Returns when nothing is being removed any more."""
        self._closing = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while not self._closing:
            step = asyncio.create_task(asyncio.to_thread(self._step))
            try:
                await asyncio.shield(step)
            except asyncio.CancelledError:
                await asyncio.gather(step, return_exceptions=True)
                raise
            except DualPathError as error:
                log.warning("the store cannot be kept in order: %s", error)
            except Exception:
                log.exception("the store cannot be kept in order")
            await asyncio.sleep(self._settings.interval_s)

    # ---- on the thread

    def _step(self) -> None:
        """Collect if need be, or if nobody has for long."""
        if self._inventory is None:
            self._inventory = self._store.inventory()
        inventory, budget, capacity = self._inventory, self._store.budget, self._settings.capacity_bytes or 0
        usage = self._look(inventory)
        if usage is not None and budget.used_bytes <= HIGH * capacity and time.time() - usage.at < self._settings.orphan_age_s:
            return
        options = CollectorSettings(capacity, self._settings.orphan_age_s, self._settings.grace_s)
        done = Collector(inventory, options, self, self._store.wait_idle, lambda: self._closing).collect()
        self._note(done)
        self._look(inventory)

    def _look(self, inventory: Inventory) -> Usage | None:
        """Learn how full the place is, and let others learn what has been written from here."""
        usage, budget = inventory.usage(), self._store.budget
        if usage is not None:
            budget.learn(usage, inventory.written_by_others(self._name, usage.number))
            inventory.note_written(self._name, usage.number, budget.written_bytes)
        return usage

    def _note(self, done: Round) -> None:
        self.evicted_blocks += done.evicted_blocks
        self.evicted_bytes += done.evicted_bytes
        if done.evicted_blocks or done.swept_files:
            log.info(
                "store: %d of %d blocks removed (%d bytes, %d of the blocks orphans), %d leftovers swept, in %.1f s",
                done.evicted_blocks, done.blocks, done.evicted_bytes, done.orphan_blocks, done.swept_files, done.seconds,
            )  # fmt: skip

    def forget(self, entries: Sequence[Entry]) -> bool:
        return asyncio.run_coroutine_threadsafe(self._forget(entries), self._loop).result()

    async def _forget(self, entries: Sequence[Entry]) -> bool:
        for start in range(0, len(entries), INDEX_PART):
            self._on_index([], [entry.key for entry in entries[start : start + INDEX_PART]])
            if not await self._told(TOLD_TIMEOUT_S):
                self._restore(entries[: start + INDEX_PART])
                log.warning("the scheduler does not answer, so nothing is removed from the store now")
                return False
        return True

    def restore(self, entries: Sequence[Entry]) -> None:
        self._loop.call_soon_threadsafe(self._restore, entries)

    def _restore(self, entries: Sequence[Entry]) -> None:
        self._on_index([(entry.key, entry.parent) for entry in entries], [])
