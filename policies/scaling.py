"""How many prefill and decode nodes are wanted, and which node should switch its role.

Intent: meet the queue-time target with the fewest nodes; one rule for both roles.
Inputs, per role: nodes, utilisation (busy time over time), mean queue time, samples seen since the last change.
Rule: too few samples (a cold start) change nothing. Utilisation u of n nodes projects to u * n / (n - 1) on one node less.
Grow while the queue time is above target or utilisation above `high`: to n * u / target_utilisation. Shrink by one node, only if
the queue is short and the projection stays below `target_utilisation`. When one role wants to grow and the other can give a
node, a role switch replaces both.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class RoleLoad:
    """Measured load of all nodes of one role."""

    nodes: int
    utilisation: float
    queue_s: float
    samples: int


@dataclass(frozen=True, slots=True)
class ScalingLimits:
    """Targets; the gap between `target_utilisation` and `high` is the hysteresis."""

    queue_target_s: float = 1.0
    target_utilisation: float = 0.7
    high: float = 0.85
    least_samples: int = 20
    least_nodes: int = 1
    most_nodes: int = 1000


@dataclass(frozen=True, slots=True)
class ScalingDecision:
    """Wanted nodes per role; `switch` nodes move from prefill to decode (negative: the other way) instead of being added and removed."""

    prefill_nodes: int
    decode_nodes: int
    switch: int = 0


def wanted_nodes(load: RoleLoad, limits: ScalingLimits) -> int:
    """Nodes wanted for one role."""
    if load.samples < limits.least_samples:
        return load.nodes
    wanted = load.nodes
    if load.queue_s > limits.queue_target_s or load.utilisation > limits.high:
        wanted = max(load.nodes + 1, ceil(load.nodes * load.utilisation / limits.target_utilisation))
    elif load.nodes > 1 and load.queue_s <= limits.queue_target_s / 2:
        projected = load.utilisation * load.nodes / (load.nodes - 1)
        if projected < limits.target_utilisation:
            wanted = load.nodes - 1
    return min(max(wanted, limits.least_nodes), limits.most_nodes)


def decide_scaling(
    prefill: RoleLoad, decode: RoleLoad, limits: ScalingLimits, decode_limits: ScalingLimits | None = None
) -> ScalingDecision:
    """Wanted nodes of both roles (`decode_limits`: if they differ), with role switches where one grows and the other shrinks."""
    p, d = wanted_nodes(prefill, limits), wanted_nodes(decode, decode_limits or limits)
    grow_decode, shrink_prefill = d - decode.nodes, prefill.nodes - p
    switch = min(grow_decode, shrink_prefill) if grow_decode > 0 and shrink_prefill > 0 else 0
    if grow_decode < 0 and shrink_prefill < 0:
        switch = max(grow_decode, shrink_prefill)
    return ScalingDecision(p, d, switch)
