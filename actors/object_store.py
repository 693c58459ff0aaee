"""How many bytes have ever been put into Ray's object store: the proof that KV goes around it."""

from __future__ import annotations

from typing import Any

import ray
from ray._private import internal_api


def created_bytes() -> int:
    """Bytes of all objects created so far in the object stores of all nodes. Ray must be connected."""
    private: Any = internal_api  # Ray has no public call for this
    state = private.get_state_from_address(ray.get_runtime_context().gcs_address)
    total = 0
    nodes: Any = ray.nodes  # untyped
    for node in nodes():
        if node["Alive"]:
            reply = private.get_memory_info_reply(state, node["NodeManagerAddress"], node["NodeManagerPort"])
            total += int(reply.store_stats.cumulative_created_bytes)
    return total
