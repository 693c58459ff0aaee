"""Small clusters for the policy tests."""

from __future__ import annotations

from policies.core import SchedulerCore
from policies.settings import SchedulingSettings
from policies.vocabulary import EngineLoad, NodeLoad, RequestDemand


def demand(request_id: str, prompt: int = 1000, hit_blocks: int = 10, arrived: float = 0.0, **changes: object) -> RequestDemand:
    values: dict[str, object] = {
        "request_id": request_id,
        "prompt_tokens": prompt,
        "hit_blocks": min(hit_blocks, (prompt - 1) // 64),
        "block_tokens": 64,
        "max_new_tokens": 100,
        "arrived_at": arrived,
        "deadline": 1e9,
    }
    return RequestDemand(**{**values, **changes})  # type: ignore[arg-type]


def engine(engine_id: str, node: str, role: str, free: int = 0, at: float = 0.0, **changes: object) -> EngineLoad:
    values: dict[str, object] = {"unfinished_requests": 0, "unfinished_tokens": 0, "free_hbm_tokens": free, "reported_at": at}
    return EngineLoad(engine_id=engine_id, node_id=node, role=role, **{**values, **changes})  # type: ignore[arg-type]


def node(node_id: str, slots: int = 10_000, at: float = 0.0, **changes: object) -> NodeLoad:
    values: dict[str, object] = {
        "read_queue_tokens": 0,
        "read_queue_bytes": 0,
        "snic_bandwidth": 1e9,
        "cnic_bandwidth": 1e9,
        "free_slots": slots,
        "total_slots": slots,
        "reported_at": at,
    }
    return NodeLoad(node_id=node_id, **{**values, **changes})  # type: ignore[arg-type]


def cluster(prefill_nodes: int = 1, decode_nodes: int = 1, per_node: int = 2, free: int = 20_000, **settings: object) -> SchedulerCore:
    core = SchedulerCore(SchedulingSettings(**settings))  # type: ignore[arg-type]
    for side, count, role in (("p", prefill_nodes, "prefill"), ("d", decode_nodes, "decode")):
        for n in range(count):
            core.update_node(node(f"{side}{n}"))
            for e in range(per_node):
                core.update_engine(engine(f"{side}{n}e{e}", f"{side}{n}", role, free if role == "decode" else 0))
    return core
