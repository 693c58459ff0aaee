"""What keeps a process from using RDMA, each with its remedy. Checked before NIXL is loaded, because UCX does not complain."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dualpath_ray.rdma.device import Machine

CAP_IPC_LOCK = 1 << 14
UNLIMITED = resource.RLIM_INFINITY
VERBS_FOLDER = Path("/dev/infiniband")


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not work, and what to do about it."""

    text: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.text}: {self.remedy}"


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """How much memory this process may lock (bytes; None: any amount)."""

    nbytes: int | None

    @classmethod
    def of_this_process(cls) -> MemoryLimit:
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return cls(None if soft == UNLIMITED or _may_lock_anything() else soft)


def rdma_problems(
    machine: Machine, ports: Sequence[str], nbytes: int, limit: MemoryLimit, verbs_folder: Path = VERBS_FOLDER
) -> list[Problem]:
    """Why a process that registers `nbytes` cannot use `ports` (none named: any); empty when nothing is in the way."""
    return _port_problems(machine, ports) + _access_problems(machine, verbs_folder) + _memory_problems(nbytes, limit)


def _port_problems(machine: Machine, ports: Sequence[str]) -> list[Problem]:
    if not machine.devices:
        return [Problem("there is no RDMA device", "load the card's driver (mlx5_ib, ...), or set transfer.fabric=tcp")]
    if not ports:
        if machine.active_ports:
            return []
        states = ", ".join(f"{port.ucx_name} {port.state}/{port.physical_state}" for device in machine.devices for port in device.ports)
        return [Problem(f"no RDMA port is active ({states})", "check cables, switch ports and the subnet manager (ibstat, rdma link)")]
    problems = []
    for name in ports:
        port = machine.port(name)
        if port is None:
            known = ", ".join(port.ucx_name for device in machine.devices for port in device.ports)
            problems.append(Problem(f"there is no RDMA port {name}", f"transfer.net_devices may name: {known}"))
        elif not port.active:
            problems.append(
                Problem(f"RDMA port {name} is {port.state}, its link {port.physical_state}", _down_remedy(port.state, port.link_layer))
            )
    return problems


def _down_remedy(state: str, link_layer: str) -> str:
    if state == "INIT" and link_layer == "InfiniBand":
        return "the link is up but no subnet manager has configured it; start opensm or the switch's"
    if link_layer == "Ethernet":
        return "bring its network interface up (ip link set ... up) and check the cable, or name other ports in transfer.net_devices"
    return "check the cable and the switch port, or name other ports in transfer.net_devices"


def _access_problems(machine: Machine, folder: Path) -> list[Problem]:
    if not machine.devices:
        return []
    files = sorted(folder.glob("uverbs*"))
    if not files:
        return [
            Problem(
                f"{folder} has no uverbs device", "load ib_uverbs; in a container pass it in (--device=/dev/infiniband, an RDMA plug-in)"
            )
        ]
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        return [Problem(f"no permission to open {folder}/uverbs*", "run as a user of its group (rdma), or as root")]
    return []


def _memory_problems(nbytes: int, limit: MemoryLimit) -> list[Problem]:
    if limit.nbytes is None or limit.nbytes >= nbytes:
        return []
    return [
        Problem(
            f"{nbytes >> 20} MiB must be locked for RDMA, the limit is {limit.nbytes >> 10} KiB (ulimit -l)",
            "raise it to unlimited (limits.conf memlock, LimitMEMLOCK= of the service, --ulimit memlock=-1 of the container)",
        )
    ]


def _may_lock_anything() -> bool:
    """CAP_IPC_LOCK lifts the limit."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return False
    effective = next((line.split()[1] for line in status.splitlines() if line.startswith("CapEff:")), "0")
    return bool(int(effective, 16) & CAP_IPC_LOCK)


def opens_rdma() -> bool:
    """Whether this process has an RDMA device open: after NIXL has started, whether UCX took one."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"{VERBS_FOLDER}/uverbs"):
                return True
        except OSError:
            continue
    return False
