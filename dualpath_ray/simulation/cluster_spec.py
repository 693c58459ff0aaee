"""What to simulate: a cluster, a system and how its engines are grouped."""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.network import Sharing
from dualpath_ray.simulation.node_spec import NodeSpec


class ClusterSpec(BaseModel):
    """xPyD: x prefill and y decode nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prefill_nodes: int = Field(default=1, ge=1, description="Prefill nodes (x of xPyD).")
    decode_nodes: int = Field(default=1, ge=1, description="Decode nodes (y of xPyD).")
    prefill_group_nodes: int = Field(default=2, ge=1, description="Nodes whose prefill engines run each forward pass in lockstep, at most.")
    decode_group_nodes: int = Field(default=4, ge=1, description="Nodes whose decode engines step in lockstep, at most.")
    node: NodeSpec = Field(default=NodeSpec(), description="Hardware of every node.")
    sharing: Sharing = Field(
        default="queue",
        description="How concurrent transfers share a link: first come first served (queue), or max-min fair rates (fair).",
    )
    block_tokens: int = Field(default=64, ge=1, description="Tokens of one Full Block.")
    quota_s: float = Field(default=0.3, gt=0, description="Attention time of one forward batch (paper: 300 ms).")
    batch_tokens: int = Field(default=16_384, ge=64, description="Most tokens one engine computes in one forward pass.")
    alpha_s: float = Field(
        default=3.0, ge=0, description="A read queue is short up to what the storage NIC reads in this time (paper: 3 s)."
    )
    beta_s: float = Field(default=5.0, gt=0, description="An engine is overloaded above what it prefills in this time (paper: 5 s).")
    min_split_blocks: int = Field(default=8, ge=1, description="Smallest share of a request that is read on another node, in blocks.")

    @model_validator(mode="after")
    def _a_pass_holds_a_block(self) -> Self:
        if self.batch_tokens < self.block_tokens:
            raise ValueError(f"batch_tokens ({self.batch_tokens}) must hold one block (block_tokens, {self.block_tokens})")
        return self


def parse_nodes(text: str) -> tuple[int, int]:
    """(prefill nodes, decode nodes) of a string such as `2P4D`."""
    match = re.fullmatch(r"(\d+)[pP](\d+)[dD]", text)
    if not match or int(match[1]) < 1 or int(match[2]) < 1:
        raise ConfigError(f"nodes: must look like 2P4D with at least one node of each kind, not {text!r}")
    return int(match[1]), int(match[2])
