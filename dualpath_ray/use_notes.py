"""Tells the store which of its blocks are used from memory, so that its collector does not take the hottest blocks for the coldest.

One key for each request is enough, the deepest of those it took from memory: a use of a block is a use of all that it continues
(kv/eviction.py). They are collected and handed to the store together, from time to time and on a thread: `BlockStore.touch` may be a
system call or a request for each of them.
"""

from __future__ import annotations

import asyncio
import logging

from dualpath_ray.errors import DualPathError
from dualpath_ray.stores.base import BlockStore

log = logging.getLogger(__name__)

MAX_KEYS = 65_536  # waiting at a time; the newest are kept


class UseNotes:
    """Used on one event loop. A key reaches the store at most once in `interval_s`, and no later than that after its use."""

    def __init__(self, store: BlockStore, interval_s: float) -> None:
        self._store, self._interval_s = store, interval_s
        self._keys: dict[bytes, None] = {}  # in order of first use since they were last handed over
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def note(self, key: bytes) -> None:
        """The block has been used without being read from the store."""
        self._keys[key] = None
        if len(self._keys) > MAX_KEYS:
            del self._keys[next(iter(self._keys))]
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    async def close(self) -> None:
        """Hand over what is left. Call it before the store is closed."""
        if self._timer is not None:
            self._timer.cancel()
        if self._task is not None:
            await self._task
        await self._hand_over()

    def _due(self) -> None:
        self._timer = None
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._hand_over())
        else:  # the store is slow: what has come since waits for another interval
            self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    async def _hand_over(self) -> None:
        keys, self._keys = list(self._keys), {}
        if not keys:
            return
        try:
            await asyncio.to_thread(self._store.touch, keys)
        except DualPathError as error:
            log.warning("%d uses of blocks in memory could not be noted in the store: %s", len(keys), error)
