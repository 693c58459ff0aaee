"""The words every scheduling policy shares: load reports, the request to place, the read plan and the assignment.

Units: tokens, bytes, bytes per second, seconds on the caller's clock. All values are immutable, so a report or an
assignment can be kept, logged or sent without copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Literal

from policies.batch_quota import AttentionTimeModel

Role = Literal["prefill", "decode"]
Source = Literal["storage", "dram"]


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What one engine (one GPU) pushes about itself (paper section 6, `seq_e` and `tok_e`).

    `free_hbm_tokens` is how many more tokens of KV the decode pool could hold now; prefill engines say 0.
    `hbm_capacity_tokens` is the size of the empty pool; left 0, the largest `free_hbm_tokens` ever reported stands for it.
    `group` names the scheduling group of a decode engine; left empty, the engines of one node form a group.
    `prefill_cost` is what computing costs a prefill engine, as it has measured; None: not known, the settings' values stand for it.
    """

    engine_id: str
    node_id: str
    role: Role
    unfinished_requests: int
    unfinished_tokens: int
    free_hbm_tokens: int
    reported_at: float
    hbm_capacity_tokens: int = 0
    group: str = ""
    prefill_cost: AttentionTimeModel | None = None


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """What the gateway of one node pushes: its read queue, measured NIC bandwidth and staging slots.

    `free_slots` counts slots that hold nothing or only an evictable cached block. `total_slots == 0` means: no limit known.
    A bandwidth of 0 means: not measured yet.
    """

    node_id: str
    read_queue_tokens: int
    read_queue_bytes: int
    snic_bandwidth: float
    cnic_bandwidth: float
    free_slots: int
    total_slots: int
    reported_at: float


@dataclass(frozen=True, slots=True)
class RequestDemand:
    """One request waiting for engines.

    `hit_blocks` whole blocks of `block_tokens` tokens are in storage; the rest of the prompt must be computed.
    `deadline` is when waiting becomes pointless. Larger `priority` goes first among its tenant's. `resident` maps a node to the
    positions (0 .. hit_blocks-1) of hit blocks its DRAM still holds. `block_bytes` is the size of a Full Block (0: not known).
    """

    request_id: str
    prompt_tokens: int
    hit_blocks: int
    block_tokens: int
    max_new_tokens: int
    arrived_at: float
    deadline: float
    priority: int = 0
    tenant: str = ""
    resident: Mapping[str, Set[int] | range] = field(default_factory=dict)
    block_bytes: int = 0

    @property
    def hit_tokens(self) -> int:
        return self.hit_blocks * self.block_tokens

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that prefill must compute."""
        return self.prompt_tokens - self.hit_tokens

    @property
    def prompt_blocks(self) -> int:
        """Staging slots that hold the whole prompt on the decode node."""
        return -(-self.prompt_tokens // self.block_tokens)

    @property
    def kv_tokens(self) -> int:
        """Tokens of decode HBM this request may come to need, in whole blocks."""
        return -(-(self.prompt_tokens + self.max_new_tokens) // self.block_tokens) * self.block_tokens


@dataclass(frozen=True, slots=True)
class ReadSegment:
    """`blocks` consecutive hit blocks from position `first_block`, read by the gateway of `node_id` from `source`."""

    node_id: str
    first_block: int
    blocks: int
    source: Source


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """Segments in block order that cover the hit blocks [0, hit_blocks) exactly once."""

    segments: tuple[ReadSegment, ...] = ()

    @property
    def blocks(self) -> int:
        return sum(segment.blocks for segment in self.segments)

    def storage_blocks(self) -> dict[str, int]:
        """Blocks that each node's storage NIC reads."""
        blocks: dict[str, int] = {}
        for segment in self.segments:
            if segment.source == "storage":
                blocks[segment.node_id] = blocks.get(segment.node_id, 0) + segment.blocks
        return blocks


@dataclass(frozen=True, slots=True)
class Assignment:
    """Who serves a request, and where each hit block is read."""

    request_id: str
    prefill_engine: str
    prefill_node: str
    decode_engine: str
    decode_node: str
    read_plan: ReadPlan
