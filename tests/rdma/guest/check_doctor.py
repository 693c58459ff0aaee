"""The doctor on a machine with RDMA: devices, loop-back in KV's class, and what UCX pushes with when copies must go through the card."""

from __future__ import annotations

import json
import subprocess
import sys


def test_doctor_finds_the_machine_fit() -> None:
    settings = ("transfer.fabric=rdma", "transfer.local_copies=cnic", "transfer.net_devices=rxe0:1", "storage.path=/tmp/doctor-store")
    options = [part for each in settings for part in ("--set", each)]
    command = [sys.executable, "-c", "from dualpath_ray.cli import main; main()", "doctor", "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    print(json.dumps(checks, indent=1))
    assert done.returncode == 0
    for number in (0, 1):
        port = checks[f"rdma port rxe{number}:1"]
        assert port["status"] == "ok" and f"ffff:0a09:000{number + 1} RoCE v2, MTU 4096" in port["text"]
        assert checks[f"loop-back rxe{number}:1"]["text"] == "write and read in KV's class (SL 2, DSCP 18)"
    assert checks["locked memory"]["text"] == "unlimited"
    assert "rc_verbs/rxe0:1" in checks["ucx transport"]["text"]
    assert "nixl exit" not in checks  # with these libraries a process must not crash at its end
    assert "MB/s" in checks["store /tmp/doctor-store"]["text"]
