"""Writes sysfs trees of machines: the same files, links and words as the kernel's, under any root."""

from __future__ import annotations

from pathlib import Path

LINK_LOCAL = "fe80:0000:0000:0000:{:04x}:a2ff:fe00:0001"
MAPPED = "0000:0000:0000:0000:0000:ffff:0a00:{:04x}"


class SysfsTree:
    """A tree under construction. PCI paths are given from the host bridge down: `pci0000:15/0000:15:01.0/0000:18:00.0`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for folder in ("class/infiniband", "class/net", "bus/pci/devices", "devices"):
            (root / folder).mkdir(parents=True)
        self._count = 0

    def gpu(self, pci: str, numa: int, vendor: str = "0x10de", kind: str = "0x030200") -> None:
        function = self._function(pci, numa)
        self._write(function, {"vendor": vendor, "class": kind})

    def infiniband(self, name: str, pci: str, numa: int, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)") -> None:
        """A single-port card."""
        port = self._device(name, pci, numa)
        physical = "5: LinkUp" if state.startswith("4") else "2: Polling"
        self._write(port, {"state": state, "phys_state": physical, "link_layer": "InfiniBand", "rate": rate, "lid": "0x1a"})
        self._gid(port, 0, LINK_LOCAL.format(self._count), "IB/RoCE v1", None)

    def roce(
        self,
        name: str,
        pci: str | None,
        numa: int,
        netdev: str,
        mtu: int = 9000,
        state: str = "4: ACTIVE",
        rate: str = "200 Gb/sec (4X HDR)",
        slaves: str = "",
    ) -> None:
        """A RoCE card on a network interface (with `slaves`, a bond); without `pci` a software device."""
        port = self._device(name, pci, numa)
        physical = "5: LinkUp" if state.startswith("4") else "3: Disabled"
        self._write(port, {"state": state, "phys_state": physical, "link_layer": "Ethernet", "rate": rate, "lid": "0x0"})
        self._gid(port, 0, LINK_LOCAL.format(self._count), "IB/RoCE v1", netdev)
        self._gid(port, 1, LINK_LOCAL.format(self._count), "RoCE v2", netdev)
        self._gid(port, 2, MAPPED.format(self._count), "IB/RoCE v1", netdev)
        self._gid(port, 3, MAPPED.format(self._count), "RoCE v2", netdev)
        self._write(port / "gids", {"4": "0000:0000:0000:0000:0000:0000:0000:0000"})  # unused entries are zero, and have no type
        interface = self.root / "class/net" / netdev
        interface.mkdir()
        self._write(interface, {"mtu": str(mtu)})
        if slaves:
            (interface / "bonding").mkdir()
            self._write(interface / "bonding", {"slaves": slaves})

    def _device(self, name: str, pci: str | None, numa: int) -> Path:
        self._count += 1
        function = self._function(pci, numa) if pci else self.root / "devices/virtual"
        folder = function / "infiniband" / name
        (folder / "ports/1/gids").mkdir(parents=True)
        (folder / "ports/1/gid_attrs/types").mkdir(parents=True)
        (folder / "ports/1/gid_attrs/ndevs").mkdir(parents=True)
        self._write(folder, {"fw_ver": "28.39.1002" if pci else ""})
        if pci:
            (folder / "device").symlink_to(function)
        (self.root / "class/infiniband" / name).symlink_to(folder)
        return folder / "ports/1"

    def _gid(self, port: Path, index: int, value: str, kind: str, netdev: str | None) -> None:
        self._write(port / "gids", {str(index): value})
        self._write(port / "gid_attrs/types", {str(index): kind})
        if netdev is not None:
            self._write(port / "gid_attrs/ndevs", {str(index): netdev})

    def _function(self, pci: str, numa: int) -> Path:
        folder = self.root / "devices" / pci
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self._write(folder, {"numa_node": str(numa), "vendor": "0x15b3", "class": "0x020700"})
            (self.root / "bus/pci/devices" / folder.name).symlink_to(folder)
        return folder

    def _write(self, folder: Path, files: dict[str, str]) -> None:
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n", encoding="ascii")


def dgx_h100(tree: SysfsTree) -> None:
    """Two sockets, eight GPUs each with a ConnectX-7 under its own PCIe switch, and two more cards for storage on root ports of their own.

    The numbering is the real machine's: GPU order and card order differ, and storage cards stand between the compute cards.
    """
    buses = ((0x15, 0x18, 0x1A), (0x3A, 0x3D, 0x3F), (0x4A, 0x4D, 0x4F), (0x5A, 0x5D, 0x5F),
             (0x97, 0x9A, 0x9C), (0xB9, 0xBC, 0xBE), (0xC9, 0xCC, 0xCE), (0xD9, 0xDC, 0xDE))  # fmt: skip
    cards = ("mlx5_0", "mlx5_3", "mlx5_4", "mlx5_5", "mlx5_6", "mlx5_9", "mlx5_10", "mlx5_11")
    for number, ((root, card, gpu), name) in enumerate(zip(buses, cards, strict=True)):
        switch = f"pci0000:{root:02x}/0000:{root:02x}:01.0/0000:{root + 1:02x}:00.0"
        tree.gpu(f"{switch}/0000:{root + 2:02x}:01.0/0000:{gpu + 1:02x}:00.0", number // 4)
        tree.infiniband(name, f"{switch}/0000:{root + 2:02x}:00.0/0000:{card:02x}:00.0", number // 4)
    tree.roce("mlx5_1", "pci0000:26/0000:26:01.0/0000:29:00.0", 0, "ens6f0", state="1: DOWN")
    tree.roce("mlx5_2", "pci0000:26/0000:26:01.0/0000:29:00.1", 0, "ens6f1")
    tree.roce("mlx5_7", "pci0000:a8/0000:a8:01.0/0000:aa:00.0", 1, "ens5f0")
