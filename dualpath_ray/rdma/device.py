"""What a machine has: RDMA devices with their ports, and accelerators, each with its place on the PCI bus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LinkLayer = Literal["InfiniBand", "Ethernet", "Unspecified"]  # the last: EFA, whose devices speak no RC
IPV4_MAPPED = "0000:0000:0000:0000:0000:ffff:"


@dataclass(frozen=True, slots=True)
class Gid:
    """An address of a port. `kind` is the kernel's word: "IB/RoCE v1" or "RoCE v2"; `netdev` the network interface it belongs to."""

    index: int
    value: str
    kind: str
    netdev: str | None


@dataclass(frozen=True, slots=True)
class Port:
    """A port as the kernel reports it. `mtu` is the active RDMA MTU in bytes, None where only the verbs library could tell."""

    device: str
    number: int
    state: str  # ACTIVE, INIT, DOWN, ...
    physical_state: str  # LinkUp, Polling, Disabled, ...
    link_layer: LinkLayer
    gbps: float
    rate: str  # e.g. "400 Gb/sec (4X NDR)"
    lid: int
    gids: tuple[Gid, ...]
    mtu: int | None = None

    @property
    def active(self) -> bool:
        """The port is up and speaks the protocol that transfers use."""
        return self.state == "ACTIVE" and self.link_layer != "Unspecified"

    @property
    def ucx_name(self) -> str:
        """As UCX_NET_DEVICES calls it."""
        return f"{self.device}:{self.number}"

    @property
    def netdev(self) -> str | None:
        """The network interface that carries a RoCE port's packets (a bond, where it is one)."""
        return next((gid.netdev for gid in self.gids if gid.netdev), None)

    @property
    def gid(self) -> Gid | None:
        """The address to use: RoCE v2 over IPv4 before IPv6 before v1, as UCX chooses; on InfiniBand the first."""
        return min(self.gids, key=lambda gid: (gid.kind != "RoCE v2", not gid.value.startswith(IPV4_MAPPED), gid.index), default=None)


@dataclass(frozen=True, slots=True)
class RdmaDevice:
    """An RDMA device. `pci` is its path from the host bridge down, empty for a software device; `numa_node` None if it has none."""

    name: str
    ports: tuple[Port, ...]
    pci: tuple[str, ...]
    numa_node: int | None
    firmware: str = ""

    @property
    def active_port(self) -> Port | None:
        return next((port for port in self.ports if port.active), None)


@dataclass(frozen=True, slots=True)
class Accelerator:
    """A GPU on the PCI bus, named by its address as nvidia-smi and CUDA name it (`0000:1b:00.0`)."""

    address: str
    vendor: str
    pci: tuple[str, ...]
    numa_node: int | None


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything of one machine, in the order of names and addresses."""

    devices: tuple[RdmaDevice, ...]
    accelerators: tuple[Accelerator, ...]

    @property
    def active_ports(self) -> tuple[Port, ...]:
        return tuple(port for device in self.devices for port in device.ports if port.active)

    def port(self, ucx_name: str) -> Port | None:
        """The port that UCX calls `mlx5_0:1`; `mlx5_0` is its first."""
        return next((port for device in self.devices for port in device.ports if ucx_name in (port.ucx_name, port.device)), None)
