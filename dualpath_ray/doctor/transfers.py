"""NIXL and UCX as a process of this machine would have them, and each RDMA port in a loop with itself, each probed by its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dualpath_ray.config import Settings
from dualpath_ray.doctor.check import Check, failed, ok, skipped, warning
from dualpath_ray.errors import DualPathError
from dualpath_ray.rdma import verbs
from dualpath_ray.rdma.device import Machine
from dualpath_ray.transfer.transports import choose_transports

PROBE_TIMEOUT_S = 120
NEEDED_PLUGINS = ("UCX", "POSIX")
CRASH_REMEDY = "a second copy of RDMA libraries in the process: set UCX_MODULES=^efa (with RDMA devices) or ^ib (without)"


def check_transfers(settings: Settings, machine: Machine) -> list[Check]:
    """NIXL's plug-ins, and what UCX uses between two processes of this machine."""
    try:
        transports = choose_transports(settings.transfer, machine, settings.cluster.placement == "logical", environ=os.environ)
    except DualPathError as error:
        return [failed("transports", str(error), "see transfer.fabric and transfer.tls in docs/settings.md")]
    answer, code = run_probe(["transfers"], settings.transfer.environment() | transports.environment())
    if "error" in answer:
        wanted = ",".join(transports.tls)
        return [failed("nixl", f"{answer['error']} (UCX_TLS={wanted})", "see docs/traffic.md; transfer.fabric=tcp does without RDMA")]
    missing = [name for name in NEEDED_PLUGINS if name not in answer["plugins"]]
    plugins = f"plug-ins: {', '.join(answer['plugins'])}"
    checks = [failed("nixl", f"{plugins}; missing: {', '.join(missing)}", "reinstall nixl-cu12") if missing else ok("nixl", plugins)]
    if code:
        checks.append(warning("nixl exit", f"a process with NIXL ends with status {code} although all went well", CRASH_REMEDY))
    used = answer["transport"] or "unknown"
    if not answer["written"]:
        checks.append(failed("ucx transport", f"bytes pushed by {used} did not arrive", "report this with UCX_LOG_LEVEL=debug output"))
    elif transports.rdma and not answer["rdma"]:
        checks.append(
            failed(
                "ucx transport",
                f"RDMA was asked for, but UCX opened no device (pushes by {used})",
                "see the rdma lines; UCX_MODULES must not exclude ib",
            )
        )
    else:
        checks.append(ok("ucx transport", f"pushes on this machine: {used} (UCX_TLS={','.join(transports.tls)})"))
    return checks


def check_loopback(settings: Settings, machine: Machine) -> list[Check]:
    """Write and read over a reliable connection of each active port with itself, marked as KV."""
    if not machine.active_ports:
        return [skipped("loop-back", "no active RDMA port")]
    try:
        verbs.load()
    except DualPathError as error:
        return [skipped("loop-back", str(error))]
    marking = settings.traffic.kv_read.marking
    checks = []
    for port in machine.active_ports:
        name = f"loop-back {port.ucx_name}"
        answer, _ = run_probe(["loopback", port.ucx_name, str(marking.sl), str(marking.dscp)], {})
        if "error" in answer:
            checks.append(failed(name, answer["error"], "the card cannot be used for KV: check its driver, address and the switch"))
        elif not (answer["write"] and answer["read"]):
            checks.append(failed(name, "bytes did not arrive", "check the card's firmware and the IOMMU's settings"))
        elif port.link_layer == "Ethernet" and answer["traffic_class"] != marking.traffic_class:
            text = f"traffic class {answer['traffic_class']}, should be {marking.traffic_class}"
            checks.append(failed(name, text, "something overrides it: /sys/class/infiniband/*/tc/*/traffic_class, cma_roce_tos"))
        else:
            checks.append(ok(name, f"write and read in KV's class (SL {marking.sl}, DSCP {marking.dscp})"))
    return checks


def run_probe(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """A probe's answer ({"error": ...} if it has none) and exit code."""
    command = [sys.executable, "-m", "dualpath_ray.doctor.probe", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, env={**os.environ, **environment}, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {PROBE_TIMEOUT_S} s"}, -1
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        return {"error": f"the probe ended with status {done.returncode}: {done.stderr.strip()[-300:]}"}, done.returncode
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer, done.returncode
