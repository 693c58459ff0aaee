"""What dividing reads brings between ideal queues."""

from __future__ import annotations

import pytest

from load_tests.experiments.read_tail import ideal_ratios


def test_dividing_halves_a_read_that_is_alone() -> None:
    assert ideal_ratios(0.001, 0.5, 2000) == pytest.approx({"mean": 0.5, "p50": 0.5, "p90": 0.5, "p99": 0.5}, abs=0.01)


def test_the_fuller_the_queues_the_less_dividing_brings() -> None:
    low, high = (ideal_ratios(share, 0.5, 20_000) for share in (0.25, 0.75))
    assert all(0.5 < low[name] < high[name] < 1.0 for name in low)
