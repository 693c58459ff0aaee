"""Marks the TCP sockets of UCX agents: UCX has no setting for it (1.23), so the mark is put on its sockets from outside.

A process has many sockets that are none of ours. Which belong to an agent is read off what UCX tells peers: an agent's metadata holds
the address and port that it listens on (network byte order), so accepted connections are those to a port in the agent's own metadata, and
those it opened are the ones to an address in the peer's metadata that appeared while it connected.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from dualpath_ray.traffic.classes import Marking

FDS = "/proc/self/fd"
ECN_BITS = 0b11


@dataclass(frozen=True, slots=True)
class TcpSocket:
    """A TCP socket of this process. `inode` names it for as long as it is open; `remote` is None for a listening one."""

    fd: int
    inode: int
    local: tuple[str, int]
    remote: tuple[str, int] | None


def own_sockets() -> Iterator[TcpSocket]:
    """Listening and connected TCP sockets of this process."""
    for name in os.listdir(FDS):
        try:
            target = os.readlink(f"{FDS}/{name}")
            if not target.startswith("socket:["):
                continue
            with _same_socket(int(name)) as opened:
                if opened.type != socket.SOCK_STREAM or opened.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                listening = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                remote = None if listening else opened.getpeername()[:2]
                yield TcpSocket(int(name), int(target[8:-1]), opened.getsockname()[:2], remote)
        except OSError:  # closed by another thread meanwhile, or neither listening nor connected
            continue


def _same_socket(fd: int) -> socket.socket:
    """The socket behind a descriptor that is somebody else's, through a descriptor of our own. Raises OSError."""
    copy = os.dup(fd)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise


def mark(fd: int, marking: Marking) -> None:
    """Packets that leave by this socket carry the marking from now on. Raises OSError."""
    with _same_socket(fd) as opened:
        tos = marking.traffic_class & ~ECN_BITS  # ECN is TCP's own to negotiate
        if opened.family == socket.AF_INET6:
            opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)
        else:
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        # 7 is the administrator's; queueing disciplines of this host (mqprio, VLAN priorities) go by it.
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_PRIORITY, min(marking.priority, 6))


class AgentSockets:
    """The sockets of one agent, marked as they appear. `metadata` is the agent's own."""

    def __init__(self, marking: Marking, metadata: bytes) -> None:
        self._marking, self._metadata = marking, metadata
        self._before: set[int] = set()
        self._marked: set[int] = set()

    def connecting(self) -> None:
        """Call right before the agent is given a new peer."""
        self._before = {each.inode for each in own_sockets()}

    def connected(self, peer: bytes) -> int:
        """Mark the connections to the peer with this metadata that appeared since `connecting`; returns how many."""
        return self._mark(each for each in own_sockets() if each.inode not in self._before and each.remote and _names(peer, *each.remote))

    def accepted(self) -> int:
        """Mark connections that peers have opened and that the agent may send on; returns how many were new."""
        current = list(own_sockets())
        self._marked &= {each.inode for each in current}
        ports = {each.local[1] for each in current if each.remote is None and _names(self._metadata, *each.local)}
        return self._mark(each for each in current if each.remote and each.local[1] in ports)

    def _mark(self, sockets: Iterator[TcpSocket]) -> int:
        count = 0
        for each in sockets:
            if each.inode in self._marked:
                continue
            try:
                mark(each.fd, self._marking)
            except OSError:  # closed meanwhile
                continue
            self._marked.add(each.inode)
            count += 1
        return count


def _names(metadata: bytes, host: str, port: int) -> bool:
    """Whether the metadata holds this address. Loopback addresses are left out of it: there the port must do."""
    if struct.pack("!H", port) not in metadata:
        return False
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    address = socket.inet_pton(family, host)
    return host in ("127.0.0.1", "::1") or address in metadata
