"""Machines of several shapes, as the kernel shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.pairing import Distance, plan_nics
from dualpath_ray.rdma.sysfs import read_machine
from tests.unit.rdma.tree import SysfsTree, dgx_h100


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "sys")


def test_a_dgx_pairs_each_gpu_with_the_card_under_its_switch(tree: SysfsTree) -> None:
    dgx_h100(tree)
    machine = read_machine(tree.root)
    assert [device.name for device in machine.devices] == [f"mlx5_{n}" for n in range(8)] + ["mlx5_9", "mlx5_10", "mlx5_11"]
    plan = plan_nics(machine)
    assert [(pair.accelerator.address[5:7], pair.port.device) for pair in plan.pairs] == [
        ("1b", "mlx5_0"), ("40", "mlx5_3"), ("50", "mlx5_4"), ("60", "mlx5_5"),
        ("9d", "mlx5_6"), ("bf", "mlx5_9"), ("cf", "mlx5_10"), ("df", "mlx5_11"),
    ]  # fmt: skip
    assert {pair.distance for pair in plan.pairs} == {Distance.SWITCH}
    assert plan.storage is not None and plan.storage.ucx_name == "mlx5_2:1"  # mlx5_1's cable is not plugged in
    assert not plan.shared
    assert plan.compute_port("0000:BF:00.0") == machine.port("mlx5_9")


def test_a_gpu_whose_own_card_is_down_gets_another_one(tree: SysfsTree) -> None:
    """Sharing a neighbour's card is worse than a card of its own, but better than none."""
    dgx_h100(tree)
    (tree.root / "class/infiniband/mlx5_4/ports/1/state").write_text("1: DOWN\n", encoding="ascii")
    plan = plan_nics(read_machine(tree.root))
    lost = plan.pairs[2]
    assert lost.accelerator.address == "0000:50:00.0"
    assert lost.port.active and lost.distance > Distance.SWITCH
    assert [pair.distance for pair in plan.pairs].count(Distance.SWITCH) == 7


def test_what_a_port_says(tree: SysfsTree) -> None:
    dgx_h100(tree)
    machine = read_machine(tree.root)
    infiniband, roce, down = machine.port("mlx5_0"), machine.port("mlx5_2:1"), machine.port("mlx5_1")
    assert infiniband and roce and down
    assert (infiniband.link_layer, infiniband.gbps, infiniband.lid, infiniband.mtu, infiniband.netdev) == (
        "InfiniBand",
        400,
        26,
        None,
        None,
    )
    assert (roce.link_layer, roce.gbps, roce.mtu, roce.netdev) == ("Ethernet", 200, 4096, "ens6f1")
    assert roce.gid is not None and (roce.gid.index, roce.gid.kind) == (3, "RoCE v2")
    assert len(roce.gids) == 4  # the entry of zeros is none
    assert not down.active and (down.state, down.physical_state) == ("DOWN", "Disabled")
    device = machine.devices[0]
    assert device.numa_node == 0 and device.firmware == "28.39.1002"
    assert device.pci == ("pci0000:15", "0000:15:01.0", "0000:16:00.0", "0000:17:00.0", "0000:18:00.0")


def test_one_card_serves_all_gpus_and_the_storage(tree: SysfsTree) -> None:
    for bus in (0x41, 0x61):
        tree.gpu(f"pci0000:{bus - 1:02x}/0000:{bus - 1:02x}:01.1/0000:{bus:02x}:00.0", 0)
    tree.roce("mlx5_0", "pci0000:40/0000:40:03.1/0000:43:00.0", 0, "eth0", mtu=1500)
    plan = plan_nics(read_machine(tree.root))
    assert [(pair.port.device, pair.distance) for pair in plan.pairs] == [("mlx5_0", Distance.HOST_BRIDGE), ("mlx5_0", Distance.NUMA_NODE)]
    assert plan.storage is not None and plan.storage.mtu == 1024
    assert plan.shared


def test_two_cards_without_switches_go_to_the_gpus_of_their_socket(tree: SysfsTree) -> None:
    for number, bus in enumerate((0x17, 0x65, 0x98, 0xE3)):
        tree.gpu(f"pci0000:{bus - 1:02x}/0000:{bus - 1:02x}:02.0/0000:{bus:02x}:00.0", number // 2)
    tree.infiniband("mlx5_0", "pci0000:30/0000:30:02.0/0000:31:00.0", 0)
    tree.infiniband("mlx5_1", "pci0000:b0/0000:b0:02.0/0000:b1:00.0", 1)
    plan = plan_nics(read_machine(tree.root))
    assert [pair.port.device for pair in plan.pairs] == ["mlx5_0", "mlx5_0", "mlx5_1", "mlx5_1"]
    assert plan.shared


def test_a_bond_is_one_port_of_its_interface(tree: SysfsTree) -> None:
    tree.gpu("pci0000:40/0000:40:01.1/0000:41:00.0", 0, vendor="0x1002", kind="0x120000")
    tree.roce("mlx5_bond_0", "pci0000:20/0000:20:01.1/0000:21:00.0", 0, "bond0", slaves="ens1f0 ens1f1")
    machine = read_machine(tree.root)
    port = machine.port("mlx5_bond_0:1")
    assert port is not None and port.netdev == "bond0"
    plan = plan_nics(machine)
    assert [(pair.accelerator.vendor, pair.port.device) for pair in plan.pairs] == [("AMD", "mlx5_bond_0")]


def test_software_devices_have_no_place_on_the_bus(tree: SysfsTree) -> None:
    tree.roce("rxe0", None, -1, "v0", mtu=4200, rate="2.5 Gb/sec (1X SDR)")
    machine = read_machine(tree.root)
    assert (machine.devices[0].pci, machine.devices[0].numa_node) == ((), None)
    assert machine.active_ports[0].mtu == 4096
    plan = plan_nics(machine)
    assert plan.pairs == () and plan.storage == machine.active_ports[0]


def test_no_card_is_no_error(tree: SysfsTree, tmp_path: Path) -> None:
    tree.gpu("pci0000:40/0000:40:01.1/0000:41:00.0", 0)
    for machine in (read_machine(tree.root), read_machine(tmp_path / "nothing")):
        plan = plan_nics(machine)
        assert (plan.pairs, plan.storage, plan.shared) == ((), None, False)
        assert not machine.active_ports


def test_the_storage_card_can_be_named(tree: SysfsTree) -> None:
    dgx_h100(tree)
    machine = read_machine(tree.root)
    plan = plan_nics(machine, storage="mlx5_7")
    assert plan.storage is not None and plan.storage.device == "mlx5_7"
    with pytest.raises(ConfigError, match=r"no RDMA port 'mlx5_99'; this machine has: mlx5_0:1, mlx5_1:1"):
        plan_nics(machine, storage="mlx5_99")


def test_an_integrated_display_chip_is_no_gpu(tree: SysfsTree) -> None:
    tree.gpu("pci0000:00/0000:00:02.0", 0, vendor="0x1a03", kind="0x030000")
    assert read_machine(tree.root).accelerators == ()
