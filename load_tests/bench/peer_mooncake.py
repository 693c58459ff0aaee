"""Mooncake Store as a peer, run by the interpreter of a venv of its own (see peers.py for what goes over the pipe).

A master process and one client with a memory segment; blocks are put from, and got into, a registered buffer over TCP on loopback. The
store keeps them in memory, so saves are not durable.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 30.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Memory:
    """Puts and gets `count` blocks of `block_bytes`."""

    def __init__(self, folder: str, block_bytes: int, count: int, direct: bool) -> None:
        import mooncake
        from mooncake.store import MooncakeDistributedStore

        rpc, http = free_port(), free_port()
        master = Path(str(mooncake.__path__[0])) / "mooncake_master"
        options = [f"--rpc_port={rpc}", "--enable_http_metadata_server=true", f"--http_metadata_server_port={http}", "--metrics_port=0"]
        options += ["--http_metadata_server_host=127.0.0.1"]
        log = open(Path(folder) / "master.log", "wb")  # noqa: SIM115  # the child's for as long as it lives
        self.master = subprocess.Popen([str(master), *options], stdout=log, stderr=log, cwd=folder)
        self._size, self._count, self._round = block_bytes, count, 0
        total = block_bytes * count
        self._wanted = Path(folder).parent.joinpath("blocks.bin").read_bytes()
        self._buffer = mmap.mmap(-1, total)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._store = MooncakeDistributedStore()
        end = time.monotonic() + START_TIMEOUT_S
        segment = max(8 * total, 64 << 20)
        while True:
            code = self._store.setup("127.0.0.1", f"http://127.0.0.1:{http}/metadata", segment, 64 << 20, "tcp", "", f"127.0.0.1:{rpc}")
            if code == 0:
                break
            if time.monotonic() > end:
                raise RuntimeError(f"Mooncake Store cannot be set up: error {code}")
            time.sleep(0.5)
        if self._store.register_buffer(self._address, total):
            raise RuntimeError("Mooncake Store cannot register the buffer")

    def _where(self) -> tuple[list[str], list[int], list[int]]:
        keys = [f"r{self._round}-{number}" for number in range(self._count)]
        return keys, [self._address + number * self._size for number in range(self._count)], [self._size] * self._count

    def save(self) -> float:
        self._round += 1  # the store evicts earlier rounds by itself; it removes nothing that was read in the last seconds
        self._buffer[:] = self._wanted
        keys, places, sizes = self._where()
        start = time.perf_counter()
        codes = self._store.batch_put_from(keys, places, sizes)
        seconds = time.perf_counter() - start
        if any(codes):
            raise RuntimeError(f"Mooncake Store refused blocks: errors {sorted(set(codes))}")
        return seconds

    def load(self) -> float:
        self._buffer[:] = bytes(len(self._wanted))
        keys, places, sizes = self._where()
        start = time.perf_counter()
        got = self._store.batch_get_into(keys, places, sizes)
        seconds = time.perf_counter() - start
        if got != sizes or self._buffer[:] != self._wanted:
            raise RuntimeError("Mooncake Store returned other bytes than were saved")
        return seconds


def main() -> None:
    request: dict[str, Any] = json.loads(sys.argv[1])
    peer = Memory(**request)
    try:
        print("@ready", flush=True)
        for line in sys.stdin:
            seconds = {"save": peer.save, "load": peer.load}[line.strip()]()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(f"@{json.dumps({'seconds': seconds, 'peak_bytes': peak})}", flush=True)
    finally:
        peer.master.kill()
        peer.master.wait()


if __name__ == "__main__":
    main()
