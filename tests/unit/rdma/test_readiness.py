"""Why RDMA cannot be used, before UCX falls back to something else in silence."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_ray.rdma.readiness import MemoryLimit, rdma_problems
from dualpath_ray.rdma.sysfs import read_machine
from tests.unit.rdma.tree import SysfsTree

FREE = MemoryLimit(None)


@pytest.fixture
def verbs(tmp_path: Path) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    (folder / "uverbs0").touch()
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> SysfsTree:
    tree = SysfsTree(tmp_path / "sys")
    tree.infiniband("mlx5_0", "pci0000:30/0000:30:02.0/0000:31:00.0", 0)
    tree.infiniband("mlx5_1", "pci0000:b0/0000:b0:02.0/0000:b1:00.0", 1, state="2: INIT")
    tree.roce("mlx5_2", "pci0000:b0/0000:b0:03.0/0000:b2:00.0", 1, "eth2", state="1: DOWN")
    return tree


def problems(tree: SysfsTree, ports: list[str], folder: Path, nbytes: int = 1 << 30, limit: MemoryLimit = FREE) -> list[str]:
    return [str(problem) for problem in rdma_problems(read_machine(tree.root), ports, nbytes, limit, folder)]


def test_nothing_is_in_the_way(tree: SysfsTree, verbs: Path) -> None:
    assert problems(tree, ["mlx5_0:1"], verbs) == []
    assert problems(tree, [], verbs) == []
    assert problems(tree, ["mlx5_0"], verbs, limit=MemoryLimit(1 << 30)) == []


@pytest.mark.parametrize(
    ("port", "words"),
    [
        ("mlx5_1:1", ["mlx5_1:1 is INIT", "subnet manager"]),
        ("mlx5_2:1", ["mlx5_2:1 is DOWN", "interface up"]),
        ("mlx5_9", ["no RDMA port mlx5_9", "mlx5_0:1, mlx5_1:1, mlx5_2:1"]),
    ],
)
def test_a_port_that_cannot_be_used(tree: SysfsTree, verbs: Path, port: str, words: list[str]) -> None:
    (problem,) = problems(tree, ["mlx5_0:1", port], verbs)
    assert all(word in problem for word in words)


def test_no_port_is_active(tree: SysfsTree, verbs: Path) -> None:
    (tree.root / "class/infiniband/mlx5_0/ports/1/state").write_text("1: DOWN\n", encoding="ascii")
    (problem,) = problems(tree, [], verbs)
    assert "mlx5_0:1 DOWN/LinkUp, mlx5_1:1 INIT/Polling" in problem


def test_no_device(tmp_path: Path, verbs: Path) -> None:
    (problem,) = problems(SysfsTree(tmp_path / "empty"), [], verbs)
    assert "no RDMA device" in problem and "transfer.fabric=tcp" in problem


def test_a_container_without_the_device_files(tree: SysfsTree, tmp_path: Path) -> None:
    (problem,) = problems(tree, [], tmp_path / "dev")
    assert "no uverbs device" in problem and "--device=/dev/infiniband" in problem


def test_too_little_lockable_memory(tree: SysfsTree, verbs: Path) -> None:
    (problem,) = problems(tree, [], verbs, limit=MemoryLimit(8 << 20))
    assert problem.startswith("1024 MiB must be locked for RDMA, the limit is 8192 KiB") and "memlock" in problem
