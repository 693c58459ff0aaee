"""Which rows of the layer window may be used while somebody who is lost may still write to others."""

from __future__ import annotations

from collections.abc import Hashable


class WindowRows:
    """Rows `[0, capacity)` of every window layer, in blocks, but for those that are taken. Not locked: see the owner.

    A row is taken in all layers of the ring at once, whichever of them its writer had credits for.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._taken: dict[Hashable, range] = {}

    @property
    def taken(self) -> list[range]:
        return list(self._taken.values())

    def take(self, owner: Hashable, rows: range) -> None:
        self._taken[owner] = rows

    def give_back(self, owner: Hashable) -> None:
        self._taken.pop(owner, None)

    def free(self) -> list[range]:
        """The runs of rows that nobody has taken, first to last."""
        runs, first = [], 0
        for taken in sorted(self._taken.values(), key=lambda rows: rows.start):
            if taken.start > first:
                runs.append(range(first, taken.start))
            first = max(first, taken.stop)
        return [*runs, range(first, self.capacity)] if first < self.capacity else runs


def overlap(one: range, other: range) -> bool:
    return max(one.start, other.start) < min(one.stop, other.stop)
