"""Which resident block goes first when its slot is needed: S3-FIFO.

Source: Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023. Blocks enter a small queue; those that are used again
before they reach its end move to the main queue, the others leave, and only their keys are remembered for a while (the *ghost*): a key
that comes back while it is remembered enters the main queue at once. So a scan (a long prompt that never comes back) passes through a
tenth of the cache, and touching a block changes a counter only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

MAX_USES = 3


class S3Fifo:
    """The order of at most `capacity` keys. The caller decides when to evict; nothing is evicted by `add`."""

    def __init__(self, capacity: int, small_share: float = 0.1, promote_uses: int = 1) -> None:
        self._small_target = max(1, round(capacity * small_share))
        self._ghost_size = capacity
        self._promote_uses = promote_uses
        self._small: OrderedDict[bytes, int] = OrderedDict()  # key -> uses since it entered, oldest first
        self._main: OrderedDict[bytes, int] = OrderedDict()
        self._ghost: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._main

    def add(self, key: bytes) -> None:
        if key in self._ghost:
            del self._ghost[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def touch(self, key: bytes) -> None:
        """The key has been used."""
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, MAX_USES)

    def discard(self, key: bytes) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)

    def evict(self, pinned: Callable[[bytes], bool] = lambda key: False) -> bytes | None:
        """Choose a key that is not pinned, and forget it. None if all are pinned."""
        passed = {True: 0, False: 0}  # pinned keys seen in a row, of the small queue and of the main one

        def spent(small: bool) -> bool:
            return passed[small] >= len(self._small if small else self._main)

        while not (spent(True) and spent(False)):
            from_small = len(self._small) >= self._small_target or not self._main
            if spent(from_small):
                from_small = not from_small
            queue = self._small if from_small else self._main
            key, uses = queue.popitem(last=False)
            if pinned(key):
                queue[key] = uses
                passed[from_small] += 1
                continue
            passed[from_small] = 0
            if from_small and uses >= self._promote_uses:
                self._main[key] = 0
                passed[False] = 0
            elif not from_small and uses:
                queue[key] = uses - 1
            else:
                if from_small:
                    self._remember(key)
                return key
        return None

    def _remember(self, key: bytes) -> None:
        self._ghost[key] = None
        if len(self._ghost) > self._ghost_size:
            self._ghost.popitem(last=False)
