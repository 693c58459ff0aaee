"""NIXL endpoints of two processes over soft-RoCE: bytes, classes on the wire, and refusals."""

from __future__ import annotations

import base64
import ctypes
import pickle
import resource
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.traffic.classes import Marking, TrafficClass
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.messages import LayerLanded
from dualpath_ray.transfer.push import PRIORITY_LAYERS, PRIORITY_PERSIST
from tests.rdma.guest.wire import DATA, Capture
from tests.unit.transfer.site import Site

BLOCKS, BLOCK_BYTES, WAIT_S = 16, 4096, 120.0
CLASSES = {TrafficClass.KV_READ: Marking(2, 18), TrafficClass.KV_WRITE: Marking(2, 10)}
UD_SENDS = range(0x64, 0x66)
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14


@contextmanager
def peer(transport: str) -> Iterator[tuple[PeerInfo, subprocess.Popen[str]]]:
    """A process on the second device. It prints the CRC-32 of its memory for each LayerLanded."""
    command = [sys.executable, "-m", "tests.unit.transfer.peer", "peer", str(BLOCKS), str(BLOCK_BYTES)]
    environment = {"UCX_TLS": transport, "UCX_NET_DEVICES": "rxe1:1"}
    process = subprocess.Popen(
        ["/usr/bin/env", *(f"{name}={value}" for name, value in environment.items()), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdin
    try:
        yield pickle.loads(base64.b64decode(process.stdout.readline())), process
        process.stdin.close()
        assert process.wait(WAIT_S) == 0  # nor did it crash at exit
    finally:
        process.kill()


@pytest.mark.parametrize("transport", ["rc", "ud"])
def test_pushes_arrive_each_in_its_class(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_TLS", transport)
    monkeypatch.setenv("UCX_NET_DEVICES", "rxe0:1")
    with peer(transport) as (info, process), Capture("v0") as capture:
        site = Site("us", BLOCKS, BLOCK_BYTES, traffic=CLASSES, rdma_ports=("rxe0:1",), push_timeout_s=WAIT_S)
        site.memory[:] = np.random.default_rng(1).integers(0, 256, site.memory.shape)
        expected = np.zeros_like(site.memory)
        site.endpoint.connect(info)
        for blocks, priority in ((range(8), PRIORITY_LAYERS), (range(8, 16), PRIORITY_PERSIST)):
            expected[list(blocks)] = site.memory[list(blocks)]
            push = site.push(info.agent, blocks, blocks, message=LayerLanded(1, 1), priority=priority)
            assert push.result(WAIT_S) is None
            assert process.stdout and int(process.stdout.readline()) == zlib.crc32(expected)
        site.endpoint.close()
    sent = capture.dscps("10.9.0.1", DATA if transport == "rc" else UD_SENDS)
    print(transport, dict(sent))
    assert set(sent) == {18, 10}
    if transport == "rc":  # 32 KiB in packets of 4 KiB at most
        assert sent[18] >= 8 and sent[10] >= 8


def test_a_port_that_is_down_is_refused_by_name() -> None:
    subprocess.run("ip link add d0 type dummy; rdma link add rxe2 type rxe netdev d0", shell=True, check=True)
    try:
        with pytest.raises(ConfigError, match=r"rxe2:1 is DOWN.*bring its network interface up"):
            Site("us", rdma_ports=("rxe2:1",))
    finally:
        subprocess.run("rdma link del rxe2; ip link del d0", shell=True, check=True)


def test_too_little_lockable_memory_is_refused_with_the_remedy() -> None:
    """As a process without CAP_IPC_LOCK under a common limit."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))
        ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_IPC_LOCK, 0, 0, 0)

    code = "from tests.unit.transfer.site import Site; Site('us', 64, 65536, rdma_ports=('rxe0:1',))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode
    assert "4 MiB must be locked for RDMA, the limit is 64 KiB (ulimit -l): raise it to unlimited" in done.stderr
