"""Whole systems to compare, each as a choice of the same parts (paper section 7, baselines and ablation).

`layerwise`: KV enters HBM layer by layer, overlapped with compute. Without it a request's whole KV lives in prefill HBM from the start of
its read until it has been copied to the decode node, and both copies are exposed.
`queue_view`: the paper's scheduler (`ours`) knows read queues from reports; `shorter_queue` is the same with assignments counted at once.
`zero_io`: storage reads and KV copies take no time (the paper's Oracle).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from policies.settings import Placement, QueueView, ReadMode


@dataclass(frozen=True, slots=True)
class System:
    """One system under comparison."""

    name: str
    layerwise: bool
    read_mode: ReadMode
    placement: Placement
    zero_io: bool = False
    queue_view: QueueView = "accounted"


_SYSTEMS = (
    System("basic", False, "prefill_only", "round_robin"),
    System("basic_least_requests", False, "prefill_only", "least_requests"),
    System("layerwise", True, "prefill_only", "round_robin"),
    System("layerwise_scheduled", True, "prefill_only", "dualpath"),
    System("dual_path_only", False, "alternate", "round_robin"),
    System("layerwise_dual_path", True, "alternate", "round_robin"),
    System("ours", True, "shorter_queue", "dualpath", queue_view="reported"),
    System("shorter_queue", True, "shorter_queue", "dualpath"),
    System("split", True, "split", "dualpath"),
    System("pool", True, "pool", "dualpath"),
    System("oracle", True, "prefill_only", "dualpath", zero_io=True),
)
SYSTEMS: Mapping[str, System] = MappingProxyType({system.name: system for system in _SYSTEMS})
