"""What a testbed looks like: how many hosts, and how fast their links are."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

Nic = Literal["snic", "cnic", "ctl"]
NICS: tuple[Nic, ...] = ("snic", "cnic", "ctl")
SUBNETS: dict[Nic, str] = {"snic": "10.91.1", "cnic": "10.91.2", "ctl": "10.91.3"}
HEAD, STORAGE = "head", "store"


@dataclass(frozen=True, slots=True)
class TestbedSpec:
    """P prefill and D decode hosts, a head (scheduler and client) and a storage host. Rates are bit/s per direction and host; 0: unshaped.

    Each P or D host has a storage NIC (`snic`), a compute NIC (`cnic`) and an unshaped control NIC (`ctl`) for Ray's own traffic.
    `nice` is the priority of all processes on the hosts (negative: before other work on the machine).
    `traffic_classes` divides the compute NICs into a class for model traffic and one for KV (testbed/traffic.py).
    The storage host is reached over the storage network only, so that what crosses an SNIC is storage traffic and nothing else.
    """

    __test__ = False  # the name starts with Test, but it is no test class

    prefill_hosts: int = 1
    decode_hosts: int = 1
    snic_bits: int = 100_000_000
    cnic_bits: int = 1_000_000_000
    mtu: int = 9000
    nice: int = 0
    traffic_classes: bool = False

    @property
    def prefill(self) -> tuple[str, ...]:
        return tuple(f"p{i}" for i in range(self.prefill_hosts))

    @property
    def decode(self) -> tuple[str, ...]:
        return tuple(f"d{i}" for i in range(self.decode_hosts))

    @property
    def workers(self) -> tuple[str, ...]:
        return self.prefill + self.decode

    @property
    def hosts(self) -> tuple[str, ...]:
        return (HEAD, STORAGE, *self.workers)

    def nics(self, host: str) -> tuple[Nic, ...]:
        return {HEAD: ("ctl",), STORAGE: ("snic",)}.get(host, NICS)  # type: ignore[return-value]

    def address(self, host: str, nic: Nic) -> str:
        return f"{SUBNETS[nic]}.{self.hosts.index(host) + 1}"

    def rate(self, host: str, nic: Nic) -> int:
        """Bit/s of a link in each direction; 0: unshaped."""
        if host not in self.workers:
            return 0
        return {"snic": self.snic_bits, "cnic": self.cnic_bits}.get(nic, 0)

    @property
    def name(self) -> str:
        """`1P2D` and the like."""
        return f"{self.prefill_hosts}P{self.decode_hosts}D"

    def role(self, host: str) -> str:
        return "prefill" if host in self.prefill else "decode" if host in self.decode else host

    def shape(self, name: str) -> TestbedSpec:
        """The part of these hosts that makes up `name`, e.g. 1P2D of 2P2D. Raises ValueError."""
        prefill, decode = parse_shape(name)
        if prefill > self.prefill_hosts or decode > self.decode_hosts:
            raise ValueError(f"{name} does not fit into {self.name}")
        return replace(self, prefill_hosts=prefill, decode_hosts=decode)


def parse_shape(name: str) -> tuple[int, int]:
    """`2P1D` -> (2, 1). Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)P([1-9]\d*)D", name)
    if match is None:
        raise ValueError(f"{name!r} is not of the form 1P2D")
    return int(match[1]), int(match[2])
