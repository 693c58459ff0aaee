"""Which network card serves which GPU (paper section 3: one compute NIC per GPU, under the same PCIe switch), and which the storage."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.device import Accelerator, Machine, Port, RdmaDevice


class Distance(IntEnum):
    """How far apart two PCI functions are. Traffic between them crosses no more than what the name says."""

    SWITCH = 0  # PCIe bridges below one root port only (nvidia-smi: PIX, PXB)
    HOST_BRIDGE = 1  # the CPU's root complex (PHB)
    NUMA_NODE = 2  # between root complexes of one socket (NODE)
    SYSTEM = 3  # the link between sockets (SYS), or unknown


@dataclass(frozen=True, slots=True)
class Pair:
    """A GPU and its compute NIC."""

    accelerator: Accelerator
    port: Port
    distance: Distance


@dataclass(frozen=True, slots=True)
class NicPlan:
    """`storage` is None on a machine without RDMA devices; `shared` says that it also serves GPUs, for want of another one."""

    pairs: tuple[Pair, ...]
    storage: Port | None
    shared: bool

    def compute_port(self, accelerator: str) -> Port | None:
        """The compute NIC of the GPU at this PCI address."""
        return next((pair.port for pair in self.pairs if pair.accelerator.address == accelerator.lower()), None)


def distance(one: Accelerator | RdmaDevice, other: Accelerator | RdmaDevice) -> tuple[Distance, int]:
    """Distance and, to tell equals apart, the number of PCIe hops."""
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.pci, other.pci, strict=False)))
    hops = len(one.pci) + len(other.pci) - 2 * common
    if common >= 2:
        return Distance.SWITCH, hops
    if common == 1:
        return Distance.HOST_BRIDGE, hops
    same_node = one.numa_node is not None and one.numa_node == other.numa_node
    return Distance.NUMA_NODE if same_node else Distance.SYSTEM, hops


def plan_nics(machine: Machine, storage: str | None = None) -> NicPlan:
    """Give each GPU the nearest active port, evenly, and choose the storage NIC.

    `storage` names the storage NIC (`mlx5_1` or `mlx5_1:1`). By default it is the first active port that shares no PCIe switch with a
    GPU, as cards for storage do in usual machines; where there is none, one that serves GPUs does both. Raises ConfigError for a
    name that is no port.
    """
    usable = [(device, port) for device in machine.devices if (port := device.active_port) is not None]
    chosen = None
    if storage is not None:
        chosen = machine.port(storage)
        if chosen is None:
            names = ", ".join(port.ucx_name for device in machine.devices for port in device.ports) or "none"
            raise ConfigError(f"there is no RDMA port {storage!r}; this machine has: {names}")
    else:
        free = [port for device, port in usable if all(distance(device, each)[0] > Distance.SWITCH for each in machine.accelerators)]
        chosen = free[0] if free and len(free) < len(usable) else None
    compute = [(device, port) for device, port in usable if port != chosen] or usable
    pairs = _nearest(machine.accelerators, _without_storage_cards(machine, compute))
    if chosen is None and usable:
        chosen = usable[0][1]
    return NicPlan(pairs, chosen, any(pair.port == chosen for pair in pairs))


def _without_storage_cards(machine: Machine, ports: list[tuple[RdmaDevice, Port]]) -> list[tuple[RdmaDevice, Port]]:
    """If every GPU has a card under its own switch, cards elsewhere are for something else."""
    beside = [
        (device, port) for device, port in ports if any(distance(device, each)[0] == Distance.SWITCH for each in machine.accelerators)
    ]
    served = all(any(distance(device, each)[0] == Distance.SWITCH for device, _ in beside) for each in machine.accelerators)
    return beside if beside and served else ports


def _nearest(accelerators: tuple[Accelerator, ...], ports: list[tuple[RdmaDevice, Port]]) -> tuple[Pair, ...]:
    """Nearest pairs first; no card gets more GPUs than an even share, rounded up."""
    if not ports:
        return ()
    share = -(-len(accelerators) // len(ports))
    candidates = sorted(
        (distance(device, each), number, position)
        for number, each in enumerate(accelerators)
        for position, (device, _) in enumerate(ports)
    )  # fmt: skip
    load: Counter[int] = Counter()
    taken: dict[int, Pair] = {}
    for (level, _), number, position in candidates:
        if number not in taken and load[position] < share:
            load[position] += 1
            taken[number] = Pair(accelerators[number], ports[position][1], level)
    return tuple(taken[number] for number in range(len(accelerators)))
