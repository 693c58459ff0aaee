"""Ray's own autoscaler over machines that it starts and stops: each is a raylet on this one (Ray's fake multi-node provider).

Ray's helper for this is not usable from its wheel: it needs a file that the wheel lacks, and ends every Ray on the machine when it stops.
Run it in a network and process namespace of its own (`unshare --net --pid`), so that ports are free and nothing outlives it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

HOST, PORT = "127.0.0.1", 6391
STORE_BYTES = 80 << 20
HEAD_TYPE = "ray.head.default"  # the name that the fake provider gives the head, whatever the configuration says
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


class FakeMachines:
    """A Ray cluster with a head, and up to `most` machines of each role that come when they are wanted."""

    def __init__(self, directory: Path, most: int, idle_s: float) -> None:
        self.address = f"{HOST}:{PORT}"
        self._directory = directory
        self._config = directory / "cluster.json"
        self._config.write_text(json.dumps(self._describe(most, idle_s)))
        self._head: subprocess.Popen[bytes] | None = None

    def _describe(self, most: int, idle_s: float) -> dict[str, Any]:
        types: dict[str, Any] = {HEAD_TYPE: {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0}}
        for role in ("prefill", "decode"):
            resources = {"CPU": 4, f"dp_{role}": 1, "object_store_memory": STORE_BYTES}
            types[role] = {"resources": resources, "labels": {"dp.role": role}, "node_config": {}, "min_workers": 0, "max_workers": most}
        provider = {"type": "external", "module": PROVIDER, "use_node_id_as_ip": True, "launch_multiple": True}
        provider |= {"disable_node_updaters": True, "disable_launch_config_check": True}
        provider |= {"gcs_address": self.address, "head_node_id": FAKE_HEAD_NODE_ID}
        empty = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands")
        empty += ("worker_start_ray_commands", "cluster_synced_files", "rsync_exclude", "rsync_filter")
        return {
            "cluster_name": "fake",
            "max_workers": 2 * most,
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": idle_s / 60,
            "provider": provider,
            "available_node_types": types,
            "head_node_type": HEAD_TYPE,
            "auth": {},
            "docker": {},
            "file_mounts": {},
            "file_mounts_sync_continuously": False,
            **{name: [] for name in empty},
        }

    def start(self, timeout_s: float = 90.0) -> None:
        """Start the head and connect this process to it."""
        environment = os.environ | {
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        }
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={PORT}", f"--node-ip-address={HOST}"]
        command += [f"--autoscaling-config={self._config}", "--num-cpus=4", f"--object-store-memory={STORE_BYTES}"]
        command += ["--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={self._directory}"]
        with (self._directory / "head.log").open("w") as log:
            self._head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                ray.init(self.address, namespace="dualpath", log_to_driver=False, logging_level="ERROR")
                return
            except Exception:  # Ray's own kinds differ while a head comes up
                ray.shutdown()
                if time.monotonic() > deadline or self._head.poll() is not None:
                    raise
                time.sleep(0.5)

    def roles(self) -> dict[str, int]:
        """Machines that are there, by role."""
        nodes: Any = ray.nodes  # untyped
        labels = [node["Labels"].get("dp.role", "head") for node in nodes() if node["Alive"]]
        return {role: labels.count(role) for role in ("prefill", "decode")}
