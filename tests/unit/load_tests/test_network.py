"""The network itself, in namespaces; skipped where those are not allowed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from load_tests.testbed.counters import NicCounters
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import PREFIX, Network, _namespaces, sweep, unavailable
from load_tests.testbed.spec import Nic, TestbedSpec
from load_tests.testbed.storage_server import StorageServer, weed
from load_tests.testbed.traffic import MODEL_TOS

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

SERVE = "import socket; s = socket.create_server(('0.0.0.0', 7000)); c, _ = s.accept(); [None for _ in iter(lambda: c.recv(65536), b'')]"
SEND = """
import socket, sys, time
for _ in range(100):
    try: s = socket.create_connection((sys.argv[1], 7000), 5); break
    except OSError: time.sleep(0.05)
s.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, int(sys.argv[3]))
s.sendall(bytes(int(sys.argv[2])))
s.shutdown(socket.SHUT_WR); s.recv(1)
"""


def own_namespaces() -> list[str]:
    return [name for name in _namespaces() if name.startswith(f"{PREFIX}{os.getpid()}-")]


def send(network: Network, source: str, target: str, nic: Nic, nbytes: int, tos: int = 0) -> None:
    server = network.popen(target, [sys.executable, "-c", SERVE])
    client = network.popen(source, [sys.executable, "-c", SEND, network.spec.address(target, nic), str(nbytes), str(tos)])
    assert client.wait(60) == 0
    assert server.wait(60) == 0


def test_bytes_cross_the_nic_they_should_and_nothing_is_left() -> None:
    spec = TestbedSpec(snic_bits=400_000_000, cnic_bits=0)
    with Network(spec) as network, NicCounters(network, 0.05) as counters:
        before = counters_now(counters)
        send(network, "store", "p0", "snic", 2_000_000)
        send(network, "p0", "d0", "cnic", 3_000_000)
        after = counters_now(counters)
        received = {name: after[name][0] - before[name][0] for name in after}
        assert 2_000_000 <= received["p0-snic"] < 2_300_000
        assert 3_000_000 <= received["d0-cnic"] < 3_300_000
        assert received["d0-snic"] < 10_000
    assert own_namespaces() == []


def counters_now(counters: NicCounters) -> dict[str, tuple[int, int]]:
    """Totals of a sample taken after this call."""
    seen = len(counters.samples)
    end = time.monotonic() + 10
    while len(counters.samples) < seen + 2 and time.monotonic() < end:
        time.sleep(0.01)
    return counters.samples[-1].totals


def test_links_are_shaped_in_both_directions() -> None:
    with Network(TestbedSpec(snic_bits=80_000_000)) as network:
        for namespace, device in (("p0", "snic"), ("sw", "p0-snic")):
            shown = subprocess.run(
                ["tc", "-n", network.namespace(namespace), "qdisc", "show", "dev", device], capture_output=True, text=True
            )
            assert "tbf" in shown.stdout and "rate 80Mbit" in shown.stdout
        network.shape("p0", "snic", 0)
        shown = subprocess.run(["tc", "-n", network.namespace("p0"), "qdisc", "show", "dev", "snic"], capture_output=True, text=True)
        assert "tbf" not in shown.stdout


def test_model_traffic_and_kv_have_classes_of_their_own_at_both_ends() -> None:
    with Network(TestbedSpec(cnic_bits=400_000_000, traffic_classes=True)) as network:
        send(network, "p0", "d0", "cnic", 2_000_000, MODEL_TOS)
        send(network, "p0", "d0", "cnic", 1_000_000)
        for namespace, device in (("p0", "cnic"), ("sw", "d0-cnic")):
            command = ["tc", "-n", network.namespace(namespace), "-s", "class", "show", "dev", device]
            sent = dict(re.findall(r"class htb (\S+) [^\n]*\n Sent (\d+) bytes", subprocess.check_output(command, text=True)))
            assert 2_000_000 <= int(sent["1:10"]) < 2_200_000
            assert 1_000_000 <= int(sent["1:20"]) < 1_200_000
        network.shape("p0", "cnic", 400_000_000, classes=False)
        shown = subprocess.check_output(["tc", "-n", network.namespace("p0"), "qdisc", "show", "dev", "cnic"], text=True)
        assert "tbf" in shown and "htb" not in shown


def test_processes_of_a_host_end_with_it() -> None:
    network = Network(TestbedSpec())
    with pytest.raises(RuntimeError, match="on purpose"), network:
        process = network.popen("p0", ["sleep", "600"])
        while not network.pids("p0"):
            time.sleep(0.01)
        raise RuntimeError("on purpose")
    assert process.wait(10) != 0
    assert own_namespaces() == []


HOLD = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it, and their children too
from load_tests.testbed.network import Network
from load_tests.testbed.spec import Nic, TestbedSpec
with Network(TestbedSpec()) as network:
    network.popen("d0", ["sleep", "600"])
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_owner_leaves_nothing_and_a_killed_one_is_swept(number: signal.Signals) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert owner.stdout is not None and owner.stdout.readline() == b"ready\n"
    made = [name for name in _namespaces() if name.startswith(f"{PREFIX}{owner.pid}-")]
    assert len(made) == 5
    owner.send_signal(number)
    owner.wait(30)
    owner.stdout.close()
    if number == signal.SIGKILL:
        assert owner.pid in sweep()
    assert not set(made) & set(_namespaces())


def test_two_storage_servers_do_not_meet(tmp_path: Path) -> None:
    """Each in a network of its own, with the same address: a bucket of one is not the other's, and no socket is left in /tmp."""
    try:
        weed()
    except TestbedError as error:
        pytest.skip(str(error))
    before = set(Path("/tmp").glob("seaweedfs-*"))
    with Network(TestbedSpec()) as network:
        first = StorageServer(network, tmp_path / "first")
        first.start(["mine"])
        owner = subprocess.run([sys.executable, "-c", SECOND_SERVER, str(tmp_path / "second")], capture_output=True, text=True, timeout=200)
        assert owner.returncode == 0, owner.stderr
        assert owner.stdout.split() == ["theirs", "200", "mine", "404"]
        first.make_bucket("still-there")
    assert set(Path("/tmp").glob("seaweedfs-*")) <= before


SECOND_SERVER = """
import sys
from pathlib import Path
from load_tests.testbed.network import Network
from load_tests.testbed.spec import Nic, TestbedSpec
from load_tests.testbed.storage_server import StorageServer
ASK = '''
import sys, urllib.error, urllib.request
for bucket in ("theirs", "mine"):
    try: print(bucket, urllib.request.urlopen(f"{sys.argv[1]}/{bucket}/probe", timeout=9).status)
    except urllib.error.HTTPError as error: print(bucket, error.code)
'''
with Network(TestbedSpec()) as network:
    server = StorageServer(network, Path(sys.argv[1]))
    server.start(["theirs"])
    network.popen("store", [sys.executable, "-c", ASK, server.endpoint]).wait(30)
"""
