"""The S3 store beside a plain loop of concurrent GETs and PUTs: the same client, connections and objects, without headers, order or checks.

The service is the one given, or a SeaweedFS of this benchmark's own on loopback.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dualpath_ray.errors import StoreError
from dualpath_ray.stores.s3 import S3Settings, S3Store, connect, load_client
from load_tests.bench.blocks import (
    FINGERPRINT,
    READS,
    Case,
    Unchecked,
    in_turns,
    latencies,
    load,
    load_requests,
    percentile,
    rate,
    ratio,
    save,
    timed,
)  # fmt: skip
from load_tests.bench.checksum_cost import ChecksumCost, Cost, costed
from load_tests.testbed.interruptible import interruptible
from load_tests.testbed.storage_server import weed

BUCKET = "kvcache"
START_TIMEOUT_S = 60.0


def settings_for(case: Case, endpoint: str, bucket: str) -> S3Settings:
    """At most `case.depth` requests under way."""
    prefix = f"bench-{uuid.uuid4().hex[:8]}"
    return S3Settings(
        bucket, endpoint, prefix, anonymous=not endpoint or "127.0.0.1" in endpoint, read_threads=case.depth, write_threads=case.depth
    )


def measure(case: Case, settings: S3Settings, rounds: int, tick: Callable[[], None]) -> dict[str, Any]:
    """Rates in GB/s, latencies in milliseconds, ratios as medians over rounds. Leaves the bucket as it was."""
    store = S3Store(case.geometry, FINGERPRINT, settings)
    client, bucket = load_client(), connect(settings)
    checked, unchecked = store.format, Unchecked(case.geometry, FINGERPRINT)
    paths = [f"{settings.prefix}/plain/{number}" for number in range(len(case.blocks))]
    checksums = ChecksumCost(case.arena.nbytes)
    seconds: dict[str, list[float]] = {}
    pool = ThreadPoolExecutor(case.depth)

    def get(number: int) -> None:
        case.blocks[number].data[:] = np.frombuffer(client.get(bucket, paths[number]).bytes(), dtype=np.uint8)

    def put(number: int) -> None:
        client.put(bucket, paths[number], case.blocks[number].data.tobytes(), use_multipart=False)

    def each(act: Callable[[int], None]) -> None:
        list(pool.map(act, range(len(case.blocks))))

    def note(name: str, act: Callable[[], None], check: bool = False) -> None:
        if check:
            case.forget()
        seconds.setdefault(name, []).append(timed(act))
        if check:
            case.check()

    def read(verify: bool) -> Cost:
        case.forget()
        store.format = checked if verify else unchecked
        cost = costed(lambda: load_requests(store, case))
        case.check()
        seconds.setdefault("read" if verify else "read_unchecked", []).append(cost.seconds)
        return cost

    def write() -> None:
        for block in case.blocks:
            store.remove(block.key)
        note("write", lambda: save(store, case))

    try:
        for number in range(rounds):
            writes: list[Callable[[], None]] = [write, lambda: note("plain_write", lambda: each(put))]
            reads: list[Callable[[], None]] = [
                lambda: checksums.measure(read),
                lambda: note("plain_read", lambda: each(get), check=True),
            ]
            for step in in_turns(number, writes, 1) + in_turns(number, reads, READS):
                step()
            tick()
        store.format = checked
        own = latencies(lambda i: load(store, case.blocks[i : i + 1], case.geometry.layers), case)
        plain = latencies(get, case)
    finally:
        pool.shutdown()
        store.close()
        with contextlib.suppress(Exception):
            client.delete(bucket, [entry["path"] for page in client.list(bucket, prefix=f"{settings.prefix}/") for entry in page])
    figures: dict[str, Any] = {"block_bytes": case.block_bytes, "depth": case.depth, "blocks": len(case.blocks), "io": "obstore"}
    figures |= {f"{name}_gbps": rate(case, values) for name, values in seconds.items()}
    figures["vs_plain_read"] = ratio(seconds["plain_read"], seconds["read"])
    figures["vs_plain_write"] = ratio(seconds["plain_write"], seconds["write"])
    figures |= checksums.figures()
    figures |= {"load_p50_ms": percentile(own, 0.5) * 1e3, "load_p99_ms": percentile(own, 0.99) * 1e3}
    return figures | {"plain_read_p99_ms": percentile(plain, 0.99) * 1e3}


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """The endpoint of a SeaweedFS with a bucket. Raises TestbedError when it is not installed, StoreError when it does not start."""
    ports = _free_ports(4)
    command = [
        weed(),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-filer",
        "-s3",
        "-master.telemetry=false",
        "-volume.max=16",
        "-master.electionTimeout=1s",
        "-s3.port.iceberg=0",  # these two have fixed ports by default, on which a second server beside this one ends
        "-s3.port.lance=0",
    ]
    for option, port in zip(("master.port", "volume.port", "filer.port", "s3.port"), ports, strict=True):
        command.append(f"-{option}={port}")
    endpoint = f"http://127.0.0.1:{ports[3]}"
    with interruptible():
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            for path in (BUCKET, f"{BUCKET}/probe"):
                _put(f"{endpoint}/{path}")
            yield endpoint
        finally:
            process.kill()
            process.wait()


def _put(url: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(urllib.request.Request(url, data=b"", method="PUT"), timeout=5).close()
            return
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code == 409:
                return
            if time.monotonic() > end:
                raise StoreError(f"SeaweedFS did not take a PUT within {START_TIMEOUT_S:.0f} s: {error}") from error
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Ports whose neighbours 10,000 higher are free too (SeaweedFS listens there for gRPC).

    Each process begins elsewhere: tests that run side by side would find the same ones free before either has started its server. All begin
    low, so that gRPC's are below those that Linux gives to clients (from 32,768 on).
    """
    found: list[int] = []
    for port in range(21_000 + os.getpid() % 128 * 8, 30_000):
        with socket.socket() as plain, socket.socket() as grpc, contextlib.suppress(OSError):
            plain.bind(("127.0.0.1", port))
            grpc.bind(("127.0.0.1", port + 10_000))
            found.append(port)
        if len(found) == count:
            return found
    raise StoreError("no free ports for a storage server")
