"""A node: a gateway with the engines beside it, in one bundle of a placement group, so that they share a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ray.util.placement_group import PlacementGroup, placement_group_table

from actors.calls import gateway_name
from policies.vocabulary import Role

State = Literal["requested", "serving", "draining", "gone"]


@dataclass(slots=True, eq=False)
class Node:
    """`group` is the node's own if the cluster may scale; otherwise all nodes share one."""

    node_id: str
    role: Role
    group: PlacementGroup
    bundle: int
    state: State = "requested"
    engine_ids: list[str] = field(default_factory=list)

    @property
    def actor_names(self) -> list[str]:
        return [gateway_name(self.node_id), *self.engine_ids]

    def placed(self) -> bool:
        """Whether there is a machine for it."""
        table = placement_group_table(self.group)
        return bool(table.get("state") == "CREATED")
