"""The sockets of UCX agents are found among a process's others and marked, each agent's in its own class."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dualpath_ray.traffic.classes import Marking
from dualpath_ray.traffic.sockets import AgentSockets, mark, own_sockets
from dualpath_ray.transfer.memory import allocate
from dualpath_ray.transfer.nixl_api import make_agent

FOREGROUND, BACKGROUND = Marking(2, 18), Marking(3, 10)


def tos(fd: int) -> int:
    with socket.socket(fileno=socket.dup(fd)) as opened:
        return opened.getsockopt(socket.IPPROTO_IP, socket.IP_TOS)


@contextmanager
def bystander() -> Iterator[list[int]]:
    """A connection of the process that is no agent's: its two descriptors."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield [client.fileno(), accepted.fileno()]


class Agent:
    """A NIXL agent over TCP with 64 KiB of memory."""

    def __init__(self, name: str) -> None:
        self.memory = allocate(1 << 16)
        self.nixl = make_agent(name, progress_thread_delay_us=1000, backends=("UCX",))
        self.nixl.register_memory([(self.memory.ctypes.data, self.memory.nbytes, 0, "")], "DRAM")
        self.metadata = self.nixl.get_agent_metadata()

    def rows(self) -> np.ndarray:
        return np.array([[self.memory.ctypes.data, self.memory.nbytes, 0, self.memory.nbytes, 1]], dtype=np.uint64)

    def write_to(self, peer: Agent) -> None:
        """Send all of our memory to a peer that has been added."""
        local = self.nixl.prep_xfer_dlist("NIXL_INIT_AGENT", self.rows(), "DRAM")
        remote = self.nixl.prep_xfer_dlist(peer.nixl.name, peer.rows(), "DRAM")
        first = np.zeros(1, dtype=np.int32)
        handle = self.nixl.make_prepped_xfer("WRITE", local, first, remote, first, b"")
        state = self.nixl.transfer(handle)
        while state != "DONE":
            state = self.nixl.check_xfer_state(handle)
        handle.release()


@pytest.fixture
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


def test_each_agents_connections_get_its_own_class_and_no_others(over_tcp: None) -> None:
    """Two agents of one name, as an endpoint with two classes has them, and sockets that are nobody's."""
    peer, foreground, background = Agent("peer"), Agent("us"), Agent("us")
    marks = [AgentSockets(marking, agent.metadata) for agent, marking in ((foreground, FOREGROUND), (background, BACKGROUND))]
    before = {each.inode for each in own_sockets()}
    opened: list[set[int]] = []
    with bystander() as bystanders:
        for agent, sockets in zip((foreground, background), marks, strict=True):
            sockets.connecting()
            agent.nixl.add_remote_agent(peer.metadata)
            opened.append({each.inode for each in own_sockets() if each.inode not in before})
            before |= opened[-1]
            assert sockets.connected(peer.metadata) > 0
            agent.write_to(peer)
        by_tos = {each.inode: tos(each.fd) for each in own_sockets() if each.remote}
        ours = {each.inode for each in own_sockets() if each.remote and each.fd not in bystanders}
        assert all(tos(fd) == 0 for fd in bystanders)
    foreground_tos, background_tos = (marking.traffic_class & ~3 for marking in (FOREGROUND, BACKGROUND))
    assert {by_tos[inode] for inode in opened[0] & ours} >= {foreground_tos}
    assert background_tos not in {by_tos[inode] for inode in opened[0] & ours}
    assert foreground_tos not in {by_tos[inode] for inode in opened[1] & ours}
    assert background_tos in {by_tos[inode] for inode in opened[1] & ours}


def test_connections_that_a_peer_opened_are_marked_too(over_tcp: None) -> None:
    """What we send to a peer that connected first travels on its connection."""
    peer, us = Agent("peer"), Agent("us")
    sockets = AgentSockets(FOREGROUND, us.metadata)
    peer.nixl.add_remote_agent(us.metadata)
    peer.write_to(us)
    assert sockets.accepted() > 0
    assert sockets.accepted() == 0  # all are known
    with bystander() as bystanders:
        assert sockets.accepted() == 0
        assert all(tos(fd) == 0 for fd in bystanders)


def test_a_mark_is_dscp_and_priority_and_leaves_ecn_to_tcp() -> None:
    with bystander() as (fd, _):
        mark(fd, Marking(2, 46))
        assert tos(fd) == 46 << 2
        with socket.socket(fileno=socket.dup(fd)) as opened:
            assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY) == 5
