"""The cluster's part of `dualpath doctor`: every node's own checks, their clocks, and pushes between all pairs of nodes."""

from __future__ import annotations

import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.engine_process import endpoint_settings, prepare_transfers
from dualpath_ray.config import Settings
from dualpath_ray.doctor.check import Check, failed, ok, skipped, warning
from dualpath_ray.doctor.machine import check_clock, check_devices, check_huge_pages, check_memlock
from dualpath_ray.doctor.protocols import writes_to_peers
from dualpath_ray.doctor.transfers import check_loopback, check_transfers
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.transfer.memory import PeerInfo, Region, allocate

NODE_TIMEOUT_S = 300.0
PUSH_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 15.0
CLOCK_TOLERANCE_S = 0.05
BLOCK_BYTES = 1 << 20
BLOCKS = 64
ROUNDS = 3
MAX_PAIRS = 64
SLOW = 0.5  # of the fastest pair


def check_cluster(settings: Settings, staging_bytes: int) -> list[Check]:
    """Checks of the Ray cluster that this process is connected to. Pairs are measured one after the other: they must not share links."""
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node for node in known if node["Alive"]]
    names = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes}
    checks = [ok("ray", f"Ray {ray.__version__}, {len(nodes)} nodes alive")]
    dead = ", ".join(str(node["NodeManagerAddress"]) for node in known if not node["Alive"])
    if dead:
        checks.append(warning("ray", f"nodes that were there and are not: {dead}", "look at their raylet logs, or start them again"))
    for node_id, name in names.items():
        checks += _of_node(settings, staging_bytes, node_id, name)
    return checks + _pairs(settings, names)


def _of_node(settings: Settings, staging_bytes: int, node_id: str, name: str) -> list[Check]:
    remote: Any = ray.remote(node_checks)
    task = remote.options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node_id))
    try:
        found: list[Check] = ray.get(task.remote(settings, staging_bytes), timeout=NODE_TIMEOUT_S)
        clock: Any = ray.remote(_now).options(num_cpus=0, scheduling_strategy=_on(node_id))
        ray.get(clock.remote(), timeout=NODE_TIMEOUT_S)  # the first call starts a worker
        before = time.time()
        there = ray.get(clock.remote(), timeout=NODE_TIMEOUT_S)
        found.append(_offset(there - (before + time.time()) / 2, time.time() - before))
    except (RayError, TimeoutError) as error:
        found = [failed("ray", f"the node does not answer: {' '.join(str(error).split())[:200]}", "look at its raylet log")]
    return [dataclasses.replace(check, node=name) for check in found]


def _now() -> float:
    return time.time()


def node_checks(settings: Settings, staging_bytes: int) -> list[Check]:
    """What a machine can say of itself."""
    machine = read_machine()
    return [
        *check_devices(machine, settings.transfer),
        check_memlock(machine, staging_bytes),
        check_huge_pages(),
        check_clock(),
        *check_transfers(settings, machine),
        *check_loopback(settings, machine),
    ]


def _offset(seconds: float, round_trip: float) -> Check:
    text = f"{1e3 * seconds:+.1f} ms from ours (within {1e3 * round_trip / 2:.1f} ms)"
    if abs(seconds) > CLOCK_TOLERANCE_S + round_trip / 2:
        return warning("clock offset", text, "synchronise clocks (chrony), or traces of several hosts do not line up")
    return ok("clock offset", text)


class PairProbe:
    """One node's end: an endpoint with some memory, as an engine's."""

    def __init__(self, settings: Settings) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dualpath-")
        self._log = Path(self._folder.name) / "ucx.log"
        os.environ.update(settings.transfer.environment() | {"UCX_PROTO_INFO": "y", "UCX_LOG_FILE": str(self._log)})
        transports = prepare_transfers(settings)
        from dualpath_ray.transfer.endpoint import Endpoint

        self._memory = allocate(BLOCKS * BLOCK_BYTES)
        region = Region("memory", self._memory.ctypes.data, BLOCK_BYTES, BLOCKS, self._memory.nbytes)
        self._endpoint = Endpoint("doctor", (region,), endpoint_settings(settings, transports))

    def info(self) -> PeerInfo:
        return self._endpoint.info

    def close(self) -> None:
        self._endpoint.close()
        self._folder.cleanup()

    def push(self, peer: PeerInfo) -> tuple[float, str]:
        """Bytes per second of the best round, and the transport."""
        self._endpoint.connect(peer)
        self._push(peer, 1)
        times = [self._push(peer, BLOCKS) for _ in range(ROUNDS)]
        log = self._log.read_text(errors="replace") if self._log.exists() else ""
        return BLOCKS * BLOCK_BYTES / min(times), writes_to_peers(log) or "unknown"

    def _push(self, peer: PeerInfo, blocks: int) -> float:
        from dualpath_ray.transfer.push import Push

        done: Future[Any] = Future()
        which = np.arange(blocks, dtype=np.int32)
        start = time.perf_counter()
        self._endpoint.push(Push(peer.agent, "memory", which, "memory", which, done.set_result))
        error = done.result(PUSH_TIMEOUT_S)
        if error is not None:
            raise error
        return time.perf_counter() - start


def _pairs(settings: Settings, names: dict[str, str]) -> list[Check]:
    if len(names) < 2:
        return [skipped("pairs", "one node only")]
    remote: Any = ray.remote(PairProbe)
    probes = {node_id: remote.options(num_cpus=0, scheduling_strategy=_on(node_id)).remote(settings) for node_id in names}
    try:
        infos, checks = {}, []
        for node_id, probe in probes.items():
            try:
                infos[node_id] = ray.get(probe.info.remote(), timeout=NODE_TIMEOUT_S)
            except (RayError, TimeoutError) as error:
                checks.append(dataclasses.replace(_unreachable("pairs", error), node=names[node_id]))
        pairs = list(itertools.permutations(infos, 2))
        chosen = pairs[:: -(-len(pairs) // MAX_PAIRS)] if pairs else []
        rates: list[tuple[str, float, str]] = []
        for source, target in chosen:
            name = f"{names[source]} -> {names[target]}"
            try:
                rate, transport = ray.get(probes[source].push.remote(infos[target]), timeout=NODE_TIMEOUT_S)
                rates.append((name, rate, transport))
            except (RayError, TimeoutError) as error:
                checks.append(_unreachable(name, error))
        return checks + _judge(settings, rates)
    finally:
        closing = [probe.close.remote() for probe in probes.values()]
        ray.wait(closing, num_returns=len(closing), timeout=CLOSE_TIMEOUT_S)
        for probe in probes.values():
            ray.kill(probe)


def _judge(settings: Settings, rates: Sequence[tuple[str, float, str]]) -> list[Check]:
    best = max((rate for _, rate, _ in rates), default=0.0)
    checks = []
    for name, rate, transport in rates:
        text = f"{rate / 1e9:.2f} GB/s by {transport}"
        if settings.transfer.fabric == "rdma" and transport.startswith("tcp"):
            checks.append(failed(name, text, "RDMA was asked for: see the nodes' lines above, or UCX_TLS in their environment"))
        elif rate < SLOW * best:
            checks.append(warning(name, text, f"less than {SLOW:.0%} of the fastest pair: check the link's speed, MTU and error counters"))
        else:
            checks.append(ok(name, text))
    return checks


def _unreachable(name: str, error: Exception) -> Check:
    reason = " ".join(str(getattr(error, "cause", None) or error).split())[-200:]
    return failed(
        name, f"no push: {reason}", "nodes must reach each other on the devices that transfer.net_devices names (firewall, routes)"
    )


def _on(node_id: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
