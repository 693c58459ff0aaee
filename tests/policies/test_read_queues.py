from __future__ import annotations

from policies.read_queues import ReadQueues


def test_the_node_that_drains_first_comes_first() -> None:
    queues = ReadQueues()
    queues.set("slow", 100, 10.0)
    queues.set("fast", 300, 100.0)
    queues.set("idle", 0, 1.0)
    assert queues.first(2) == ["idle", "fast"]
    queues.set("fast", 5000, 100.0)
    queues.discard("idle")
    assert queues.first(9) == ["slow", "fast"]


def test_an_unknown_bandwidth_counts_as_the_mean() -> None:
    queues = ReadQueues()
    queues.set("a", 100, 10.0)  # 10 s
    queues.set("b", 100, 30.0)  # 3.3 s
    queues.set("new", 100, 0.0)  # 5 s at the mean of 20
    assert queues.first(3) == ["b", "new", "a"]
    queues.set("b", 100, 0.0)  # forgotten: 10 is the only known one
    queues.set("new", 90, 0.0)
    assert queues.first(3) == ["new", "a", "b"]
    queues.discard("a")  # none is known: the queues alone decide
    queues.set("b", 10, 0.0)
    queues.set("new", 90, 0.0)
    assert queues.first(2) == ["b", "new"]
