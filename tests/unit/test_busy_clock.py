from __future__ import annotations

import time

import pytest

from dualpath_ray.busy_clock import BusyClock


def test_only_the_time_in_which_there_was_work_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = BusyClock()
    now[0] += 5
    assert clock.seconds() == 0
    clock.add(0)
    now[0] += 7
    clock.take(0)
    assert clock.seconds() == 0
    clock.add(3)
    now[0] += 2
    clock.add(1)
    assert clock.seconds() == 2
    now[0] += 1
    clock.take(3)
    now[0] += 1
    clock.take(1)
    now[0] += 50
    assert (clock.amount, clock.seconds()) == (0, 4)
