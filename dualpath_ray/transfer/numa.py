"""Memory on a chosen NUMA node: what a network card reads over the link between sockets comes later and takes other traffic's room."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from pathlib import Path
from typing import Literal

from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.device import Machine
from dualpath_ray.rdma.pairing import plan_nics

log = logging.getLogger(__name__)

MBIND = {"x86_64": 237, "aarch64": 235}  # number of the system call; glibc has no function for it
MPOL_PREFERRED = 1
NodeChoice = Literal["auto"] | int | None


def online_nodes(root: Path = Path("/sys")) -> tuple[int, ...]:
    """NUMA nodes of this machine; (0,) where the kernel knows of none."""
    try:
        text = (root / "devices/system/node/online").read_text().strip()
    except OSError:
        return (0,)
    nodes: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return tuple(nodes)


def choose_node(choice: NodeChoice, machine: Machine, nodes: tuple[int, ...]) -> int | None:
    """Where a gateway's arena belongs; None to leave it to the kernel.

    `auto`: beside the storage NIC, on which every byte of the arena comes or goes. Raises ConfigError for a node that does not exist.
    """
    if choice is None:
        return None
    if isinstance(choice, int):
        if choice not in nodes:
            raise ConfigError(f"staging.numa_node is {choice}, but this machine has {', '.join(map(str, nodes))}")
        return choice if len(nodes) > 1 else None
    storage = plan_nics(machine).storage
    device = next((each for each in machine.devices if storage is not None and storage in each.ports), None)
    return device.numa_node if device is not None and device.numa_node in nodes and len(nodes) > 1 else None


def prefer_node(address: int, nbytes: int, node: int) -> bool:
    """Have new pages of this range come from `node` while it has any. False, with a log line, if that cannot be had."""
    number = MBIND.get(platform.machine())
    if number is None:
        log.warning("memory cannot be placed on NUMA node %d: mbind is not known for %s", node, platform.machine())
        return False
    words = node // 64 + 1
    mask = (ctypes.c_uint64 * words)()
    mask[node // 64] = 1 << node % 64
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (address, nbytes, MPOL_PREFERRED, ctypes.addressof(mask), 64 * words + 1, 0)
    if libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(each) for each in arguments)):
        log.warning("memory cannot be placed on NUMA node %d: %s", node, os.strerror(ctypes.get_errno()))
        return False
    return True
