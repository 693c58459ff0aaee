"""UCX's own tables, as version 1.23 prints them."""

from __future__ import annotations

from dualpath_ray.doctor.protocols import Protocol, read_protocols, writes_to_peers

LOG = """\
[1795502002.769472] [vm:9892 :0]   +--------+-------------+-----------------------------------+
[1795502002.769472] [vm:9892 :0]   | near self cfg#0                                          |
[1795502002.769472] [vm:9892 :0]   | remote memory write by ucp_put* from host memory to host |
[1795502002.769472] [vm:9892 :0]   +--------+-------------+-----------------------------------+
[1795502002.769472] [vm:9892 :0]   | Range  | Description |              Config               |
[1795502002.769472] [vm:9892 :0]   +--------+-------------+-----------------------------------+
[1795502002.769472] [vm:9892 :0]   | 0..inf | zero-copy   | self/memory                       |
[1795502002.769472] [vm:9892 :0]   +--------+-------------+-----------------------------------+
[1795502002.8] [vm:9892 :0]   | near inter-node cfg#1                                    |
[1795502002.8] [vm:9892 :0]   | active message by ucp_am_send* from host memory          |
[1795502002.8] [vm:9892 :0]   | Range  | Description |              Config               |
[1795502002.8] [vm:9892 :0]   | 0..inf | short       | tcp/eth0                          |
[1795502002.8] [vm:9892 :0]   | near inter-node cfg#1                                    |
[1795502002.8] [vm:9892 :0]   | remote memory write by ucp_put* from host memory to host |
[1795502002.8] [vm:9892 :0]   | Range  | Description |              Config               |
[1795502002.8] [vm:9892 :0]   | 0..2K  | short       | rc_mlx5/mlx5_0:1/path0            |
[1795502002.8] [vm:9892 :0]   | 2K..inf| zero-copy   | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
"""


def test_the_largest_range_tells_how_kv_is_pushed() -> None:
    assert writes_to_peers(LOG) == "50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1"
    assert read_protocols(LOG)[0] == Protocol("self", "remote memory write by ucp_put* from host memory to host", "self/memory")
    assert read_protocols(LOG)[1].config == "tcp/eth0"


def test_nothing_pushed_is_nothing_known() -> None:
    assert writes_to_peers("") is None
    assert writes_to_peers("\n".join(LOG.splitlines()[:8])) is None
