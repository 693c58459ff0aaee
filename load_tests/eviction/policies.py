"""What may decide which block leaves a full memory. S3-FIFO is the one that gateways run (`dualpath_ray.kv.s3_fifo`); the others are here
to be compared with it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from dualpath_ray.kv.s3_fifo import S3Fifo


class Cache(Protocol):
    """Holds at most as many keys as it was made for."""

    def __contains__(self, key: object) -> bool: ...

    def __len__(self) -> int: ...

    def touch(self, key: bytes) -> None:
        """A key that is here has been used."""
        ...

    def insert(self, key: bytes) -> None:
        """A key that is not here comes in; another one leaves if there is no room."""
        ...


class Queue(OrderedDict[bytes, None]):
    """Keys in order, oldest first."""

    def put(self, key: bytes) -> None:
        self[key] = None

    def oldest(self) -> bytes:
        return self.popitem(last=False)[0]


class Fifo:
    """The oldest leaves, used or not."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._queue = capacity, Queue()

    def __contains__(self, key: object) -> bool:
        return key in self._queue

    def __len__(self) -> int:
        return len(self._queue)

    def touch(self, key: bytes) -> None:
        return

    def insert(self, key: bytes) -> None:
        if len(self._queue) >= self._capacity:
            self._queue.oldest()
        self._queue.put(key)


class Lru(Fifo):
    """What was used least recently leaves."""

    def touch(self, key: bytes) -> None:
        self._queue.move_to_end(key)


class TwoQueues:
    """2Q (Johnson and Shasha, VLDB 1994): new keys pass a queue of a quarter of the room; only those that come back within a while after
    they left it enter the LRU queue that has the rest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._new_share, self._ghost_size = max(1, capacity // 4), max(1, capacity // 2)
        self._new, self._often, self._ghost = Queue(), Queue(), Queue()

    def __contains__(self, key: object) -> bool:
        return key in self._often or key in self._new

    def __len__(self) -> int:
        return len(self._new) + len(self._often)

    def touch(self, key: bytes) -> None:
        if key in self._often:
            self._often.move_to_end(key)

    def insert(self, key: bytes) -> None:
        if len(self) >= self._capacity:
            self._make_room()
        if key in self._ghost:
            del self._ghost[key]
            self._often.put(key)
        else:
            self._new.put(key)

    def _make_room(self) -> None:
        if len(self._new) <= self._new_share and self._often:
            self._often.oldest()
            return
        self._ghost.put(self._new.oldest())
        if len(self._ghost) > self._ghost_size:
            self._ghost.oldest()


class Arc:
    """ARC (Megiddo and Modha, FAST 2003): LRU queues of keys used once and more than once; ghosts of both say which deserves more room."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._once_target = 0.0
        self._once, self._often, self._once_ghost, self._often_ghost = Queue(), Queue(), Queue(), Queue()

    def __contains__(self, key: object) -> bool:
        return key in self._often or key in self._once

    def __len__(self) -> int:
        return len(self._once) + len(self._often)

    def touch(self, key: bytes) -> None:
        self._once.pop(key, None)
        self._often.put(key)
        self._often.move_to_end(key)

    def insert(self, key: bytes) -> None:
        once_ghosts, often_ghosts = len(self._once_ghost), len(self._often_ghost)
        if key in self._once_ghost:
            self._once_target = min(self._capacity, self._once_target + max(1.0, often_ghosts / once_ghosts))
            self._replace(came_back=False)
            del self._once_ghost[key]
            self._often.put(key)
        elif key in self._often_ghost:
            self._once_target = max(0.0, self._once_target - max(1.0, once_ghosts / often_ghosts))
            self._replace(came_back=True)
            del self._often_ghost[key]
            self._often.put(key)
        else:
            self._make_room()
            self._once.put(key)

    def _make_room(self) -> None:
        """For a key that is new altogether: at most `capacity` keys used once are remembered, and twice as many in all."""
        remembered = len(self) + len(self._once_ghost) + len(self._often_ghost)
        if len(self._once) + len(self._once_ghost) >= self._capacity:
            if not self._once_ghost:
                self._once.oldest()
                return
            self._once_ghost.oldest()
        elif remembered >= 2 * self._capacity:
            self._often_ghost.oldest()
        self._replace(came_back=False)

    def _replace(self, came_back: bool) -> None:
        if len(self) < self._capacity:
            return
        over = len(self._once) > self._once_target or (came_back and len(self._once) == self._once_target)
        if self._once and (over or not self._often):
            self._once_ghost.put(self._once.oldest())
        else:
            self._often_ghost.put(self._often.oldest())


class GatewayOrder:
    """S3-FIFO as a gateway's resident blocks use it."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._order = capacity, S3Fifo(capacity)

    def __contains__(self, key: object) -> bool:
        return key in self._order

    def __len__(self) -> int:
        return len(self._order)

    def touch(self, key: bytes) -> None:
        self._order.touch(key)

    def insert(self, key: bytes) -> None:
        if len(self._order) >= self._capacity:
            self._order.evict()
        self._order.add(key)


POLICIES: dict[str, Callable[[int], Cache]] = {"fifo": Fifo, "lru": Lru, "2q": TwoQueues, "arc": Arc, "s3-fifo": GatewayOrder}
