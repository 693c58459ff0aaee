"""What an endpoint's NIXL agent knows: our own regions, the peers we push to, and those that are dead."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from dualpath_ray.errors import TransferError
from dualpath_ray.transfer.memory import MemoryKind, PeerInfo, Region

log = logging.getLogger(__name__)

DEAD_AGENTS_KEPT = 4096


class Links:
    """Descriptor lists are prepared once per region and peer. On the endpoint's thread, but for `dead` and `knows`."""

    def __init__(self, agent: Any, agent_name: str, regions: Iterable[Region]) -> None:
        self.agent, self._agent_name = agent, agent_name
        self._peers: dict[str, PeerInfo] = {}
        self._unreachable: set[str] = set()  # peers that could not be connected
        self._met: set[str] = set()  # agents that NIXL knows only so that we could answer them
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._local: dict[str, Any] = {}
        self._remote: dict[tuple[str, str], Any] = {}
        for region in regions:
            agent.register_memory([(region.base, region.nbytes, region.device, "")], region.kind)
            self._local[region.name] = agent.prep_xfer_dlist("NIXL_INIT_AGENT", region.descriptors(), region.kind)

    def knows(self, agent: str) -> bool:
        """Whether `connect` has nothing left to do for this agent."""
        return agent in self._peers or agent in self._dead

    def is_dead(self, agent: str) -> bool:
        return agent in self._dead

    def bury(self, agent: str) -> None:
        """Never connect to this agent again. (May be called from any thread.)"""
        self._dead[agent] = None
        if len(self._dead) > DEAD_AGENTS_KEPT:
            self._dead.popitem(last=False)

    def local(self, region: str) -> Any:
        return self._local[region]

    def remote(self, agent: str, region: str) -> Any:
        """Raises TransferError when the peer or its region is unknown."""
        handle = self._remote.get((agent, region))
        if handle is None:
            raise TransferError(f"{agent} is not connected")
        return handle

    def kind(self, agent: str, region: str) -> MemoryKind:
        """What memory the region of a peer that we are connected to is."""
        return self._peers[agent].region(region).kind

    def connect(self, peer: PeerInfo) -> None:
        if self.knows(peer.agent):
            return
        try:
            self.agent.add_remote_agent(peer.metadata)
            for region in peer.regions:
                self._remote[peer.agent, region.name] = self.agent.prep_xfer_dlist(peer.agent, region.descriptors(), region.kind)
        except Exception as error:  # NIXL's own exception types differ from wheel to wheel
            level = logging.DEBUG if peer.agent in self._unreachable else logging.WARNING  # it is tried again and again
            log.log(level, "endpoint %s: cannot connect to %s: %s", self._agent_name, peer.agent, error)
            self._unreachable.add(peer.agent)
            return
        self._unreachable.discard(peer.agent)
        self._peers[peer.agent] = peer

    def meet(self, agent: str, metadata: bytes) -> None:
        """Make answering this agent possible."""
        if agent not in self._peers:
            self.agent.add_remote_agent(metadata)
            self._met.add(agent)

    def disconnect(self, agent: str) -> None:
        self._unreachable.discard(agent)
        if self._peers.pop(agent, None) is None and agent not in self._met:
            return
        self._met.discard(agent)
        for name in [key for key in self._remote if key[0] == agent]:
            self.release(self._remote.pop(name))
        try:
            self.agent.remove_remote_agent(agent)
        except Exception as error:
            log.debug("endpoint %s: removing %s: %s", self._agent_name, agent, error)

    def broken(self, agent: str, error: Exception) -> PeerInfo | None:
        """What is to be connected anew: after a disconnect NIXL refuses everything to a peer until it is removed and added again."""
        peer = self._peers.get(agent)
        if peer is None or "Disconnect" not in type(error).__name__:
            return None
        self.disconnect(agent)
        return peer

    def release(self, handle: Any) -> None:
        """Give a descriptor list or transfer back to NIXL."""
        try:
            handle.release()
        except Exception as error:
            log.debug("endpoint %s: release: %s", self._agent_name, error)

    def close(self) -> None:
        for agent in list(self._peers):
            self.disconnect(agent)
        for handle in self._local.values():
            self.release(handle)
        self._local.clear()
        del self.agent
