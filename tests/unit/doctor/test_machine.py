"""What the doctor says of machines in several states."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_ray.config.transfer import TransferSettings
from dualpath_ray.doctor.check import Check
from dualpath_ray.doctor.machine import check_clock, check_devices, check_huge_pages, check_memlock
from dualpath_ray.rdma.device import Machine
from dualpath_ray.rdma.readiness import MemoryLimit
from dualpath_ray.rdma.sysfs import read_machine
from tests.unit.rdma.tree import SysfsTree, dgx_h100

ANY, RDMA = TransferSettings(), TransferSettings(fabric="rdma")
NOTHING = Machine((), ())


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    return SysfsTree(tmp_path / "sys")


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_a_good_machine_is_described(tree: SysfsTree) -> None:
    dgx_h100(tree)
    checks = by_name(check_devices(read_machine(tree.root), RDMA))
    assert checks["rdma port mlx5_0:1"].status == "ok"
    assert "400 Gb/sec (4X NDR)" in checks["rdma port mlx5_0:1"].text
    assert "RoCE v2, MTU 4096" in checks["rdma port mlx5_2:1"].text
    assert checks["compute NIC of GPU 0000:1b:00.0"].text == "mlx5_0:1, same PCIe switch"
    assert checks["storage NIC"].text == "mlx5_2:1"
    down = checks["rdma port mlx5_1:1"]
    assert down.status == "warning" and "DOWN" in down.text and down.remedy
    assert {check.status for check in checks.values()} == {"ok", "warning"}


def test_a_small_mtu_and_a_far_card_are_warned_of(tree: SysfsTree) -> None:
    tree.gpu("pci0000:40/0000:40:01.1/0000:41:00.0", 0)
    tree.roce("mlx5_0", "pci0000:40/0000:40:03.1/0000:43:00.0", 0, "eth0", mtu=1500)
    checks = by_name(check_devices(read_machine(tree.root), ANY))
    assert checks["rdma port mlx5_0:1"].status == "warning" and "raise the MTU of eth0" in checks["rdma port mlx5_0:1"].remedy
    assert checks["compute NIC of GPU 0000:41:00.0"].status == "warning"
    assert checks["storage NIC"].text == "mlx5_0:1, which serves GPUs too"


@pytest.mark.parametrize(("keep", "status"), [("IB/RoCE v1", "failed"), (None, "failed")])
def test_a_roce_port_needs_an_address_of_version_two(tree: SysfsTree, keep: str | None, status: str) -> None:
    tree.roce("mlx5_0", "pci0000:40/0000:40:03.1/0000:43:00.0", 0, "eth0")
    port = tree.root / "class/infiniband/mlx5_0/ports/1"
    for gid in list((port / "gids").iterdir()):
        kind = port / "gid_attrs/types" / gid.name
        if keep is None or (kind.exists() and kind.read_text().strip() != keep):
            gid.unlink()
    (check, *_) = check_devices(read_machine(tree.root), ANY)
    assert check.status == status and check.remedy


def test_no_device_is_fine_unless_rdma_is_wanted() -> None:
    assert check_devices(NOTHING, ANY)[0].status == "ok"
    (check,) = check_devices(NOTHING, RDMA)
    assert check.status == "failed" and "transfer.fabric=tcp" in check.remedy


def test_lockable_memory(tree: SysfsTree) -> None:
    tree.infiniband("mlx5_0", "pci0000:30/0000:30:02.0/0000:31:00.0", 0)
    machine = read_machine(tree.root)
    assert check_memlock(machine, 1 << 30, MemoryLimit(None)).status == "ok"
    assert check_memlock(machine, 1 << 30, MemoryLimit(1 << 30)).status == "ok"
    check = check_memlock(machine, 1 << 30, MemoryLimit(8 << 20))
    assert check.status == "failed" and "--ulimit memlock=-1" in check.remedy
    assert check_memlock(NOTHING, 1 << 30, MemoryLimit(8 << 20)).status == "ok"  # nothing is locked without RDMA


@pytest.mark.parametrize(("text", "status"), [("always [madvise] never", "ok"), ("always madvise [never]", "warning"), (None, "skipped")])
def test_huge_pages(tmp_path: Path, text: str | None, status: str) -> None:
    if text is not None:
        folder = tmp_path / "kernel/mm/transparent_hugepage"
        folder.mkdir(parents=True)
        (folder / "enabled").write_text(text)
    assert check_huge_pages(tmp_path).status == status


def test_the_clock_is_looked_at() -> None:
    assert check_clock().status in ("ok", "warning", "skipped")
