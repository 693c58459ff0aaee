"""The doctor on a Ray cluster of two nodes (both on this machine): each node's checks, and pushes in both directions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(240)
def test_every_node_and_every_pair_is_checked(short_tmp: Path) -> None:
    """In a process of its own: Ray's test cluster and the tests' session cannot share one."""
    code = (
        "from ray.cluster_utils import Cluster\n"
        "import sys\n"
        "node = {'num_cpus': 2, 'object_store_memory': 80 << 20}\n"
        "cluster = Cluster(initialize_head=True, head_node_args=node | {'include_dashboard': False})\n"
        "cluster.add_node(**node)\n"
        "from dualpath_ray.cli import main\n"
        "try:\n"
        "    main(['doctor', '--json', '--set', f'cluster.address={cluster.address}', '--set', f'storage.path={sys.argv[1]}'])\n"
        "finally:\n"
        "    cluster.shutdown()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(short_tmp / "store")], capture_output=True, text=True, env=environment, timeout=220, check=False
    )  # fmt: skip
    document = json.loads(done.stdout[done.stdout.index("{") :])
    checks = document["checks"]
    assert done.returncode == 0 and document["ok"], checks
    assert sum(check["name"] == "ucx transport" and check["node"] != "" for check in checks) == 2
    assert sum(check["name"] == "clock offset" for check in checks) == 2
    pairs = [check for check in checks if " -> " in check["name"]]
    assert len(pairs) == 2
    assert all(check["status"] in ("ok", "warning") and "GB/s by " in check["text"] and "unknown" not in check["text"] for check in pairs)
