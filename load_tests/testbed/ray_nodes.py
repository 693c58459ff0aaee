"""One real Ray node per host, each with its own address on the control network and labels for its name (dp.host) and role (dp.role)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import Network
from load_tests.testbed.spec import HEAD

PORT = 6399
START_TIMEOUT_S = 180.0
ATTEMPTS, AT_ONCE = 3, 3
OBJECT_STORE_BYTES = 80 << 20  # control messages only
ROOT = Path(__file__).resolve().parents[2]


class RayNodes:
    """Ray on the head and on all worker hosts of `network`, until the network goes."""

    def __init__(self, network: Network, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.address = f"{network.spec.address(HEAD, 'ctl')}:{PORT}"
        self._network, self._folder = network, folder
        self.env = {
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_DEDUP_LOGS": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "RAY_raylet_start_wait_time_s": "120",  # several nodes start at once on few cores
            "RAY_worker_niceness": str(network.spec.nice),  # Ray's default, 15, leaves the engines to whatever else runs here
            **(env or {}),
        }

    def start(self) -> None:
        """Start the head, then the others, a few at once; returns when all have joined."""
        self._wait({HEAD: self._start(HEAD, ["--head", "--port", str(PORT), "--include-dashboard=false"])})
        workers = self._network.spec.workers
        for first in range(0, len(workers), AT_ONCE):
            hosts = workers[first : first + AT_ONCE]
            self._wait({host: self._join(host) for host in hosts})

    def start_worker(self, host: str) -> None:
        """Start the Ray of a host whose processes have ended; returns when it has joined."""
        self._wait({host: self._join(host)})

    def _join(self, host: str) -> subprocess.Popen[bytes]:
        return self._start(host, ["--address", self.address])

    def _start(self, host: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [
            str(Path(sys.executable).with_name("ray")),
            "start",
            "--node-ip-address",
            self._network.spec.address(host, "ctl"),
            "--temp-dir",
            str(self._folder / host),
            "--num-cpus",
            "8",
            "--object-store-memory",
            str(OBJECT_STORE_BYTES),
            "--disable-usage-stats",
            "--labels",
            f"dp.host={host},dp.role={self._network.spec.role(host)}",
            *arguments,
        ]
        with (self._folder / f"{host}.log").open("wb") as log:
            return self._network.popen(host, command, env=self.env, stdout=log, stderr=log)

    def _wait(self, starting: Mapping[str, subprocess.Popen[bytes]], attempts: int = ATTEMPTS) -> None:
        for host, process in starting.items():
            try:
                code = process.wait(START_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                code = -1
            if code and host != HEAD and attempts > 1:  # Ray gives a node 30 s, however busy the machine is
                self._network.kill(host)
                self._wait({host: self._join(host)}, attempts - 1)
            elif code:
                tail = (self._folder / f"{host}.log").read_text(errors="replace")[-1500:]
                raise TestbedError(f"Ray did not start on host {host}: {tail}")
