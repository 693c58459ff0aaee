from __future__ import annotations

import pytest

from dualpath_ray.bandwidth import BandwidthEstimate


def test_bytes_over_busy_time() -> None:
    estimate = BandwidthEstimate(half_life_s=30.0, least_busy_s=1.0)
    assert estimate.update(0, 0.0, 100.0) == 0.0
    assert estimate.update(200e6, 2.0, 100.0) == pytest.approx(100e6)
    assert estimate.update(200e6, 2.5, 100.5) == pytest.approx(100e6), "a read under way is counted when it ends"
    assert estimate.update(300e6, 3.0, 101.0) == pytest.approx(100e6, rel=0.01)


def test_short_reads_tell_nothing() -> None:
    estimate = BandwidthEstimate(least_busy_s=1.0)
    assert estimate.update(1e6, 0.5, 1.0) == 0.0
    assert estimate.update(101e6, 1.5, 2.0) > 0.0


def test_a_node_that_is_not_used_is_forgotten_and_so_tried_again() -> None:
    estimate = BandwidthEstimate(half_life_s=10.0, least_busy_s=1.0)
    assert estimate.update(10e6, 2.0, 0.0) == pytest.approx(5e6)
    assert estimate.update(10e6, 2.0, 9.0) == pytest.approx(5e6)
    assert estimate.update(10e6, 2.0, 11.0) == 0.0


def test_a_change_is_followed() -> None:
    estimate = BandwidthEstimate(half_life_s=10.0, least_busy_s=1.0)
    estimate.update(100e6, 1.0, 0.0)
    for second in range(1, 61):
        now = estimate.update(100e6 + second * 10e6, 1.0 + second, float(second))
    assert now == pytest.approx(10e6, rel=0.1)
