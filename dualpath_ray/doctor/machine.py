"""The machine: RDMA devices, locked memory, huge pages, clocks. Reads sysfs and procfs below roots that tests may give."""

from __future__ import annotations

import ctypes
from pathlib import Path

from dualpath_ray.config.transfer import TransferSettings
from dualpath_ray.doctor.check import Check, failed, ok, skipped, warning
from dualpath_ray.rdma.device import IPV4_MAPPED, Machine, Port
from dualpath_ray.rdma.pairing import Distance, plan_nics
from dualpath_ray.rdma.readiness import MemoryLimit

ROCE_MTU = 4096
STA_UNSYNC = 0x40
DISTANCES = {
    Distance.SWITCH: "same PCIe switch",
    Distance.HOST_BRIDGE: "same root complex",
    Distance.NUMA_NODE: "same socket",
    Distance.SYSTEM: "other socket",
}


def check_devices(machine: Machine, transfer: TransferSettings) -> list[Check]:
    """Every port with its state, address and MTU; the compute NIC of each GPU, and the storage NIC."""
    if not machine.devices:
        if transfer.fabric == "rdma":
            return [failed("rdma", "no RDMA device, but transfer.fabric is rdma", "load the card's driver, or set transfer.fabric=tcp")]
        return [ok("rdma", "no RDMA device; KV travels over shared memory or TCP")]
    checks = [_check_port(port) for device in machine.devices for port in device.ports]
    if not machine.active_ports and transfer.fabric == "rdma":
        checks.append(failed("rdma", "no port is active, but transfer.fabric is rdma", "bring a port up, or set transfer.fabric=tcp"))
    return checks + _check_pairs(machine)


def _check_port(port: Port) -> Check:
    name = f"rdma port {port.ucx_name}"
    text = f"{port.state}, {port.link_layer}, {port.rate or 'speed unknown'}"
    if not port.active:
        return warning(name, text, "it is not used; if it should be: check cable, switch port, subnet manager or `ip link`")
    if port.gid is None:
        return failed(name, f"{text}, no address (GID)", "give its interface an IP address, or start the subnet manager")
    text += f", GID {port.gid.index} {port.gid.value} {port.gid.kind}, MTU {port.mtu or 'unknown'}"
    if port.link_layer == "Ethernet" and port.gid.kind != "RoCE v2":
        return failed(name, text, "RoCE v1 is not routed and has no DSCP: enable RoCE v2 (cma_roce_mode, firmware setting)")
    if port.link_layer == "Ethernet" and not port.gid.value.startswith(IPV4_MAPPED):
        return warning(name, text, f"give {port.netdev} an IPv4 address: the GIDs of link-local ones do not cross routers")
    if port.mtu is not None and port.mtu < ROCE_MTU:
        return warning(name, text, f"raise the MTU of {port.netdev} and the switches to 4200 or more, for RDMA packets of {ROCE_MTU} bytes")
    return ok(name, text)


def _check_pairs(machine: Machine) -> list[Check]:
    plan = plan_nics(machine)
    checks = []
    for pair in plan.pairs:
        name, text = f"compute NIC of GPU {pair.accelerator.address}", f"{pair.port.ucx_name}, {DISTANCES[pair.distance]}"
        if pair.distance == Distance.SWITCH:
            checks.append(ok(name, text))
        else:
            checks.append(warning(name, text, "KV crosses the CPU on its way; a card under the GPU's own PCIe switch would keep it off"))
    if plan.storage is not None:
        shared = ", which serves GPUs too" if plan.shared else ""
        checks.append(ok("storage NIC", f"{plan.storage.ucx_name}{shared}"))
    return checks


def check_memlock(machine: Machine, needed: int, limit: MemoryLimit | None = None) -> Check:
    """Whether staging memory can be registered."""
    limit = limit or MemoryLimit.of_this_process()
    if limit.nbytes is None:
        return ok("locked memory", "unlimited")
    text = f"limit {limit.nbytes >> 20} MiB, staging needs {needed >> 20} MiB"
    remedy = "ulimit -l unlimited: limits.conf memlock, LimitMEMLOCK= of the service, --ulimit memlock=-1 of the container"
    if not machine.devices:
        return ok("locked memory", f"limit {limit.nbytes >> 20} MiB; only RDMA locks memory")
    return ok("locked memory", text) if limit.nbytes >= needed else failed("locked memory", text, remedy)


def check_huge_pages(root: Path = Path("/sys")) -> Check:
    try:
        modes = (root / "kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return skipped("huge pages", "the kernel does not say")
    mode = modes.partition("[")[2].partition("]")[0]
    if mode == "never":
        return warning(
            "huge pages",
            "never",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled: registering large memory in 4 KiB pages takes longer and misses "
            "the card's cache",
        )
    return ok("huge pages", f"transparent huge pages: {mode}")


class _Timex(ctypes.Structure):
    """The head of struct timex; the rest is room for what the kernel writes."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def check_clock() -> Check:
    """Whether something keeps the clock right: traces of several hosts are put together by it."""
    state = _Timex()
    if ctypes.CDLL(None).adjtimex(ctypes.byref(state)) < 0:
        return skipped("clock", "the kernel does not say")
    if state.status & STA_UNSYNC:
        return warning("clock", "not synchronised", "run chronyd or systemd-timesyncd, or traces of several hosts do not line up")
    return ok("clock", f"synchronised within {state.maxerror / 1e3:.0f} ms")
