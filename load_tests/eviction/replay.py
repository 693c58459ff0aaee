"""One trace through one memory: how many of the blocks that requests load are there."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

from load_tests.eviction.policies import Cache
from load_tests.eviction.uses import Uses


def hits_of(cache: Cache, requests: Iterable[Uses]) -> int:
    """As in a gateway: a lease finds what is there, then what it read becomes resident, and at its end what it made."""
    hits = 0
    for uses in requests:
        missing: list[bytes] = []
        for key in uses.loads:
            if key in cache:
                hits += 1
                cache.touch(key)
            else:
                missing.append(key)
        for key in (*missing, *uses.makes):
            cache.insert(key)
    return hits


def optimum(capacity: int, requests: Sequence[Uses]) -> int:
    """Hits of one that knows the future: what is needed last leaves first, be it the block that just came (Belady 1966)."""
    never = len(requests)
    next_use: dict[bytes, int] = {}
    nexts: list[list[int]] = []
    for number in range(len(requests) - 1, -1, -1):
        keys = (*requests[number].loads, *requests[number].makes)
        nexts.append([next_use.get(key, never) for key in keys])
        next_use.update(dict.fromkeys(keys, number))
    nexts.reverse()
    held: dict[bytes, int] = {}
    furthest: list[tuple[int, bytes]] = []  # (-next use, key), stale ones among them
    hits = 0
    for uses, then in zip(requests, nexts, strict=True):
        hits += sum(key in held for key in uses.loads)
        for key, when in zip((*uses.loads, *uses.makes), then, strict=True):
            held[key] = when
            heapq.heappush(furthest, (-when, key))
        while len(held) > capacity:
            when, key = heapq.heappop(furthest)
            if held.get(key) == -when:
                del held[key]
    return hits
