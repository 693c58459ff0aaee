"""A testbed: network, storage service, Ray nodes and NIC counters, set up and taken down together."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from load_tests.testbed.counters import NicCounters
from load_tests.testbed.errors import TestbedError
from load_tests.testbed.interruptible import interruptible
from load_tests.testbed.network import Network
from load_tests.testbed.ray_nodes import RayNodes
from load_tests.testbed.spec import HEAD, TestbedSpec
from load_tests.testbed.storage_server import StorageServer

# Connections end within seconds of a peer's death, and large segments halve the CPU per byte.
UCX = {
    "TCP_TX_SEG_SIZE": "256K",
    "TCP_RX_SEG_SIZE": "256K",
    "TCP_USER_TIMEOUT": "10s",
    "TCP_KEEPIDLE": "5s",
    "TCP_KEEPINTVL": "2s",
    "TCP_KEEPCNT": "5",
}


class Testbed:
    """Made by `open_testbed`."""

    __test__ = False

    def __init__(
        self, spec: TestbedSpec, network: Network, storage: StorageServer, ray: RayNodes, counters: NicCounters, folder: Path
    ) -> None:
        self.spec, self.network, self.storage, self.ray, self.counters, self.folder = spec, network, storage, ray, counters, folder

    def overrides(self, bucket: str, shape: TestbedSpec | None = None) -> list[str]:
        """Settings of a cluster on these hosts, or on those of `shape`: one node per host, KV over the CNICs, blocks over the SNICs."""
        shape = shape or self.spec
        ucx = ", ".join(f"{name}: {value}" for name, value in UCX.items())
        return [
            f"cluster.prefill_nodes={shape.prefill_hosts}",
            f"cluster.decode_nodes={shape.decode_hosts}",
            "cluster.placement=spread",
            f"cluster.address={self.ray.address}",
            f"cluster.prefill_labels={{dp.host: 'in({','.join(shape.prefill)})'}}",
            f"cluster.decode_labels={{dp.host: 'in({','.join(shape.decode)})'}}",
            "transfer.tls=tcp",
            "transfer.net_devices=cnic",
            f"transfer.ucx={{{ucx}}}",
            "storage.kind=s3",
            f"storage.s3={{bucket: {bucket}, endpoint: '{self.storage.endpoint}', anonymous: true}}",
        ]

    def run(self, arguments: Sequence[str], log: Path, timeout_s: float, env: Mapping[str, str] | None = None) -> None:
        """Run a Python process on the head and wait for it. Raises TestbedError with the end of its log when it fails."""
        with log.open("ab") as file:
            process = self.network.popen(HEAD, [sys.executable, *arguments], env={**self.ray.env, **(env or {})}, stdout=file, stderr=file)
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code = -1
            finally:
                if process.poll() is None:
                    process.kill()
        if code:
            what = f"did not end within {timeout_s:.0f} s" if code == -1 else f"failed with code {code}"
            raise TestbedError(f"{' '.join(arguments)} {what}: {log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def open_testbed(
    spec: TestbedSpec, buckets: Sequence[str] = (), scratch: Path | None = None, ray_env: Mapping[str, str] | None = None
) -> Iterator[Testbed]:
    """A running testbed; `ray_env` are variables for Ray's processes.

    Leaves no namespace, process or file behind, also when it is interrupted. Raises TestbedError."""
    folder = Path(tempfile.mkdtemp(prefix="dpt", dir=scratch))  # short: it holds the paths of Unix sockets
    try:
        with interruptible(), Network(spec) as network:
            storage = StorageServer(network, folder / "s3")
            (folder / "s3").mkdir()
            storage.start(list(buckets) or ["kvcache"])
            ray = RayNodes(network, folder, ray_env)
            ray.start()
            with NicCounters(network) as counters:
                yield Testbed(spec, network, storage, ray, counters, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["Testbed", "TestbedError", "open_testbed"]
