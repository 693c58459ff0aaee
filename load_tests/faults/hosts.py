"""The testbed's hosts as the head sees them: nodes, links and the storage server, to break and to repair.

Namespaces separate networks, not processes, so a process on the head can reach all of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_tests.testbed.network import Network
from load_tests.testbed.ray_nodes import RayNodes
from load_tests.testbed.spec import TestbedSpec
from load_tests.testbed.storage_server import StorageServer

BUCKET = "kvcache"  # where the system under test stores its blocks
SLOW = 10  # a slow link has this part of its rate


@dataclass(slots=True)
class Hosts:
    """Made on the head for the testbed of process `owner`, whose files lie in `folder`."""

    spec: TestbedSpec
    network: Network
    ray: RayNodes
    storage: StorageServer
    mode_file: Path

    @classmethod
    def of(cls, spec: dict[str, Any], owner: int, folder: str, env: dict[str, str]) -> Hosts:
        made = TestbedSpec(**spec)
        network = Network(made, owner)
        path = Path(folder)
        return cls(made, network, RayNodes(network, path, env), StorageServer(network, path / "s3"), path / "store-mode")

    def pids(self, host: str) -> list[int]:
        return self.network.pids(host)

    def kill(self, host: str) -> None:
        self.network.kill(host)

    def start_node(self, host: str) -> None:
        self.ray.start_worker(host)

    def cut(self, link: str) -> None:
        self.network.cut(*_ends(link))

    def heal(self, link: str) -> None:
        self.network.heal(*_ends(link))

    def slow(self, link: str) -> None:
        host, nic = _ends(link)
        self.network.shape(host, nic, self.spec.rate(host, nic) // SLOW)

    def full_speed(self, link: str) -> None:
        host, nic = _ends(link)
        self.network.shape(host, nic, self.spec.rate(host, nic))

    def store_mode(self, mode: str) -> None:
        """See store_proxy."""
        scratch = self.mode_file.with_suffix(".new")
        scratch.write_text(mode)
        scratch.rename(self.mode_file)

    def kill_store(self) -> None:
        for pid in self.storage.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start_store(self) -> None:
        """Returns when a PUT works again, which takes the server seconds."""
        self.storage.start([BUCKET])


def _ends(link: str) -> tuple[str, Any]:
    host, _, nic = link.partition("-")
    return host, nic
