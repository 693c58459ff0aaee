"""Waiting for pool blocks: in order of asking, and no block is lost to somebody who has just stopped waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.errors import DeadlineExceededError, InvalidRequestError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.pool_queue import PoolQueue

GEOMETRY = KVGeometry(layers=1, kv_heads=1, head_dim=4, block_tokens=4)


@pytest.fixture
def pool() -> PagedPool:
    return PagedPool(GEOMETRY, 4)


async def test_nobody_overtakes_and_who_gives_up_lets_the_next_one_go(pool: PagedPool) -> None:
    queue = PoolQueue(pool)
    held = await queue.allocate(2, 1.0)
    large, small = (asyncio.ensure_future(queue.allocate(blocks, 60.0)) for blocks in (4, 1))
    await asyncio.sleep(0.01)
    assert not small.done(), "there is room for it, but not its turn"
    large.cancel()
    assert len(await small) == 1
    queue.release(held)
    queue.release(small.result())
    assert pool.free_blocks == 4


async def test_blocks_granted_in_the_moment_in_which_the_time_is_up_are_given_back(pool: PagedPool) -> None:
    queue = PoolQueue(pool)
    held = await queue.allocate(3, 1.0)
    late = asyncio.ensure_future(queue.allocate(2, 0.01))
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.02, queue.release, held)
    time.sleep(0.05)  # both are due in one turn of the loop: first the time-out, then the release
    with pytest.raises(DeadlineExceededError, match="no 2 KV blocks"):
        await late
    assert pool.free_blocks == 4
    pool.check_integrity()


async def test_blocks_granted_while_their_request_is_cancelled_are_given_back(pool: PagedPool) -> None:
    queue = PoolQueue(pool)
    held = await queue.allocate(3, 1.0)
    cancelled = asyncio.ensure_future(queue.allocate(2, 60.0))
    await asyncio.sleep(0)
    queue.release(held)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert pool.free_blocks == 4


async def test_what_can_never_be_held_is_refused_at_once(pool: PagedPool) -> None:
    with pytest.raises(InvalidRequestError, match="needs 5 KV blocks, the pool has 4"):
        await PoolQueue(pool).allocate(5, 60.0)
