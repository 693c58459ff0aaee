"""The cost of a decision hardly grows with the cluster: counted in function calls, which no busy machine can change."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from policies.core import SchedulerCore
from tests.policies.cluster import cluster, demand


def calls_per_request(core: SchedulerCore, requests: int) -> float:
    calls = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call"):
            calls += 1

    demands = [demand(f"r{i}", prompt=2000 + 64 * (i % 50), hit_blocks=20, arrived=float(i)) for i in range(requests)]
    sys.setprofile(count)
    try:
        for i, request in enumerate(demands):
            core.submit(request)
            assert len(core.decide(0.0)) == 1
            if i >= requests // 2:
                core.finish(f"r{i - requests // 2}")
    finally:
        sys.setprofile(None)
    return calls / requests


@pytest.mark.parametrize("mode", ["shorter_queue", "split", "pool"])
def test_sixteen_times_the_engines_cost_at_most_half_more(mode: str) -> None:
    small = calls_per_request(cluster(3, 6, per_node=8, free=10_000_000, read_mode=mode), 200)
    large = calls_per_request(cluster(48, 96, per_node=8, free=10_000_000, read_mode=mode), 200)
    assert large < 1.5 * small
