"""When nodes are added, removed, or change their role."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from dualpath_ray.config.section import Count, Delay, Nodes, Seconds, Section, Share


class AutoscalingSettings(Section):
    """The `autoscaling` section. The rule is `policies/scaling.py`'s, the same for both roles."""

    enabled: bool = Field(
        default=False, description="Add, remove and switch nodes by their load; off: cluster.prefill_nodes and decode_nodes are kept."
    )
    interval_s: Seconds = Field(default=5.0, description="Time between two looks at the load.")
    looks: Count = Field(default=6, description="Looks in a row that a decision is made from; after a change they are collected anew.")
    queue_target_s: Seconds = Field(default=1.0, description="A role grows when its requests wait longer than this for it.")
    target_utilisation: Share = Field(
        default=0.7, description="Utilisation that a role is sized for when it grows, and keeps after it shrinks."
    )
    high_utilisation: Share = Field(default=0.85, description="A role grows when its utilisation is above this.")
    least_prefill_nodes: Nodes = Field(default=1, description="Prefill nodes that are always kept.")
    most_prefill_nodes: Nodes = Field(default=8, description="Prefill nodes at most.")
    least_decode_nodes: Nodes = Field(default=1, description="Decode nodes that are always kept.")
    most_decode_nodes: Nodes = Field(default=8, description="Decode nodes at most.")
    drain_timeout_s: Delay = Field(
        default=600.0,
        description="How long a node that leaves may take to finish its requests; what is left then goes on elsewhere.",
    )

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.least_prefill_nodes > self.most_prefill_nodes or self.least_decode_nodes > self.most_decode_nodes:
            raise ValueError("least_..._nodes must not exceed most_..._nodes")
        if self.target_utilisation >= self.high_utilisation:
            raise ValueError("target_utilisation must be below high_utilisation, or nodes would come and go without end")
        return self
