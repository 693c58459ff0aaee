"""The NIXL agents of an endpoint, one for each traffic class that its pushes travel in.

UCX marks packets per agent, so two classes need two. All have the endpoint's name: peers need to know one address only, and cannot
tell (nor need to) which of them wrote or spoke. Peers write to the first, the agent of the foreground class, which also sends the
messages that pace streams; the others only push. Without classes there is one agent, marked as UCX does by default.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from dualpath_ray.errors import ConfigError, DualPathError, TransferError
from dualpath_ray.rdma.readiness import opens_rdma
from dualpath_ray.traffic.classes import Marking, TrafficClass
from dualpath_ray.traffic.sockets import AgentSockets
from dualpath_ray.transfer import nixl_api
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.links import Links
from dualpath_ray.transfer.memory import PeerInfo, Region

RETRY_S = 0.2  # between two attempts to connect to a peer


class Lanes:
    """On the endpoint's thread. Raises ConfigError when UCX took no RDMA device although it must."""

    def __init__(self, agent_name: str, regions: Iterable[Region], settings: EndpointSettings) -> None:
        regions = tuple(regions)
        self._sockets: dict[TrafficClass, AgentSockets] = {}
        self._seen: set[tuple[TrafficClass, str]] = set()  # peers that something has landed on, and so all connections are there
        self._by_class: dict[TrafficClass, Links] = {}
        self._unreached: dict[str, tuple[PeerInfo, float]] = {}  # peers that could not be connected, and when to try again
        for traffic, marking in _distinct(settings.traffic).items():
            self._by_class[traffic] = self._open(agent_name, regions, settings, traffic, marking)
        self.first = self._by_class.get(TrafficClass.KV_READ) or self._open(agent_name, regions, settings, TrafficClass.KV_READ, None)
        self._by_class.setdefault(TrafficClass.KV_READ, self.first)
        if settings.rdma_ports is not None and not opens_rdma():
            raise ConfigError(
                "RDMA was asked for, but UCX has opened no RDMA device: UCX_MODULES must not exclude ib, and NIXL's own libibverbs "
                "must find the card's driver (docs/traffic.md); or set transfer.fabric=tcp"
            )

    def of(self, traffic: TrafficClass) -> Links:
        """The agent that pushes in this class; the foreground's if the class has none of its own."""
        return self._by_class.get(traffic, self.first)

    def knows(self, agent: str) -> bool:
        """Whether `connect` has nothing left to do for this agent."""
        return all(links.knows(agent) for links in self._by_class.values())

    def connect(self, peer: PeerInfo) -> None:
        """Make `peer` known to every agent. Where that fails, because a link is down, `to` tries again."""
        for traffic, links in self._by_class.items():
            if links.knows(peer.agent):
                continue
            sockets = self._sockets.get(traffic)
            if sockets is not None:
                sockets.connecting()
            links.connect(peer)
            if sockets is not None:
                sockets.connected(peer.metadata)
                sockets.accepted()
        if self.knows(peer.agent):
            self._unreached.pop(peer.agent, None)
        else:
            self._unreached[peer.agent] = peer, time.monotonic() + RETRY_S

    def to(self, agent: str, traffic: TrafficClass) -> Links:
        """The agent that pushes in this class, after another attempt to connect to a peer that could not be reached."""
        peer, due = self._unreached.get(agent, (None, 0.0))
        if peer is not None and time.monotonic() >= due:
            self.connect(peer)
        return self.of(traffic)

    def notify(self, agent: str, message: bytes, traffic: TrafficClass) -> None:
        """Send a message; over a new connection if the one there was has broken. Raises what NIXL raises."""
        try:
            self.to(agent, traffic).agent.send_notif(agent, message)
        except Exception as error:
            if not self._mend(agent, traffic, error):
                raise
            self.of(traffic).agent.send_notif(agent, message)

    def failed(self, agent: str, traffic: TrafficClass, error: Exception) -> DualPathError:
        """What a failed push means. A connection that has broken is made anew."""
        self._mend(agent, traffic, error)
        return error if isinstance(error, DualPathError) else TransferError(f"push to {agent} failed: {error or type(error).__name__}")

    def _mend(self, agent: str, traffic: TrafficClass, error: Exception) -> bool:
        peer = self.of(traffic).broken(agent, error)
        if peer is not None:
            self.connect(peer)
        return peer is not None and self.of(traffic).knows(agent)

    def disconnect(self, agent: str) -> None:
        self._unreached.pop(agent, None)
        for links in self._by_class.values():
            links.disconnect(agent)
        self._seen = {(traffic, peer) for traffic, peer in self._seen if peer != agent}

    def bury(self, agent: str) -> None:
        """Never connect to this agent again. (May be called from any thread.)"""
        for links in self._by_class.values():
            links.bury(agent)

    def landed(self, traffic: TrafficClass, agent: str) -> None:
        """Something of this class has arrived at `agent`: a connection that the peer opened for it is there now, and gets its mark."""
        if not self._sockets or (traffic, agent) in self._seen:
            return
        self._seen.add((traffic, agent))
        if traffic in self._sockets:
            self._sockets[traffic].accepted()

    def close(self) -> None:
        for links in self._by_class.values():
            links.close()

    def _open(
        self, name: str, regions: Iterable[Region], settings: EndpointSettings, traffic: TrafficClass, marking: Marking | None
    ) -> Links:
        options = {} if marking is None else marking.ucx()
        agent: Any = nixl_api.make_agent(
            name,
            progress_thread_delay_us=settings.progress_thread_delay_us,
            backends=("UCX",),
            ucx=options,
            copy_threads=settings.copy_threads,
        )
        links = Links(agent, name, regions)
        if marking is not None:
            self._sockets[traffic] = AgentSockets(marking, agent.get_agent_metadata())
        return links


def _distinct(classes: dict[TrafficClass, Marking]) -> dict[TrafficClass, Marking]:
    """Classes whose packets look the same share an agent."""
    found: dict[TrafficClass, Marking] = {}
    for traffic in sorted(classes, key=lambda each: each != TrafficClass.KV_READ):
        if classes[traffic] not in found.values():
            found[traffic] = classes[traffic]
    return found
