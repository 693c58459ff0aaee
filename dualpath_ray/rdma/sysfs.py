"""Reads a machine's RDMA devices and accelerators from sysfs. Never fails: what cannot be read is left out or empty."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from dualpath_ray.rdma.device import Accelerator, Gid, LinkLayer, Machine, Port, RdmaDevice

SYS = Path("/sys")
PCI_ADDRESS = re.compile(r"^(pci)?[0-9a-f]{4,}:[0-9a-f]{2}(:[0-9a-f]{2}\.[0-7])?$")
LINK_LAYERS: dict[str, LinkLayer] = {"InfiniBand": "InfiniBand", "Ethernet": "Ethernet"}
VENDORS = {"0x10de": "NVIDIA", "0x1002": "AMD"}
GPU_CLASSES = ("0x0300", "0x0302", "0x0380", "0x1200")  # VGA, 3D, display and processing accelerator
ZERO_GID = re.compile(r"^[0:]*$|^fe80(:0000){7}$")
RDMA_MTUS = (4096, 2048, 1024, 512, 256)
ROCE_OVERHEAD = 58  # IP, UDP, transport headers and checksum that must fit into the interface's MTU beside the payload


def read_machine(root: Path = SYS) -> Machine:
    """Everything under a sysfs tree."""
    devices = tuple(_device(path, root) for path in sorted(_entries(root / "class/infiniband"), key=_natural))
    found = (_accelerator(path) for path in _entries(root / "bus/pci/devices"))
    return Machine(devices, tuple(accelerator for accelerator in found if accelerator is not None))


def _device(path: Path, root: Path) -> RdmaDevice:
    ports = tuple(_port(path.name, folder, root) for folder in sorted(_entries(path / "ports"), key=_natural))
    return RdmaDevice(path.name, ports, _pci_path(path), _numa_node(path / "device"), _text(path / "fw_ver"))


def _port(device: str, folder: Path, root: Path) -> Port:
    link_layer = LINK_LAYERS.get(_text(folder / "link_layer"), "Unspecified")
    rate = _text(folder / "rate")
    gids = tuple(gid for entry in sorted(_entries(folder / "gids"), key=_natural) if (gid := _gid(folder, entry)))
    port = Port(
        device,
        int(folder.name),
        _state(folder / "state"),
        _state(folder / "phys_state"),
        link_layer,
        float(rate.split()[0]) if rate else 0.0,
        rate,
        int(_text(folder / "lid") or "0", 0),
        gids,
    )
    return _with_mtu(port, root) if link_layer == "Ethernet" else port


def _with_mtu(port: Port, root: Path) -> Port:
    """On Ethernet the RDMA MTU follows from the interface's; on InfiniBand sysfs does not tell it."""
    text = _text(root / "class/net" / port.netdev / "mtu") if port.netdev else ""
    mtu = next((size for size in RDMA_MTUS if text and size + ROCE_OVERHEAD <= int(text)), None)
    return dataclasses.replace(port, mtu=mtu)


def _gid(folder: Path, entry: Path) -> Gid | None:
    value = _text(entry)
    if not value or ZERO_GID.match(value):
        return None
    attributes = folder / "gid_attrs"
    return Gid(int(entry.name), value, _text(attributes / "types" / entry.name), _text(attributes / "ndevs" / entry.name) or None)


def _accelerator(path: Path) -> Accelerator | None:
    vendor = VENDORS.get(_text(path / "vendor"))
    if vendor is None or not _text(path / "class").startswith(GPU_CLASSES):
        return None
    return Accelerator(path.name, vendor, _pci_path(path), _numa_node(path))


def _pci_path(path: Path) -> tuple[str, ...]:
    """Host bridge, bridges and switches, the function itself: `("pci0000:00", "0000:00:01.0", "0000:01:00.0")`."""
    return tuple(part for part in Path(os.path.realpath(path)).parts if PCI_ADDRESS.match(part))


def _numa_node(path: Path) -> int | None:
    text = _text(path / "numa_node")
    return int(text) if text and int(text) >= 0 else None


def _state(path: Path) -> str:
    return _text(path).partition(":")[2].strip()


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _natural(path: Path) -> list[int | str]:
    """Sorts mlx5_2 before mlx5_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _text(path: Path) -> str:
    """A file's only line, empty when there is no file or the kernel refuses (GID entries that are not in use do)."""
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
