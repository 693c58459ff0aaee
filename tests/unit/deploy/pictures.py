"""An emulated cluster's /status, one second later with each call: what a page or a terminal shows of it is known beforehand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from policies.vocabulary import EngineLoad, NodeLoad, Role

MIB = 1 << 20
START = 1_800_000_000.0


def pictures(prefill_nodes: int = 1, decode_nodes: int = 2) -> Iterator[dict[str, Any]]:
    """Emulates `SchedulerActor.status` of a busy cluster: prefill nodes read 40 MiB/s each, decode nodes 60 MiB/s."""
    for second in itertools.count():
        processes: dict[str, Any] = {}
        for index in range(prefill_nodes):
            processes |= _node(f"p{index}", "prefill", second)
        for index in range(decode_nodes):
            processes |= _node(f"d{index}", "decode", second)
        yield {
            "time": START + second,
            "scheduler": "s1",
            "model": "emulated-model",
            "queued": 3,
            "running": 2,
            "blocked_on": None,
            "longest_wait_s": 0.4,
            "index_blocks": 12_345 + second,
            "restarts": 1,
            "processes": processes,
            "requests": [
                _request("chatcmpl-agent-7-turn-31/0", "decode", 52_312, 51_968, 14.2),
                _request("chatcmpl-agent-2-turn-8/1", "prefill", 18_004, 17_664, 0.8),
                {"id": "chatcmpl-agent-9-turn-1/0", "phase": "queued", "age_s": 0.31, "prompt_tokens": 4096, "hit_tokens": 0},
            ],
            "events": [
                {"at": START - 90, "kind": "joined", "who": "d1", "text": "gateway of node d1"},
                {"at": START - 30, "kind": "died", "who": "decode-d1-0", "text": "its process ended; another one has taken its place"},
                {"at": START - 5, "kind": "scaling", "who": "decode", "text": "2 nodes wanted: queue 1.3 s, utilisation 0.91"},
            ],
        }


def _request(name: str, phase: str, prompt: int, hits: int, age_s: float) -> dict[str, Any]:
    return {
        "id": name,
        "phase": phase,
        "age_s": age_s,
        "prompt_tokens": prompt,
        "hit_tokens": hits,
        "prefill_engine": "prefill-p0-0",
        "decode_engine": "decode-d0-0",
    }


def _node(node_id: str, role: Role, second: int) -> dict[str, Any]:
    read = (40 if role == "prefill" else 60) * MIB * second
    gateway_figures = {
        "read_bytes": read,
        "read_busy_s": 0.7 * second,
        "persisted_bytes": 2 * MIB * second,
        "hit_layer_bytes": read,
        "full_block_bytes": read if role == "prefill" else 0,
        "pool_bytes": 90 * MIB * second if role == "decode" else 0,
        "push_busy_s": 0.4 * second,
        "corrupt_blocks": 0,
        "oldest_lease_s": 1.2,
    }
    node = NodeLoad(node_id, 8192, 96 * MIB, 6e7, 0.0, 320, 1024, 0.0)
    engine_id = f"{role}-{node_id}-0"
    if role == "prefill":
        engine = EngineLoad(engine_id, node_id, role, 3, 70_000, 0, 0.0)
        figures = {"requests": 9 * second, "busy_s": 0.8 * second, "queue_s": 0.2 * second, "computed_tokens": 500 * second}
        figures |= {"cached_tokens": 19_500 * second, "new_layer_bytes": 5 * MIB * second, "push_busy_s": 0.2 * second}
    else:
        engine = EngineLoad(engine_id, node_id, role, 5, 120_000, 160_000, 0.0, 400_000)
        figures = {"requests": 4 * second, "busy_s": 0.9 * second, "queue_s": 0.0, "generated_tokens": 230 * second}
        figures |= {"full_block_bytes": 2 * MIB * second, "push_busy_s": 0.1 * second}
    return {
        node_id: _process("gateway", node_id, f"{node_id}-1", asdict(node), gateway_figures),
        engine_id: _process(role, node_id, f"{engine_id}-1", asdict(engine), figures),
    }


def _process(role: str, node_id: str, agent: str, load: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    return {
        "role": role,
        "node": node_id,
        "draining": False,
        "agent": agent,
        "actor": agent,
        "pid": 1,
        "report_age_s": 0.05,
        "load": load,
        "figures": figures,
    }
