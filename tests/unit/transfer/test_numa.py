"""The arena beside its network card; nothing where there is nothing to choose."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from dualpath_ray.config.storage import StagingSettings
from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.device import Machine
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.transfer import numa
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate
from dualpath_ray.transfer.numa import choose_node, online_nodes, prefer_node
from tests.unit.rdma.tree import SysfsTree

NOTHING = Machine((), ())


@pytest.fixture
def two_sockets(tmp_path: Path) -> Machine:
    """A card for the GPU on socket 0, one for storage on socket 1."""
    tree = SysfsTree(tmp_path / "sys")
    tree.gpu("pci0000:15/0000:15:01.0/0000:18:00.0/0000:1b:00.0", 0)
    tree.infiniband("mlx5_0", "pci0000:15/0000:15:01.0/0000:18:01.0/0000:1c:00.0", 0)
    tree.infiniband("mlx5_1", "pci0000:a0/0000:a0:01.0/0000:a2:00.0", 1)
    return read_machine(tree.root)


@pytest.mark.parametrize("text, nodes", [("0", (0,)), ("0-1", (0, 1)), ("0,2-3", (0, 2, 3))])
def test_nodes_are_read_as_the_kernel_writes_them(tmp_path: Path, text: str, nodes: tuple[int, ...]) -> None:
    (tmp_path / "devices/system/node").mkdir(parents=True)
    (tmp_path / "devices/system/node/online").write_text(text + "\n")
    assert online_nodes(tmp_path) == nodes
    assert online_nodes(tmp_path / "nowhere") == (0,)


def test_the_arena_belongs_beside_the_storage_card(two_sockets: Machine) -> None:
    assert choose_node("auto", two_sockets, (0, 1)) == 1
    assert choose_node(0, two_sockets, (0, 1)) == 0, "what is set wins"
    assert choose_node(None, two_sockets, (0, 1)) is None


def test_nothing_is_placed_where_there_is_nothing_to_choose(two_sockets: Machine) -> None:
    assert choose_node("auto", two_sockets, (0,)) is None
    assert choose_node(0, two_sockets, (0,)) is None
    assert choose_node("auto", NOTHING, (0, 1)) is None


def test_a_node_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"numa_node is 2, but this machine has 0, 1"):
        choose_node(2, NOTHING, (0, 1))
    for wrong in (-1, "near"):
        with pytest.raises(ValueError, match="numa_node"):
            StagingSettings(numa_node=wrong)  # type: ignore[arg-type]


def test_the_kernel_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """As it says itself. (Where system calls for this are filtered, it says why not.)"""
    memory = allocate(64 * PAGE_BYTES, numa_node=online_nodes()[0])
    if "cannot be placed" in caplog.text:
        pytest.skip(caplog.text)
    maps = Path("/proc/self/numa_maps")
    if not maps.exists():
        pytest.skip("the kernel does not say how memory is placed")
    memory[:] = 7
    (line,) = [line for line in maps.read_text().splitlines() if line.startswith(f"{memory.ctypes.data:08x} ")]
    assert line.split()[1].startswith("prefer"), line


def test_memory_that_cannot_be_placed_is_memory_all_the_same(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert allocate(PAGE_BYTES, numa_node=1023).nbytes == PAGE_BYTES
        assert "cannot be placed on NUMA node 1023" in caplog.text
        monkeypatch.setattr(numa.platform, "machine", lambda: "riscv64")
        assert not prefer_node(0, PAGE_BYTES, 0)
