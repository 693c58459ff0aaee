"""The knobs of the scheduler (the `scheduling` section of a cluster configuration)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ReadMode = Literal["prefill_only", "alternate", "shorter_queue", "split", "pool"]
QueueView = Literal["accounted", "reported"]
Placement = Literal["dualpath", "round_robin", "least_requests"]


class SchedulingSettings(BaseModel):
    """Settings of `policies.core.SchedulerCore`; the defaults are the paper's values for DeepSeek-V3.2 on Hopper nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    read_mode: ReadMode = Field(
        default="split",
        description="Which storage NICs read a request's hit blocks: the prefill node's only (prefill_only), both sides in turn "
        "(alternate, a baseline), the node with the shorter read queue (shorter_queue, the paper), both sides together (split), "
        "or any node of the cluster (pool).",
    )
    placement: Placement = Field(
        default="dualpath",
        description="How engines are chosen: by read queues, tokens and memory (dualpath, paper section 6), in turn (round_robin) or by "
        "fewest unfinished requests (least_requests).",
    )
    alpha_tokens: int = Field(
        default=3_500_000,
        ge=0,
        description="A node's read queue up to this many tokens is short. The paper takes what its storage NIC reads in 3 s.",
    )
    beta_tokens: int = Field(
        default=800_000,
        ge=1,
        description="A prefill engine with more unfinished prompt tokens than this gets nothing new. "
        "The paper takes what a GPU processes in 5 s.",
    )
    z_factor: float = Field(
        default=1.05,
        ge=1.0,
        description="A decode engine above this multiple of its group's mean token load counts as high-token (paper: 1.05).",
    )
    hbm_promise: Literal["assignment", "decode"] = Field(
        default="assignment",
        description="When a request's decode memory counts as taken: from its assignment, so that a prefilled request never waits for "
        "memory, or from the end of its prefill (the paper), so that memory is not held idle but a prefilled request may wait in staging.",
    )
    hit_token_weight: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of a request's hit tokens that counts towards a prefill engine's tokens. 1 is the paper's rule (total tokens); "
        "0 counts computed tokens only.",
    )
    max_queued_requests: int = Field(
        default=100_000, ge=1, description="Requests that may wait for engines; the next one is refused with a retryable error."
    )
    report_timeout_s: float = Field(
        default=10.0,
        gt=0.0,
        description="An engine or gateway that has not reported for this long gets nothing new until it reports again (seconds).",
    )
    pool_width: int = Field(
        default=4, ge=0, description="Nodes beside the prefill and decode node that may read for a request in mode pool."
    )
    queue_view: QueueView = Field(
        default="accounted",
        description="Which read queues the read plan compares: with assignments counted at once (accounted), or as of the last "
        "reports (reported, the paper; several requests between two reports then choose the same node).",
    )
    min_split_blocks: int = Field(
        default=8, ge=1, description="Smallest share of one request that is worth a read on another node (blocks)."
    )
    use_resident: bool = Field(default=True, description="Take blocks that a node's DRAM still holds from there instead of from storage.")
    tenant_quantum_tokens: int = Field(
        default=200_000,
        ge=1,
        description="Tokens that a tenant with waiting requests is served before the next tenant's turn (deficit round robin).",
    )
    prefill_token_s: float = Field(
        default=0.0,
        ge=0.0,
        description="Seconds a prefill engine needs per computed token; 0: not known. Orders requests by slack, and stands for what an "
        "engine costs until it has measured that.",
    )
    prefill_pair_s: float = Field(
        default=0.0, ge=0.0, description="Seconds a prefill engine needs per pair of a computed token and one before it; likewise."
    )
    recompute: bool = Field(
        default=False,
        description="Recompute the last hit blocks of a request where that is faster than to read them, by what prefill engines have "
        "measured that computing costs, and gateways reading.",
    )
    rebalance: bool = Field(
        default=False,
        description="Take requests that have not begun back from a prefill engine that fell behind, and place them again. Off, since a "
        "request that is taken back has its blocks read a second time.",
    )
    rebalance_hysteresis: float = Field(
        default=0.3,
        ge=0.0,
        le=1.0,
        description="A request is taken back only if that lowers the load by more than this share of the fuller engine's.",
    )
