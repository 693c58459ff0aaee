from __future__ import annotations

import random

import pytest

from dualpath_ray.prefill_cost import LEAST, PrefillCost

FIXED_S, TOKEN_S, PAIR_S = 4e-3, 8e-4, 2e-7


def seconds(chunks: list[tuple[int, int]]) -> float:
    return FIXED_S + sum(TOKEN_S * new + PAIR_S * new * (cached + new / 2) for cached, new in chunks)


def test_the_curve_is_found_again_in_spite_of_noise() -> None:
    rng, cost = random.Random(1), PrefillCost()
    for _ in range(200):
        chunks = [(rng.randrange(4000), rng.randrange(1, 600)) for _ in range(rng.randrange(1, 4))]
        cost.add(chunks, seconds(chunks) * rng.uniform(0.9, 1.1))
    fitted = cost.fitted()
    assert fitted is not None
    assert (fitted.token_s, fitted.pair_s) == (pytest.approx(TOKEN_S, rel=0.15), pytest.approx(PAIR_S, rel=0.15))


def test_nothing_is_said_before_there_is_enough_or_when_size_does_not_matter() -> None:
    cost = PrefillCost()
    for _ in range(LEAST - 1):
        cost.add([(100, 20)], 0.1)
    assert cost.fitted() is None
    flat = PrefillCost()
    for new in range(1, 100):
        flat.add([(0, new)], 0.1 / new)
    assert flat.fitted() is None


def test_no_coefficient_is_negative_and_batches_that_were_all_alike_are_predicted() -> None:
    cost = PrefillCost()
    for _ in range(50):
        cost.add([(700, 27)], 0.03)
    fitted = cost.fitted()
    assert fitted is not None
    assert min(fitted.fixed_s, fitted.token_s, fitted.pair_s) >= 0
    assert fitted.fixed_s + 27 * fitted.token_s + 27 * 713.5 * fitted.pair_s == pytest.approx(0.03)


def test_old_batches_are_forgotten() -> None:
    cost = PrefillCost()
    for factor in (1, 3):
        for number in range(300):
            chunks = [(number * 7 % 900, 1 + number % 50)]
            cost.add(chunks, factor * seconds(chunks))
    fitted = cost.fitted()
    assert fitted is not None and fitted.token_s == pytest.approx(3 * TOKEN_S, rel=0.05)
