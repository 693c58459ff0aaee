"""The autoscaler's own logic, against an emulated cluster; real machines come and go in tests/cluster/test_autoscaling.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest

from actors.autoscaler import Autoscaler
from actors.node import Node
from dualpath_ray.config import Settings
from dualpath_ray.errors import ConfigError
from policies.vocabulary import Role
from tests.unit.actors.test_role_load import picture

SETTINGS = {"autoscaling": {"enabled": True, "looks": 2, "most_prefill_nodes": 3, "most_decode_nodes": 2}, "decode": {"max_batch": 8}}


class EmulatedNode(Node):
    """A node whose machine is there when `machines` says so."""

    machines: ClassVar[set[str]] = set()

    def placed(self) -> bool:
        return self.node_id in self.machines


class EmulatedCluster:
    """Emulates `actors.cluster.Cluster`: nodes without processes, and a log of what was done with them."""

    def __init__(self, switchable: bool) -> None:
        self.settings = Settings.model_validate(SETTINGS)
        self.switchable = switchable
        self.done: list[str] = []
        self.nodes: dict[str, Node] = {}
        for role in ("prefill", "decode"):
            self.request_node(role).state = "serving"
        self.done.clear()

    def request_node(self, role: Role) -> Node:
        node = EmulatedNode(f"{role[0]}{sum(n.role == role for n in self.nodes.values())}", role, None, 0)  # type: ignore[arg-type]
        self.nodes[node.node_id] = node
        self.done.append(f"request {node.node_id}")
        return node

    def start_node(self, node: Node) -> None:
        self.done.append(f"start {node.node_id}")

    def stop_node(self, node: Node) -> None:
        if self.nodes.pop(node.node_id, None) is not None:
            self.done.append(f"stop {node.node_id}")

    def stop_engines(self, node: Node) -> None:
        self.done.append(f"stop engines of {node.node_id}")

    def start_engines(self, node: Node, role: Role) -> None:
        node.role = role
        self.done.append(f"start {role} engines of {node.node_id}")


class OnEmulated(Autoscaler):
    """Asks no actors: `status` is what it looks at, `busy` the nodes that still have requests."""

    def __init__(self, cluster: EmulatedCluster) -> None:
        super().__init__(cluster)  # type: ignore[arg-type]
        self.status: dict[str, Any] = {}
        self.busy: set[str] = set()
        self.asked: list[tuple[Any, ...]] = []

    def _ask(self, method: str, *arguments: Any) -> Any:
        self.asked.append((method, *arguments))
        if method == "status":
            return self.status
        return int(arguments[0] in self.busy) if method == "drain" else None

    def _idle(self, node: Node) -> bool:
        return node.node_id not in self.busy

    def see(self, **fields: Any) -> None:
        """Look as often as a decision needs, with a load of this kind."""
        for at in range(3):
            self.status = picture(float(at), **{name: value(at) if callable(value) else value for name, value in fields.items()})
            self.look()


@pytest.fixture
def cluster() -> EmulatedCluster:
    EmulatedNode.machines = set()
    return EmulatedCluster(switchable=False)


@pytest.fixture
def scaler(cluster: EmulatedCluster) -> Iterator[OnEmulated]:
    scaler = OnEmulated(cluster)
    yield scaler
    scaler._stopping.set()
    scaler._workers.shutdown(wait=True)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def grow_decode(scaler: OnEmulated) -> None:
    scaler.see(decoding=8, busy=lambda at: 0.6 * at)


def rest(scaler: OnEmulated) -> None:
    scaler.see(decoding=1, busy=lambda at: 0.6 * at)


def drain_while_busy(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    """d1 joins, has a request, is no longer needed and drains."""
    EmulatedNode.machines.add("d1")
    grow_decode(scaler)
    until(lambda: cluster.nodes["d1"].state == "serving")
    scaler.busy.add("d1")
    rest(scaler)
    until(lambda: ("drain", "d1") in scaler.asked)


def test_a_node_starts_when_its_machine_has_come(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    grow_decode(scaler)
    assert cluster.done == ["request d1"]
    grow_decode(scaler)
    assert cluster.done == ["request d1"], "a node that was asked for counts, and there may be no third"
    EmulatedNode.machines.add("d1")
    until(lambda: cluster.nodes["d1"].state == "serving")
    assert cluster.done == ["request d1", "start d1"]
    assert any(asked[0] == "note" and "2 nodes wanted, not 1" in asked[2] for asked in scaler.asked)


def test_a_machine_that_is_no_longer_wanted_is_not_waited_for(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    grow_decode(scaler)
    rest(scaler)
    until(lambda: "d1" not in cluster.nodes)
    assert cluster.done == ["request d1", "stop d1"]


def test_a_node_leaves_when_it_is_done(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    drain_while_busy(cluster, scaler)
    assert "stop d1" not in cluster.done, "it still has a request"
    scaler.busy.clear()
    until(lambda: "stop d1" in cluster.done)
    until(lambda: ("retire", ["d1"]) in scaler.asked)


def test_a_draining_node_that_is_wanted_again_stays(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    drain_while_busy(cluster, scaler)
    grow_decode(scaler)
    until(lambda: cluster.nodes["d1"].state == "serving")
    assert ("resume", "d1") in scaler.asked and cluster.done == ["request d1", "start d1"]


def test_a_node_is_switched_where_both_roles_ask_for_the_same() -> None:
    EmulatedNode.machines = {"p1"}
    cluster = EmulatedCluster(switchable=True)
    cluster.request_node("prefill").state = "serving"
    cluster.done.clear()
    scaler = OnEmulated(cluster)
    scaler.see(decoding=8)
    until(lambda: cluster.nodes["p1"].role == "decode" and cluster.nodes["p1"].state == "serving")
    assert cluster.done == ["stop engines of p1", "start decode engines of p1"]
    assert ("resume", "p1") in scaler.asked
    scaler._workers.shutdown(wait=True)


def test_a_switch_by_hand_is_refused_where_it_cannot_be(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    with pytest.raises(ConfigError, match="different resources or labels"):
        scaler.switch(cluster.nodes["p0"])


def test_the_last_node_of_a_role_stays(cluster: EmulatedCluster, scaler: OnEmulated) -> None:
    scaler.see()
    scaler.see()
    assert cluster.done == []
