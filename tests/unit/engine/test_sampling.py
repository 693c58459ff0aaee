from __future__ import annotations

import pytest
import torch

from dualpath_ray.engine.sampling import forbid, sample, sample_batch
from dualpath_ray.requests import SamplingParams

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0])
DRAWS = 4000


def frequencies(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    drawn = sample_batch(logits.expand(DRAWS, -1), [params] * DRAWS, list(range(DRAWS)))
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / DRAWS


def test_zero_temperature_is_greedy_whatever_else_is_set() -> None:
    assert sample(LOGITS, SamplingParams(temperature=0.0, top_k=2, top_p=0.1, seed=5), 3) == 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_distribution(temperature: float) -> None:
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(LOGITS, SamplingParams(temperature, seed=11)), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_best() -> None:
    expected = LOGITS.masked_fill(LOGITS < 2.0, float("-inf")).softmax(-1)
    torch.testing.assert_close(frequencies(LOGITS, SamplingParams(1.0, top_k=3, seed=1)), expected, atol=0.03, rtol=0)


def test_rows_of_a_batch_have_their_own_top_k() -> None:
    params = [SamplingParams(1.0, top_k=index % 6, seed=1) for index in range(DRAWS)]
    drawn = sample_batch(LOGITS.expand(DRAWS, -1), params, list(range(DRAWS)))
    for limit in range(6):
        assert len(set(drawn[limit::6])) == (limit or 6)


def test_top_p_keeps_the_fewest_tokens_that_reach_p() -> None:
    best_two = LOGITS.softmax(-1)[[1, 4]].sum().item()
    for top_p, kept in ((best_two - 0.01, {1, 4}), (best_two + 0.01, {1, 4, 2}), (0.0, {1}), (1.0, {0, 1, 2, 3, 4, 5})):
        seen = frequencies(LOGITS, SamplingParams(1.0, top_p=top_p, seed=2)).nonzero().flatten().tolist()
        assert set(seen) == kept


def test_a_row_does_not_depend_on_the_others() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    params = [
        SamplingParams(),
        SamplingParams(1.0, seed=3),
        SamplingParams(0.7, top_p=0.8, seed=3),
        SamplingParams(1.3, top_k=40, seed=4),
        SamplingParams(1.0, top_k=7, top_p=0.5, seed=-1),
        SamplingParams(1.0, seed=1 << 63),
    ]
    positions = [10, 11, 12, 13, 14, 15]
    together = sample_batch(logits, params, positions)
    assert together == [sample(*row) for row in zip(logits, params, positions, strict=True)]
    assert together[::-1] == sample_batch(logits.flip(0), params[::-1], positions[::-1])


def test_seed_and_position_both_change_the_noise() -> None:
    flat = torch.zeros(100_000)
    draws = {sample(flat, SamplingParams(1.0, seed=seed), position) for seed in range(5) for position in range(5)}
    assert len(draws) > 20
    assert sample(flat, SamplingParams(1.0, seed=1), 2) == sample(flat, SamplingParams(1.0, seed=1), 2)


def test_rounding_of_the_logits_does_not_change_the_draw() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 1000)
    params, positions = [SamplingParams(1.0, top_p=0.9, seed=9)] * 200, list(range(200))
    assert sample_batch(logits + 1e-6 * torch.randn_like(logits), params, positions) == sample_batch(logits, params, positions)


def test_the_draws_are_pinned() -> None:
    """The same request must give the same text in every later version: a changed list is a changed product."""
    logits = torch.linspace(0, 1, 1000)
    assert [sample(logits, SamplingParams(1.0, seed=42), position) for position in range(6)] == [890, 724, 881, 979, 530, 752]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = LOGITS.clone()
    forbid(logits, (1, 4, 6, -1))
    assert sample(logits, SamplingParams(), 0) == 2
    assert logits[[0, 2, 3, 5]].tolist() == LOGITS[[0, 2, 3, 5]].tolist()
