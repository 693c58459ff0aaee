"""Packing of a prefill batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.batch_quota import AttentionTimeModel, plan_batch

PAIRS = AttentionTimeModel(per_pair_s=1e-6, per_token_s=1e-4)


def test_packs_whole_requests_in_order() -> None:
    assert plan_batch([(0, 100), (64, 50), (128, 7)], lambda c, n: 0.001 * n, 1.0, 10_000, 64) == [100, 50, 7]


def test_first_that_overflows_is_cut_at_a_block_and_ends_the_batch() -> None:
    assert plan_batch([(0, 100), (64, 5000), (0, 1)], lambda c, n: 0.001 * n, 0.5, 10_000, 64) == [100, 384]


def test_a_cut_that_fits_no_block_leaves_the_request_out() -> None:
    assert plan_batch([(0, 490), (0, 300)], lambda c, n: 0.001 * n, 0.5, 10_000, 64) == [490]


def test_token_limit_binds_too() -> None:
    assert plan_batch([(0, 1000)], lambda c, n: 0.0, 1.0, 200, 64) == [192]


def test_head_always_moves() -> None:
    assert plan_batch([(6400, 1000)], lambda c, n: 99.0, 0.3, 8192, 64) == [64]
    assert plan_batch([(6400, 10)], lambda c, n: 99.0, 0.3, 8192, 64) == [10]


def test_attention_model_counts_pairs() -> None:
    assert PAIRS(1000, 10) == pytest.approx(1e-3 + 1e-6 * 10 * 1005)


def test_a_batch_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="one block"):
        plan_batch([(0, 1)], PAIRS, 1.0, 63, 64)


@given(
    waiting=st.lists(st.tuples(st.integers(0, 500).map(lambda b: 64 * b), st.integers(1, 9000)), max_size=12),
    quota=st.floats(0.001, 2.0),
    room=st.integers(64, 20_000),
)
def test_quota_order_and_alignment(waiting: list[tuple[int, int]], quota: float, room: int) -> None:
    chunks = plan_batch(waiting, PAIRS, quota, room, 64)
    assert (len(chunks) > 0) == (len(waiting) > 0)
    assert all(chunk > 0 for chunk in chunks) and sum(chunks) <= room
    for i, chunk in enumerate(chunks):
        cached, new = waiting[i]
        assert chunk == new or ((cached + chunk) % 64 == 0 and i == len(chunks) - 1)
    total = sum(PAIRS(waiting[i][0], chunk) for i, chunk in enumerate(chunks))
    assert total <= quota + 1e-9 or (len(chunks) == 1 and chunks[0] <= 64)
