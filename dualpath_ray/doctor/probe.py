"""Run as a process of its own (`python -m dualpath_ray.doctor.probe WHAT`), because it may crash or change it. Prints a JSON document."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def transfers() -> dict[str, Any]:
    """Two agents of this machine: which plug-ins NIXL has, and what it pushes with."""
    with tempfile.TemporaryDirectory(prefix="dualpath-") as folder:
        log = Path(folder) / "ucx.log"
        os.environ.update(UCX_PROTO_INFO="y", UCX_LOG_FILE=str(log))
        from dualpath_ray.doctor.protocols import writes_to_peers
        from dualpath_ray.rdma.readiness import opens_rdma
        from dualpath_ray.transfer.memory import allocate
        from dualpath_ray.transfer.nixl_api import make_agent

        nbytes = 1 << 20
        agents = [make_agent(name, progress_thread_delay_us=1000, backends=("UCX",)) for name in ("near", "far")]
        memory = [allocate(nbytes) for _ in agents]
        memory[0][:] = 7
        for agent, each in zip(agents, memory, strict=True):
            agent.register_memory([(each.ctypes.data, nbytes, 0, "")], "DRAM")
        near, far = agents
        near.add_remote_agent(far.get_agent_metadata())
        rows = [np.array([[each.ctypes.data, nbytes, 0]], dtype=np.uint64) for each in memory]
        local, remote = (near.get_xfer_descs(row, "DRAM") for row in rows)
        handle = near.initialize_xfer("WRITE", local, remote, "far", b"")
        state = near.transfer(handle)
        while state != "DONE":
            state = near.check_xfer_state(handle)
        return {
            "plugins": sorted(near.get_plugin_list()),
            "written": bool((memory[1] == 7).all()),
            "transport": writes_to_peers(log.read_text(errors="replace") if log.exists() else ""),
            "rdma": opens_rdma(),
        }


def loopback(port_name: str, sl: int, dscp: int) -> dict[str, Any]:
    """A port that writes to itself and reads back, in KV's class."""
    from dualpath_ray.rdma.loopback import Copy, LoopbackCopier
    from dualpath_ray.rdma.sysfs import read_machine
    from dualpath_ray.traffic.classes import Marking
    from dualpath_ray.transfer.memory import allocate

    port = read_machine().port(port_name)
    assert port is not None
    half = 1 << 16
    memory = allocate(2 * half)
    copier = LoopbackCopier(port, (memory.ctypes.data, memory.nbytes), Marking(sl, dscp))
    base = memory.ctypes.data
    result: dict[str, Any] = {}
    for name, read, value in (("write", False, 3), ("read", True, 5)):
        memory[:half] = value
        copier.copy([Copy(base, base + half, half)], read)
        result[name] = bool((memory[half:] == value).all())
    result["sl"], result["traffic_class"] = copier.marking_in_force()
    copier.close()
    return result


def main() -> None:
    what, *arguments = sys.argv[1:]
    try:
        answer = transfers() if what == "transfers" else loopback(arguments[0], int(arguments[1]), int(arguments[2]))
    except Exception as error:
        answer = {"error": " ".join(str(error).split()) or type(error).__name__}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
