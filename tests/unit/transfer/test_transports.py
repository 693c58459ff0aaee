"""What UCX may use, by settings and machine: with RDMA asked for, TCP is never on the list."""

from __future__ import annotations

from pathlib import Path

import pytest

from dualpath_ray.config.transfer import TransferSettings
from dualpath_ray.errors import ConfigError
from dualpath_ray.rdma.device import Machine
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.transfer.transports import Transports, choose_transports
from tests.unit.rdma.tree import SysfsTree, dgx_h100

NOTHING = Machine((), ())


@pytest.fixture
def dgx(tmp_path: Path) -> Machine:
    tree = SysfsTree(tmp_path / "sys")
    dgx_h100(tree)
    return read_machine(tree.root)


def choose(
    machine: Machine, same_machine: bool = False, accelerator: str | None = None, environ: dict[str, str] | None = None, **fields: str
):
    return choose_transports(TransferSettings(**fields), machine, same_machine, accelerator, environ)  # type: ignore[arg-type]


def test_without_rdma_it_is_tcp_or_shared_memory() -> None:
    for same_machine in (False, True):  # an engine and its gateway are on one machine in any case
        assert choose(NOTHING, same_machine=same_machine) == Transports(("sysv", "cma", "tcp", "self"), (), False, same_machine)
        assert choose(NOTHING, same_machine=same_machine).environment() == {"UCX_TLS": "sysv,cma,tcp,self"}


def test_with_rdma_a_gpu_gets_its_own_card_and_no_tcp(dgx: Machine) -> None:
    engine = choose(dgx, accelerator="0000:40:00.0")
    assert engine.environment() == {"UCX_TLS": "rc,sysv,cma,cuda,self", "UCX_NET_DEVICES": "mlx5_3:1"}
    assert engine.rdma
    gateway = choose(dgx)
    assert len(gateway.ports) == 8
    assert not {"mlx5_2:1", "mlx5_7:1"} & set(gateway.ports)  # storage cards


def test_local_copies_through_the_card_leave_shared_memory_out(dgx: Machine) -> None:
    assert choose(dgx, local_copies="cnic").tls == ("rc", "cuda", "self")


def test_all_on_one_machine_needs_no_rdma_unless_it_is_asked_for(dgx: Machine) -> None:
    assert choose(dgx, same_machine=True) == Transports(("sysv", "cma", "tcp", "cuda", "self"), (), False, copied=True)
    assert choose(dgx, same_machine=True, fabric="rdma").rdma


def test_tcp_can_be_had_where_there_is_rdma(dgx: Machine) -> None:
    assert choose(dgx, fabric="tcp").tls == ("sysv", "cma", "tcp", "cuda", "self")


def test_what_is_set_wins(dgx: Machine) -> None:
    assert choose(dgx, tls="tcp,self", net_devices="eth0") == Transports(("tcp", "self"), ("eth0",), False)
    assert choose(dgx, environ={"UCX_TLS": "rc,self", "UCX_NET_DEVICES": "mlx5_5:1"}) == Transports(("rc", "self"), ("mlx5_5:1",), True)
    assert choose(dgx, tls="tcp", environ={"UCX_TLS": "rc"}).tls == ("tcp",)


def test_card_of_a_machine_with_one_port_carries_kv_too(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.roce("mlx5_0", "pci0000:40/0000:40:03.1/0000:43:00.0", 0, "eth0")
    assert choose(read_machine(tree.root)).ports == ("mlx5_0:1",)


def test_an_efa_device_is_no_reason_to_choose_rdma(tmp_path: Path) -> None:
    tree = SysfsTree(tmp_path / "sys")
    tree.infiniband("rdmap0s6", "pci0000:00/0000:00:06.0", 0)
    (tree.root / "class/infiniband/rdmap0s6/ports/1/link_layer").write_text("Unspecified\n", encoding="ascii")
    assert choose(read_machine(tree.root)).tls == ("sysv", "cma", "tcp", "self")


@pytest.mark.parametrize("tls", ["rc,tcp,self", "tcp", "all"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_rdma_and_a_way_around_it_contradict_each_other(dgx: Machine, tls: str, by_environment: bool) -> None:
    fields, environ = ({}, {"UCX_TLS": tls}) if by_environment else ({"tls": tls}, {})
    with pytest.raises(ConfigError, match=r"transfer.fabric is rdma, but UCX may only use .*" + tls):
        choose(dgx, fabric="rdma", environ=environ, **fields)
