"""Model-class traffic, emulated: small all-to-all exchanges between the hosts over their compute NICs, as expert parallelism makes them.

`python -m load_tests.experiments.exchange INDEX BYTES INTERVAL TOS ADDRESS...` runs on host INDEX of the addresses until it is killed.
At every multiple of INTERVAL (time.monotonic(), which all hosts of a testbed share) each host sends BYTES to each other one and waits
for as many from each. It prints a line for every exchange: when it was due, and the seconds from then to the last byte.

In a real cluster network cards send this traffic, not processes that wait for a core. So it runs before all others (SCHED_FIFO) where
that is allowed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from load_tests.testbed.testbed import Testbed

PORT = 7100
BUFFER_BYTES = 4 << 20
CONNECT_S = 30.0
Round = tuple[float, float]
"""When an exchange was due, and how long it took."""


def main() -> None:
    index, nbytes, interval, tos = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    addresses = sys.argv[5:]
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    peers = _connect(index, addresses, tos)
    data, buffer = bytes(nbytes), bytearray(nbytes)
    due = time.monotonic()
    while True:
        due = _agree(peers, (max(due + interval / 2, time.monotonic()) // interval + 1) * interval)
        time.sleep(max(0.0, due - time.monotonic()))
        for peer in peers:
            peer.sendall(data)
        for peer in peers:
            _receive(peer, memoryview(buffer))
        print(f"{due} {time.monotonic() - due}", flush=True)


def _connect(index: int, addresses: list[str], tos: int) -> list[socket.socket]:
    """One connection to every other host; the later in the list calls the earlier."""
    peers = []
    with socket.create_server((addresses[index], PORT)) as server:
        for address in addresses[:index]:
            peers.append(_call(address))
        for _ in addresses[index + 1 :]:
            peers.append(server.accept()[0])
    for peer in peers:
        peer.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
    return peers


def _call(address: str) -> socket.socket:
    end = time.monotonic() + CONNECT_S
    while True:
        try:
            return socket.create_connection((address, PORT), 5)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def _receive(peer: socket.socket, view: memoryview) -> None:
    while view:
        count = peer.recv_into(view)
        if not count:
            sys.exit(0)  # the other side was ended first
        view = view[count:]


def _agree(peers: list[socket.socket], due: float) -> float:
    """All hosts begin at the latest time that any of them proposes."""
    for peer in peers:
        peer.sendall(f"{due:32.9f}".encode())
    proposals = []
    for peer in peers:
        buffer = bytearray(32)
        _receive(peer, memoryview(buffer))
        proposals.append(float(buffer))
    return max(due, *proposals)


@contextlib.contextmanager
def exchanges(testbed: Testbed, hosts: tuple[str, ...], nbytes: int, interval_s: float, tos: int) -> Iterator[list[Round]]:
    """Exchanges between `hosts` while it is entered. The list is filled with the first host's rounds on leaving."""
    addresses = [testbed.network.spec.address(host, "cnic") for host in hosts]
    path = Path(testbed.folder) / "exchange.txt"
    rounds: list[Round] = []
    processes = []
    with path.open("wb") as output:
        for index, host in enumerate(hosts):
            command = [sys.executable, "-m", __name__, str(index), str(nbytes), str(interval_s), str(tos), *addresses]
            stdout = output if index == 0 else subprocess.DEVNULL
            processes.append(testbed.network.popen(host, command, env=testbed.ray.env, stdout=stdout, stderr=subprocess.DEVNULL))
        try:
            yield rounds
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.wait()
    for line in path.read_text().splitlines():
        due, _, took = line.partition(" ")
        if took:
            rounds.append((float(due), float(took)))


if __name__ == "__main__":
    main()
