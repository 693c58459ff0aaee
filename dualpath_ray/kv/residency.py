"""Who has which blocks in memory: what a gateway tells the scheduler, and what the scheduler makes of it.

All of it is soft. A block that is gone when a request comes for it is read from storage instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class ResidencyChanges:
    """A gateway's side: the difference between what is resident and what the scheduler has confirmed to know.

    Holds at most one entry per block that is resident or believed to be, however long nobody takes them.
    """

    def __init__(self) -> None:
        self._resident: set[bytes] = set()
        self._told: set[bytes] = set()
        self._untold: dict[bytes, None] = {}  # in order of change
        self._unsure: set[bytes] = set()  # of these the scheduler may have heard already

    def __len__(self) -> int:
        return len(self._untold)

    def note(self, key: bytes, resident: bool) -> None:
        """A block has come or gone; what comes and goes before anyone hears of it is never told."""
        (self._resident.add if resident else self._resident.discard)(key)
        self._compare(key)

    def take(self, limit: int) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """The oldest `limit` differences as (came, gone); they stay until `confirm`."""
        keys = [key for key, _ in zip(self._untold, range(limit), strict=False)]
        self._unsure.update(keys)
        return tuple(key for key in keys if key in self._resident), tuple(key for key in keys if key not in self._resident)

    def confirm(self, came: Iterable[bytes], gone: Iterable[bytes]) -> None:
        """The scheduler has heard this."""
        self._unsure.difference_update(came, gone)
        for key in came:
            self._told.add(key)
            self._compare(key)
        for key in gone:
            self._told.discard(key)
            self._compare(key)

    def restart(self) -> None:
        """The scheduler knows nothing (any more)."""
        self._told.clear()
        self._unsure.clear()
        self._untold = dict.fromkeys(self._resident)

    def _compare(self, key: bytes) -> None:
        if (key in self._resident) == (key in self._told) and key not in self._unsure:
            self._untold.pop(key, None)
        else:
            self._untold.setdefault(key)


class Residency:
    """The scheduler's side: nodes by block."""

    def __init__(self) -> None:
        self._nodes: dict[bytes, set[str]] = {}
        self._keys: dict[str, set[bytes]] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def update(self, node_id: str, came: Iterable[bytes], gone: Iterable[bytes]) -> None:
        keys = self._keys.setdefault(node_id, set())
        for key in came:
            keys.add(key)
            self._nodes.setdefault(key, set()).add(node_id)
        for key in gone:
            if key in keys:
                keys.discard(key)
                self._forget(node_id, key)

    def drop_node(self, node_id: str) -> None:
        """Its memory is gone."""
        for key in self._keys.pop(node_id, set()):
            self._forget(node_id, key)

    def positions(self, keys: Sequence[bytes]) -> dict[str, set[int]]:
        """Which of `keys` each node has, as places in `keys`."""
        found: dict[str, set[int]] = {}
        if self._nodes:
            for position, key in enumerate(keys):
                for node_id in self._nodes.get(key, ()):
                    found.setdefault(node_id, set()).add(position)
        return found

    def _forget(self, node_id: str, key: bytes) -> None:
        nodes = self._nodes[key]
        nodes.discard(node_id)
        if not nodes:
            del self._nodes[key]
