from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualpath_ray.engine.pool import OutOfBlocksError, PagedPool
from dualpath_ray.errors import DualPathError, OverloadedError
from dualpath_ray.kv.geometry import KVGeometry

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=4, block_tokens=8)
BLOCKS = 24


class PoolMachine(RuleBasedStateMachine):
    """Whatever is taken and given back in whatever order: no block has two holders and none is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagedPool(GEOMETRY, BLOCKS)
        self.held: list[list[int]] = []

    @property
    def taken(self) -> list[int]:
        return [block for ids in self.held for block in ids]

    def longest_free_run(self) -> int:
        taken, longest, run = set(self.taken), 0, 0
        for block in range(BLOCKS):
            run = 0 if block in taken else run + 1
            longest = max(longest, run)
        return longest

    @rule(count=st.integers(1, 12))
    def allocate(self, count: int) -> None:
        free, run = BLOCKS - len(self.taken), self.longest_free_run()
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"{count} KV blocks wanted, {free} of {BLOCKS} free"):
                self.pool.allocate(count)
            return
        ids = [int(block) for block in self.pool.allocate(count)]
        assert len(set(ids)) == count
        assert not set(ids) & set(self.taken)
        if run >= count:
            assert ids == list(range(ids[0], ids[0] + count))
        self.held.append(ids)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.release(ids)
        with pytest.raises(DualPathError, match="not held"):
            self.pool.release(ids)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity()
        assert self.pool.free_blocks == BLOCKS - len(self.taken)


TestPool = PoolMachine.TestCase


def test_the_shortest_run_that_suffices_is_taken() -> None:
    pool = PagedPool(GEOMETRY, 10)
    pool.allocate(10)
    pool.release([0, 1, 2, 3, 5, 6, 9])
    assert pool.allocate(2).tolist() == [5, 6]
    assert pool.allocate(5).tolist() == [0, 1, 2, 3, 9]


@pytest.mark.parametrize("ids", [[3, 3], [3, 9], [-1], [24]])
def test_a_wrong_release_changes_nothing(ids: list[int]) -> None:
    pool = PagedPool(GEOMETRY, BLOCKS)
    pool.allocate(5)
    with pytest.raises(DualPathError):
        pool.release(ids)
    pool.check_integrity()
    assert pool.free_blocks == BLOCKS - 5


def test_running_out_is_retryable() -> None:
    assert issubclass(OutOfBlocksError, OverloadedError)
    assert OutOfBlocksError.retryable


def test_books_that_do_not_balance_are_reported() -> None:
    pool = PagedPool(GEOMETRY, BLOCKS)
    pool._free[3] = False
    with pytest.raises(DualPathError, match="do not balance"):
        pool.check_integrity()


def test_layout_is_an_array_of_layer_blocks() -> None:
    """Layer Block (layer, block) lies at index `layer * blocks + block`, a row per token: what transfers and attention assume."""
    pool = PagedPool(GEOMETRY, BLOCKS)
    assert pool.data_ptr % 4096 == 0
    assert pool.nbytes == BLOCKS * GEOMETRY.full_block_bytes
    flat = pool.tensor.view(-1).numpy()
    flat[:] = np.arange(flat.size)
    items = GEOMETRY.layer_block_bytes // 4
    assert pool.tensor[2, 5].flatten()[0] == (2 * BLOCKS + 5) * items
    assert pool.rows(2)[5 * 8 + 3].flatten()[0] == (2 * BLOCKS + 5) * items + 3 * items // 8
