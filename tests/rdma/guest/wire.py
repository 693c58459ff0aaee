"""What packets on the guest's wire really carry."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from dataclasses import dataclass

ETH_P_ALL, SO_RCVBUFFORCE = 3, 33  # a socket for one protocol would not see what this machine sends
IPV4 = b"\x08\x00"
UDP, ROCE_PORT = 17, 4791
SEND_FIRST, RDMA_WRITE_FIRST, RDMA_WRITE_ONLY_IMMEDIATE, RDMA_READ_REQUEST = 0x00, 0x06, 0x0B, 0x0C
DATA = range(RDMA_WRITE_FIRST, RDMA_WRITE_ONLY_IMMEDIATE + 1)  # opcodes of reliable-connection writes
READ_RESPONSES = range(0x0D, 0x11)
RDMA_WRITE_ONLY = 0x0A
EMPTY_WRITE_BYTES = 8 + 12 + 16 + 4  # UDP, base transport and RDMA headers, checksum: UCX looks with such writes whether an idle peer lives


@dataclass(frozen=True, slots=True)
class Packet:
    """A RoCEv2 packet's addresses, type-of-service byte and transport opcode."""

    source: str
    destination: str
    tos: int
    opcode: int

    @property
    def dscp(self) -> int:
        return self.tos >> 2


class Capture:
    """Counts the RoCEv2 packets that leave or reach an interface while the context is open, but no writes of nothing."""

    def __init__(self, interface: str) -> None:
        self.packets: Counter[Packet] = Counter()
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 32 << 20)
        self._socket.bind((interface, ETH_P_ALL))
        self._socket.settimeout(0.2)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Capture:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self._socket.close()

    def dscps(self, source: str, opcodes: range, destination: str = "") -> Counter[int]:
        """Packets from `source` with one of these opcodes, by DSCP; all, or those to `destination`."""
        found: Counter[int] = Counter()
        for packet, count in self.packets.items():
            if packet.source == source and packet.opcode in opcodes and destination in ("", packet.destination):
                found[packet.dscp] += count
        return found

    def _run(self) -> None:
        while True:
            try:
                frame = self._socket.recv(64)
            except TimeoutError:
                if self._stop.is_set():  # only when the wire is quiet: nothing of what was sent is missed
                    return
                continue
            if frame[12:14] == IPV4 and frame[23] == UDP and int.from_bytes(frame[36:38]) == ROCE_PORT and not _empty_write(frame):
                source, destination = (socket.inet_ntoa(frame[start : start + 4]) for start in (26, 30))
                self.packets[Packet(source, destination, frame[15], frame[42])] += 1


def _empty_write(frame: bytes) -> bool:
    return frame[42] == RDMA_WRITE_ONLY and int.from_bytes(frame[38:40]) <= EMPTY_WRITE_BYTES
