"""How transfers share links. Events only where a transfer begins or ends.

A transfer crosses the links of its route at once (a read: storage NIC and memory of a node), limited by the slowest of them.
`FairNetwork` gives concurrent transfers max-min fair rates, `QueuedNetwork` serves each link first come first served at full bandwidth.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.link import Link

Sharing = Literal["fair", "queue"]
Route = tuple[Link, ...]
Callback = Callable[[Any], None]
Key = TypeVar("Key")


class Network(Protocol):
    def transfer(self, route: Route, size: float, callback: Callback | None = None, argument: Any = None, latency: float = 0.0) -> None:
        """Move `size` bytes from now on; `callback(argument)` runs `latency` seconds after the last byte has passed."""


class QueuedNetwork:
    """First come, first served on each link."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop

    def transfer(self, route: Route, size: float, callback: Callback | None = None, argument: Any = None, latency: float = 0.0) -> None:
        arrived = now = self._loop.now
        for link in route:
            start = link.free_at if link.free_at > now else now
            link.free_at = end = start + size / link.bandwidth
            if link.window_s:
                link.passed(start, end, size)
            else:
                link.bytes += size
            if end > arrived:
                arrived = end
        if callback is not None:
            self._loop.at(arrived + latency, callback, argument)


@dataclass(slots=True, eq=False)
class _Flows:
    """The transfers of one route. They have equal rates, so one counter of bytes per transfer says when each ends."""

    route: Route
    most: float  # bytes/s of all together at most
    ends: list[tuple[float, int, float, Callback | None, Any]] = field(default_factory=list)
    passed: float = 0.0
    rate: float = 0.0
    since: float = 0.0
    version: int = 0


class FairNetwork:
    """Max-min fair sharing.

    Only links on which more is wanted than they have couple routes; for these the rates are found by progressive filling: all rates rise
    together until a link is full, its transfers keep their rate, the others go on rising. A route whose links are not contended
    just shares its slowest link, so a start or an end costs O(log transfers of the route).
    """

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        self._flows: dict[Route, _Flows] = {}
        self._active: dict[Link, dict[_Flows, None]] = {}
        self._count = 0

    def transfer(self, route: Route, size: float, callback: Callback | None = None, argument: Any = None, latency: float = 0.0) -> None:
        flows = self._flows.get(route)
        if flows is None:
            flows = self._flows[route] = _Flows(route, min(link.bandwidth for link in route))
        self._count += 1
        affected = self._coupled(flows)
        if flows.ends:
            self._advance(flows)
        else:
            flows.passed, flows.since = 0.0, self._loop.now
            for link in route:
                link.wanted += flows.most
                self._active.setdefault(link, {})[flows] = None
            affected |= self._coupled(flows)
        heapq.heappush(flows.ends, (flows.passed + size, self._count, latency, callback, argument))
        self._share(affected)

    def _coupled(self, flows: _Flows) -> dict[_Flows, None]:
        """Routes that share contended links with this one, and so on; the route itself always."""
        found = {flows: None}
        todo = [flows]
        while todo:
            for link in todo.pop().route:
                if link.wanted > link.bandwidth * (1 + 1e-9):
                    for other in self._active.get(link, ()):
                        if other not in found:
                            found[other] = None
                            todo.append(other)
        return found

    def _advance(self, flows: _Flows) -> None:
        now = self._loop.now
        if now > flows.since:
            passed = flows.rate * (now - flows.since)
            flows.passed += passed
            for link in flows.route:
                link.passed(flows.since, now, passed * len(flows.ends))
            flows.since = now

    def _share(self, affected: dict[_Flows, None]) -> None:
        if len(affected) == 1:
            (flows,) = affected
            if flows.ends:
                self._set_rate(flows, flows.most / len(flows.ends))
            return
        for flows in affected:
            self._advance(flows)
        for flows, rate in fair_rates({flows: (flows.route, len(flows.ends)) for flows in affected if flows.ends}).items():
            self._set_rate(flows, rate)

    def _set_rate(self, flows: _Flows, rate: float) -> None:
        flows.rate = rate
        flows.version += 1
        left = max(0.0, flows.ends[0][0] - flows.passed)
        self._loop.at(self._loop.now + left / rate, self._end, (flows, flows.version))

    def _end(self, what: tuple[_Flows, int]) -> None:
        flows, version = what
        if version != flows.version:
            return
        self._advance(flows)
        now = self._loop.now
        affected = self._coupled(flows)
        while flows.ends and flows.ends[0][0] <= flows.passed + 1.0:  # less than a byte left is a rounding error
            _, _, latency, callback, argument = heapq.heappop(flows.ends)
            if callback is not None:
                self._loop.at(now + latency, callback, argument)
        if not flows.ends:
            for link in flows.route:
                link.wanted -= flows.most
                del self._active[link][flows]
        self._share(affected)


def fair_rates(wanted: dict[Key, tuple[Route, int]]) -> dict[Key, float]:
    """Max-min fair rate per transfer of each route with so many transfers."""
    free = {link: link.bandwidth for route, _ in wanted.values() for link in route}
    rates: dict[Key, float] = {}
    rising = dict(wanted)
    while rising:
        counts: dict[Link, int] = {}
        for route, count in rising.values():
            for link in route:
                counts[link] = counts.get(link, 0) + count
        fullest = min(counts, key=lambda link: free[link] / counts[link])
        rate = free[fullest] / counts[fullest]
        for key in [key for key, (route, _) in rising.items() if fullest in route]:
            route, count = rising.pop(key)
            rates[key] = rate
            for link in route:
                free[link] = max(0.0, free[link] - rate * count)
    return rates


def make_network(sharing: Sharing, loop: EventLoop) -> Network:
    return FairNetwork(loop) if sharing == "fair" else QueuedNetwork(loop)
