from __future__ import annotations

import threading

import pytest

from dualpath_ray.errors import OverloadedError, StoreError
from dualpath_ray.stores.ordered_work import OrderedWork


def test_earlier_orders_overtake_and_equal_ones_keep_their_turn() -> None:
    work = OrderedWork(1, 10, "test")
    release, done = threading.Event(), []
    work.submit(0, [lambda: (release.wait(10), None)[1]])
    while work.queued:  # the thread has taken the first task and waits in it
        pass
    work.submit(2, [lambda: done.append("b1"), lambda: done.append("b2")])
    work.submit(1, [lambda: done.append("a1"), lambda: done.append("a2")])
    release.set()
    work.close()
    assert done == ["a1", "a2", "b1", "b2"]


def test_a_full_queue_takes_none_of_the_tasks() -> None:
    work = OrderedWork(1, 2, "test")
    ran: list[int] = []
    with pytest.raises(OverloadedError, match="full"):
        work.submit(0, [lambda: ran.append(1)] * 3)
    work.close()
    assert ran == []


def test_close_ends_what_is_queued_and_refuses_more() -> None:
    work = OrderedWork(2, 100, "test")
    ran: list[int] = []
    work.submit(0, [lambda: ran.append(1)] * 50)
    work.close()
    work.close()
    assert len(ran) == 50
    with pytest.raises(StoreError, match="closed"):
        work.submit(0, [lambda: None])


def test_a_task_that_raises_does_not_end_its_thread() -> None:
    work = OrderedWork(1, 10, "test")
    ran: list[int] = []
    work.submit(0, [lambda: 1 // 0, lambda: ran.append(1)])
    work.close()
    assert ran == [1]
