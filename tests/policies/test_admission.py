"""Deficit round robin between tenants."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.admission import AdmissionQueue
from policies.errors import PolicyError, QueueFull


def drain(queue: AdmissionQueue) -> list[str]:
    served = []
    while (request := queue.pop()) is not None:
        served.append(request)
    return served


def test_priority_then_deadline_then_arrival_within_a_tenant() -> None:
    queue = AdmissionQueue(10, 100)
    queue.push("late", "t", 1, deadline=9.0)
    queue.push("soon", "t", 1, deadline=1.0)
    queue.push("also soon", "t", 1, deadline=1.0)
    queue.push("urgent", "t", 1, priority=5)
    assert drain(queue) == ["urgent", "soon", "also soon", "late"]


def test_bounded_and_removable() -> None:
    queue = AdmissionQueue(1, 100)
    queue.push("a", "t", 1)
    with pytest.raises(QueueFull):
        queue.push("b", "t", 1)
    assert queue.remove("a") and not queue.remove("a")
    assert queue.pop() is None and len(queue) == 0
    with pytest.raises(PolicyError):
        AdmissionQueue(0, 1)


def test_a_large_request_gathers_credit() -> None:
    queue = AdmissionQueue(10, 10)
    queue.push("big", "a", 35)
    for i in range(4):
        queue.push(f"s{i}", "b", 10)
    assert drain(queue) == ["s0", "s1", "s2", "big", "s3"]


@given(
    sizes=st.lists(st.lists(st.integers(1, 500), min_size=30, max_size=40), min_size=2, max_size=4),
    quantum=st.integers(1, 300),
)
def test_backlogged_tenants_get_equal_tokens(sizes: list[list[int]], quantum: int) -> None:
    queue = AdmissionQueue(10_000, quantum)
    cost: dict[str, tuple[int, int]] = {}
    for tenant, works in enumerate(sizes):
        for i, work in enumerate(works):
            queue.push(f"{tenant}/{i}", str(tenant), work)
            cost[f"{tenant}/{i}"] = (tenant, work)
    left = [len(works) for works in sizes]
    served = [0] * len(sizes)
    largest = max(max(works) for works in sizes)
    total = 0
    while (request := queue.pop()) is not None:
        tenant, work = cost[request]
        served[tenant] += work
        left[tenant] -= 1
        total += 1
        if min(left) == 0:
            break
        assert max(served) - min(served) <= quantum + 2 * largest
    assert total > 0
