"""Discovery on real (software) devices, against what the verbs library says of them."""

from __future__ import annotations

from dualpath_ray.rdma import verbs
from dualpath_ray.rdma.pairing import plan_nics
from dualpath_ray.rdma.readiness import MemoryLimit, rdma_problems
from dualpath_ray.rdma.sysfs import read_machine


def test_both_devices_are_found_as_the_kernel_and_verbs_see_them() -> None:
    machine = read_machine()
    library = verbs.load()
    assert [device.name for device in machine.devices] == sorted(each.name.decode() for each in library.get_device_list())
    for number, device in enumerate(machine.devices):
        (port,) = device.ports
        assert port.active and port.link_layer == "Ethernet" and port.netdev == f"v{number}"
        assert port.gid is not None and port.gid.kind == "RoCE v2" and port.gid.value.endswith(f"ffff:0a09:000{number + 1}")
        with library.Context(name=device.name) as context:
            seen = context.query_port(1)
            assert str(context.query_gid(1, port.gid.index)) == port.gid.value
        assert seen.state == library.flags("IBV_PORT_ACTIVE")
        assert port.mtu == 128 << seen.active_mtu


def test_nothing_keeps_this_process_from_using_them() -> None:
    machine = read_machine()
    assert rdma_problems(machine, ["rxe0:1", "rxe1:1"], 1 << 30, MemoryLimit.of_this_process()) == []
    assert plan_nics(machine).storage == machine.port("rxe0")
