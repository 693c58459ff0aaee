"""Which nodes' storage NICs drain first, among all nodes of a cluster: the candidates of read mode `pool`."""

from __future__ import annotations

from policies.indexed_heap import IndexedHeap


class ReadQueues:
    """Nodes ordered by when their read queue will be empty: queued tokens over storage bandwidth.

    A bandwidth of 0 is unknown and counts as the mean of the known ones, as it does when a request is divided
    (policies/water_filling.py). The mean is that of the moment when the node was last set.
    """

    def __init__(self) -> None:
        self._order = IndexedHeap()
        self._known: dict[str, float] = {}  # node -> bandwidth
        self._sum = 0.0

    def set(self, node_id: str, queued_tokens: float, bandwidth: float) -> None:
        """Insert a node or say how it stands now. `bandwidth` in any unit that all nodes share. O(log nodes)."""
        if self._known.get(node_id, 0.0) != bandwidth:
            self._forget(node_id)
            if bandwidth > 0:
                self._known[node_id] = bandwidth
                self._sum += bandwidth
        mean = self._sum / len(self._known) if self._known else 1.0
        self._order.set(node_id, queued_tokens / (bandwidth or mean))

    def discard(self, node_id: str) -> None:
        """Remove the node if it is there."""
        self._forget(node_id)
        self._order.discard(node_id)

    def first(self, count: int) -> list[str]:
        """The `count` nodes that drain first, or all if there are fewer."""
        return self._order.smallest(count)

    def _forget(self, node_id: str) -> None:
        self._sum -= self._known.pop(node_id, 0.0)
