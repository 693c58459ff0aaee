"""A priority queue whose entries can be re-keyed and removed by name, all in O(log n)."""

from __future__ import annotations

import heapq
from typing import Any


class IndexedHeap:
    """Names ordered by key, smallest first. Equal keys come out in the order of their names, so results never depend on history.

    A changed entry leaves its old record behind, to be dropped when it surfaces; the heap is rebuilt when dead records outnumber
    live ones, which keeps every operation O(log n) amortised.
    """

    __slots__ = ("_heap", "_keys")

    def __init__(self) -> None:
        self._keys: dict[str, Any] = {}
        self._heap: list[tuple[Any, str]] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, name: str) -> bool:
        return name in self._keys

    def set(self, name: str, key: Any) -> None:
        """Insert the name or change its key."""
        if self._keys.get(name) == key:
            return
        self._keys[name] = key
        heapq.heappush(self._heap, (key, name))
        if len(self._heap) > 2 * len(self._keys) + 16:
            self._heap = [(key, name) for name, key in self._keys.items()]
            heapq.heapify(self._heap)

    def discard(self, name: str) -> None:
        """Remove the name if it is there."""
        self._keys.pop(name, None)

    def key(self, name: str) -> Any:
        return self._keys[name]

    def peek(self) -> str | None:
        """Name with the smallest key, or None."""
        heap, keys = self._heap, self._keys
        while heap:
            key, name = heap[0]
            if name in keys and keys[name] == key:
                return name
            heapq.heappop(heap)
        return None

    def pop(self) -> str | None:
        name = self.peek()
        if name is not None:
            heapq.heappop(self._heap)
            del self._keys[name]
        return name

    def smallest(self, count: int) -> list[str]:
        """The first `count` names in order, each in O(log n)."""
        taken: list[tuple[Any, str]] = []
        while len(taken) < count and (name := self.peek()) is not None:
            record = (self._keys[name], name)
            taken.append(record)
            while self._heap and self._heap[0] == record:  # there may be several of the same state
                heapq.heappop(self._heap)
        for record in taken:
            heapq.heappush(self._heap, record)
        return [name for _, name in taken]
