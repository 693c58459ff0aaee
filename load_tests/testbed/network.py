"""Hosts as network namespaces, joined by switches in a namespace of their own.

Everything lives in namespaces whose names begin with `dpt<pid of the owner>-`; deleting those removes every link with them, and a
testbed whose owner was killed is swept by the next one. Shaping is a token bucket at each sending end: the host's own device for what it
sends, the switch port for what it receives, so a host's link is full duplex like a real one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from load_tests.testbed.errors import TestbedError
from load_tests.testbed.spec import NICS, SUBNETS, TestbedSpec
from load_tests.testbed.traffic import BURST_BYTES, one_class, two_classes

PREFIX = "dpt"
SWITCH = "sw"


def unavailable() -> str | None:
    """Why there can be no testbed here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root; run as root, or use the emulated store (storage.emulation.read_bandwidth) on one host"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2"
    probe = f"{PREFIX}{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=False, capture_output=True)
    return None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise TestbedError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class Network:
    """A context manager: namespaces and links exist inside it, and nothing of them after it.

    With the `owner` of a testbed that exists, an object that is not entered works on that one.
    """

    def __init__(self, spec: TestbedSpec, owner: int | None = None) -> None:
        self.spec = spec
        self.owner = owner or os.getpid()

    def __enter__(self) -> Self:
        reason = unavailable()
        if reason is not None:
            raise TestbedError(reason)
        sweep()
        try:
            self._build()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        remove(self.owner)

    def namespace(self, host: str) -> str:
        return f"{PREFIX}{self.owner}-{host}"

    def port(self, host: str, nic: str) -> str:
        """The switch's end of a host's link."""
        return f"{host}-{nic}"

    def _build(self) -> None:
        switch = self.namespace(SWITCH)
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "set", "lo", "up")
        for nic in NICS:
            _run("ip", "-n", switch, "link", "add", f"br-{nic}", "mtu", str(self.spec.mtu), "type", "bridge")
            _run("ip", "-n", switch, "link", "set", f"br-{nic}", "up")
        for host in self.spec.hosts:
            namespace = self.namespace(host)
            _run("ip", "netns", "add", namespace)
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            for nic in self.spec.nics(host):
                self._link(host, nic)

    def _link(self, host: str, nic: Any) -> None:
        switch, namespace, port, mtu = self.namespace(SWITCH), self.namespace(host), self.port(host, nic), str(self.spec.mtu)
        _run("ip", "-n", switch, "link", "add", port, "mtu", mtu, "type", "veth", "peer", "name", nic, "mtu", mtu, "netns", namespace)
        _run("ip", "-n", switch, "link", "set", port, "master", f"br-{nic}", "up")
        _run("ip", "-n", namespace, "addr", "add", f"{self.spec.address(host, nic)}/24", "dev", nic)
        _run("ip", "-n", namespace, "link", "set", nic, "up")
        self.shape(host, nic, self.spec.rate(host, nic))

    def shape(self, host: str, nic: Any, bits_per_s: int, classes: bool | None = None, burst: int = BURST_BYTES) -> None:
        """Set a link's rate in both directions; 0 takes the limit away. `classes` (default: the spec's) divides a compute NIC.

        `burst` bytes may pass at once on a link that is not divided.
        """
        classes = nic == "cnic" and (self.spec.traffic_classes if classes is None else classes)
        for namespace, device in ((self.namespace(host), nic), (self.namespace(SWITCH), self.port(host, nic))):
            if classes or not bits_per_s:
                with contextlib.suppress(TestbedError):  # there was no limit
                    _run("tc", "-n", namespace, "qdisc", "del", "dev", device, "root")
            if bits_per_s:
                for command in two_classes(device, bits_per_s) if classes else one_class(device, bits_per_s, burst):
                    _run("tc", "-n", namespace, *command)

    def cut(self, host: str, nic: Any) -> None:
        """Take a link down, as when its cable is pulled."""
        _run("ip", "-n", self.namespace(SWITCH), "link", "set", self.port(host, nic), "down")

    def heal(self, host: str, nic: Any) -> None:
        _run("ip", "-n", self.namespace(SWITCH), "link", "set", self.port(host, nic), "up")

    def popen(self, host: str, command: Sequence[str], env: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process on a host, in a session of its own. It ends with the testbed."""
        environment = {**os.environ, **(env or {})}
        prefix = ["nice", "-n", str(self.spec.nice), "ip", "netns", "exec", self.namespace(host)]
        return subprocess.Popen([*prefix, *command], env=environment, start_new_session=True, **options)

    def pids(self, host: str) -> list[int]:
        return pids(self.namespace(host))

    def kill(self, host: str) -> None:
        """SIGKILL all processes of a host, as in a power cut."""
        _kill(self.namespace(host))

    def subnet(self, nic: Any) -> str:
        return SUBNETS[nic]


def pids(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(pid) for pid in done.stdout.split()]


def _kill(namespace: str) -> None:
    deadline = time.monotonic() + 10
    while (left := pids(namespace)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _namespaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.startswith(PREFIX)]


def _owner(namespace: str) -> int | None:
    number = namespace.removeprefix(PREFIX).partition("-")[0]
    return int(number) if number.isdigit() else None


def remove(owner: int) -> None:
    """End all processes in the namespaces of `owner`'s testbed and delete them."""
    own = [namespace for namespace in _namespaces() if _owner(namespace) == owner]
    for namespace in own:
        _kill(namespace)
    for namespace in own:
        subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)


def sweep() -> list[int]:
    """Remove testbeds whose owner has died without cleaning up. Returns those owners."""
    dead = {owner for owner in map(_owner, _namespaces()) if owner is not None and not os.path.exists(f"/proc/{owner}")}
    for owner in dead:
        remove(owner)
    return sorted(dead)
