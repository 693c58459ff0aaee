"""Endpoints whose pushes travel in two classes: what is pushed, and on whose connections."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import numpy as np
import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.traffic.classes import Marking, TrafficClass
from dualpath_ray.traffic.sockets import own_sockets
from dualpath_ray.transfer.messages import LayerLanded, WriterDone
from dualpath_ray.transfer.push import PRIORITY_LAYERS, PRIORITY_PERSIST
from tests.unit.transfer.site import WAIT_S, Site, sites

READ, WRITE = Marking(2, 18), Marking(2, 10)
CLASSES = {TrafficClass.KV_READ: READ, TrafficClass.KV_WRITE: WRITE}


@pytest.fixture(autouse=True)
def over_tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")


def dscp_of_connections() -> set[int]:
    found = set()
    for each in own_sockets():
        if each.remote is not None:
            with socket.socket(fileno=socket.dup(each.fd)) as opened:
                found.add(opened.getsockopt(socket.IPPROTO_IP, socket.IP_TOS) >> 2)
    return found


@pytest.fixture
def pair() -> Iterator[tuple[Site, Site]]:
    with sites("a", "b", traffic=CLASSES) as (a, b):
        b.listen(LayerLanded, WriterDone)
        yield a, b


def test_both_classes_deliver_and_speak_in_one_name(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.memory[:] = np.random.default_rng(1).integers(0, 256, a.memory.shape)
    layers = a.push(b.name, range(32), range(32), message=LayerLanded(7, 1), priority=PRIORITY_LAYERS)
    assert layers.result(WAIT_S) is None
    assert b.next()[:2] == (a.name, LayerLanded(7, 1))
    blocks = a.push(b.name, range(32, 64), range(32, 64), lease=5, priority=PRIORITY_PERSIST)
    a.endpoint.finish_writes(b.name, 5)
    assert blocks.result(WAIT_S) is None
    sender, message, seen = b.next()
    assert (sender, message) == (a.name, WriterDone(5, None))
    np.testing.assert_array_equal(seen, a.memory)


def test_each_class_has_connections_of_its_own(pair: tuple[Site, Site]) -> None:
    a, b = pair
    assert a.push(b.name, [0], [0]).result(WAIT_S) is None
    assert {READ.dscp, WRITE.dscp} <= dscp_of_connections()


def test_classes_that_look_the_same_share_one_agent() -> None:
    with sites("a", "b", traffic={TrafficClass.KV_READ: READ, TrafficClass.KV_WRITE: READ}) as (a, b):
        assert a.push(b.name, [0], [0], priority=PRIORITY_PERSIST).result(WAIT_S) is None
        assert len(set(a.endpoint._lanes._by_class.values())) == 1
        assert dscp_of_connections() <= {0, READ.dscp}
        assert READ.dscp in dscp_of_connections()


def test_nothing_is_marked_unless_it_was_asked_for() -> None:
    with sites("a", "b") as (a, b):
        assert a.push(b.name, [0], [0], priority=PRIORITY_PERSIST).result(WAIT_S) is None
        assert dscp_of_connections() == {0}


def test_a_dead_peer_is_forgotten_in_every_class(pair: tuple[Site, Site]) -> None:
    a, b = pair
    a.endpoint.forget(b.name)
    a.settled()
    for priority in (PRIORITY_LAYERS, PRIORITY_PERSIST):
        assert a.push(b.name, [0], [0], priority=priority).result(WAIT_S) is not None


def test_an_endpoint_that_must_use_rdma_refuses_to_start_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine may have RDMA; the port named here it has not."""
    with pytest.raises(ConfigError, match=r"RDMA cannot be used: .*(no RDMA device|no RDMA port)"):
        Site("a", rdma_ports=("nothing0:1",))


def test_ucx_that_took_tcp_instead_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything looks well before, and yet UCX comes up without an RDMA device: here because of UCX_TLS=tcp."""
    monkeypatch.setattr("dualpath_ray.transfer.endpoint.rdma_problems", lambda *arguments: [])
    with pytest.raises(ConfigError, match="UCX has opened no RDMA device"):
        Site("a", rdma_ports=())
