"""Pool blocks in order of asking: who comes first gets its blocks first, however many they are."""

from __future__ import annotations

import asyncio
from collections import deque

from dualpath_ray.engine.pool import BlockIds, PagedPool
from dualpath_ray.errors import DeadlineExceededError, InvalidRequestError


class PoolQueue:
    """A decode pool with waiting. Used on one event loop."""

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool
        self._waiting: deque[tuple[int, asyncio.Future[BlockIds]]] = deque()

    async def allocate(self, blocks: int, timeout_s: float) -> BlockIds:
        """Take `blocks` blocks; give them back by `release`.

        Raises InvalidRequestError if the pool is too small for ever, DeadlineExceededError if none came free in time.
        """
        if blocks > self._pool.blocks:
            raise InvalidRequestError(f"the request needs {blocks} KV blocks, the pool has {self._pool.blocks}: raise decode.pool_blocks")
        if not self._waiting and self._pool.free_blocks >= blocks:
            return self._pool.allocate(blocks)
        turn: asyncio.Future[BlockIds] = asyncio.get_running_loop().create_future()
        entry = (blocks, turn)
        self._waiting.append(entry)
        taken = False
        try:
            async with asyncio.timeout(timeout_s):
                granted = await asyncio.shield(turn)
            taken = True
            return granted
        except TimeoutError:
            raise DeadlineExceededError(f"no {blocks} KV blocks came free within {timeout_s:.1f} s") from None
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
                self._serve()
            elif not taken:  # granted in the moment in which the time was up, or we were cancelled
                self.release(turn.result())

    def release(self, blocks: BlockIds) -> None:
        self._pool.release(blocks)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._pool.free_blocks >= self._waiting[0][0]:
            blocks, turn = self._waiting.popleft()
            turn.set_result(self._pool.allocate(blocks))
