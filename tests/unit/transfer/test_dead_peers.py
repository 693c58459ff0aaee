"""Peers that are killed, and come back under another name."""

from __future__ import annotations

import base64
import pickle
import signal
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dualpath_ray.errors import TransferError
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.messages import LayerLanded, StreamReady
from tests.unit.transfer.site import WAIT_S, Site, sites

BLOCKS, BLOCK_BYTES = 256, 16 << 10
SCATTERED = np.random.default_rng(0).permutation(BLOCKS).tolist()  # NIXL makes one block of neighbours


class Peer:
    """A child process with a memory as large as ours."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.unit.transfer.peer", "peer", str(BLOCKS), str(BLOCK_BYTES)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.info: PeerInfo = pickle.loads(base64.b64decode(self.line()))

    def line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer has ended"
        return line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(WAIT_S)


@contextmanager
def peers(count: int) -> Iterator[list[Peer]]:
    made: list[Peer] = []
    try:
        for _ in range(count):
            made.append(Peer())
        yield made
    finally:
        for peer in made:
            peer.process.kill()
            peer.process.communicate()


def assert_all_arrives(site: Site, peer: Peer, value: int) -> None:
    site.memory[:] = value
    assert site.push(peer.info.agent, SCATTERED, SCATTERED, message=LayerLanded(1, value)).result(WAIT_S) is None
    assert int(peer.line()) == zlib.crc32(site.memory)


@pytest.mark.parametrize("copy_threads", [0, 1])
def test_pushes_to_a_killed_peer_fail_and_its_next_incarnation_works(copy_threads: int) -> None:
    settings = {"max_post_bytes": 256 << 10, "push_timeout_s": 3.0, "copy_threads": copy_threads}
    with sites("a", blocks=BLOCKS, block_bytes=BLOCK_BYTES, **settings) as (a,), peers(2) as (old, new):
        a.endpoint.connect(old.info)
        assert_all_arrives(a, old, 1)
        under_way = [a.push(old.info.agent, SCATTERED, SCATTERED, lease=4) for _ in range(20)]
        old.kill()
        for push in under_way:
            error = push.result(WAIT_S)
            assert error is None or isinstance(error, TransferError)
        assert isinstance(a.push(old.info.agent, SCATTERED, SCATTERED).result(WAIT_S), TransferError)
        a.endpoint.send(old.info.agent, StreamReady(1))
        a.endpoint.finish_writes(old.info.agent, 4)
        a.endpoint.connect(new.info)
        assert_all_arrives(a, new, 2)
        a.endpoint.forget(old.info.agent)
        assert_all_arrives(a, new, 3)
        assert a.endpoint._pushes.empty and not a.endpoint._lease_pushes
        assert {agent for agent, _ in a.endpoint._lanes.first._remote} == {new.info.agent}


def test_a_peer_known_to_be_dead_stays_so() -> None:
    """Late work still names it: to connect again would only leave NIXL with an agent that nobody removes."""
    with sites("a", "b") as (a, b):
        assert a.push(b.name, [0], [0]).result(WAIT_S) is None
        a.endpoint.forget(b.name)
        assert a.endpoint.is_dead(b.name) and not b.endpoint.is_dead(a.name)
        a.endpoint.connect(b.endpoint.info)
        assert isinstance(a.push(b.name, [0], [0]).result(WAIT_S), TransferError)
        assert not a.endpoint._lanes.first._peers and not a.endpoint._lanes.first._remote


def test_a_peer_may_be_forgotten_while_pushes_to_it_are_under_way() -> None:
    with sites("a", "b", "c", max_post_bytes=256) as (a, b, c):
        a.memory[:] = np.random.default_rng(1).integers(0, 256, a.memory.shape)
        pushes = [a.push(b.name, range(64), range(64)) for _ in range(10)]
        a.endpoint.forget(b.name)
        others = [a.push(c.name, range(64), range(64)) for _ in range(2)]
        for push in pushes:
            error = push.result(WAIT_S)
            assert error is None or isinstance(error, TransferError)
        assert [push.result(WAIT_S) for push in others] == [None, None]
        np.testing.assert_array_equal(c.memory, a.memory)
