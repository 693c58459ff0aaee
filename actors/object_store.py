"""How many bytes have ever been put into Ray's object store: the proof that KV goes around it."""

from __future__ import annotations

import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address


def created_bytes() -> int:
    """Bytes of all objects created so far in the object stores of all nodes. Ray must be connected."""
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    total = 0
    for node in ray.nodes():
        if node["Alive"]:
            reply = get_memory_info_reply(state, node["NodeManagerAddress"], node["NodeManagerPort"])
            total += int(reply.store_stats.cumulative_created_bytes)
    return total
