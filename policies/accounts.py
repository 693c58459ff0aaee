"""What the scheduler believes about engines and nodes between two load reports.

Two sources are combined without counting anything twice:

- *accounted*: the sum over requests we assigned, from the assignment until the event that ends it (`reads_done`, `prefill_done`,
  `finish`, `cancel`). It is exact and immediate, so a burst never herds onto one engine before its next report.
- *unknown*: what a report shows beyond the accounted sum at that moment (work of another scheduler, or from before a restart).
  It is recomputed by each report.

The belief is accounted + unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from policies.indexed_heap import IndexedHeap
from policies.vocabulary import EngineLoad, NodeLoad

UNLIMITED_SLOTS = 1 << 60


@dataclass(slots=True)
class EngineAccount:
    """One engine's load. `accounted_hbm_tokens` is the part of a decode engine's tokens whose memory is promised;
    `accounted_s` the predicted time of a prefill engine's requests (0 without a cost curve).
    """

    load: EngineLoad
    capacity_tokens: int = 0
    accounted_tokens: int = 0
    accounted_requests: int = 0
    accounted_hbm_tokens: int = 0
    accounted_s: float = 0.0
    unknown_tokens: int = 0
    unknown_requests: int = 0
    unknown_hbm_tokens: int = 0
    last_chosen: int = 0
    request_ids: dict[str, None] = field(default_factory=dict)

    def report(self, load: EngineLoad) -> None:
        self.load = load
        self.capacity_tokens = max(self.capacity_tokens, load.free_hbm_tokens, load.hbm_capacity_tokens)
        self.unknown_tokens = max(0, load.unfinished_tokens - self.accounted_tokens)
        self.unknown_requests = max(0, load.unfinished_requests - self.accounted_requests)
        self.unknown_hbm_tokens = max(0, self.capacity_tokens - load.free_hbm_tokens - self.accounted_hbm_tokens)

    def add(self, request_id: str, tokens: int, seconds: float = 0.0) -> None:
        self.request_ids[request_id] = None
        self.accounted_tokens += tokens
        self.accounted_requests += 1
        self.accounted_s += seconds

    def drop(self, request_id: str, tokens: int, seconds: float = 0.0) -> None:
        del self.request_ids[request_id]
        self.accounted_tokens -= tokens
        self.accounted_requests -= 1
        self.accounted_s = self.accounted_s - seconds if self.request_ids else 0.0  # no rounding error stays

    @property
    def tokens(self) -> int:
        """`tok_e` of the paper."""
        return self.accounted_tokens + self.unknown_tokens

    @property
    def requests(self) -> int:
        """`seq_e` of the paper."""
        return self.accounted_requests + self.unknown_requests

    @property
    def free_hbm_tokens(self) -> int:
        return self.capacity_tokens - self.accounted_hbm_tokens - self.unknown_hbm_tokens

    def order(self, placement: str) -> tuple[Any, ...]:
        """Sort key of the engine under a placement rule; smaller is better."""
        if placement == "round_robin":
            return (self.last_chosen,)
        if placement == "least_requests":
            return (self.requests, self.last_chosen)
        return (self.tokens, self.last_chosen)


@dataclass(slots=True)
class NodeAccount:
    """One node's storage NIC and staging slots, and an index of its prefill engines that may get work."""

    node_id: str
    load: NodeLoad | None = None
    accounted_read_tokens: int = 0
    accounted_slots: int = 0
    unknown_read_tokens: int = 0
    unknown_slots: int = 0
    engine_ids: dict[str, None] = field(default_factory=dict)
    open_prefill: IndexedHeap = field(default_factory=IndexedHeap)

    def report(self, load: NodeLoad) -> None:
        self.load = load
        self.unknown_read_tokens = max(0, load.read_queue_tokens - self.accounted_read_tokens)
        self.unknown_slots = max(0, load.total_slots - load.free_slots - self.accounted_slots)

    @property
    def read_tokens(self) -> int:
        """`read_q` of the paper: tokens assigned to this node's storage NIC and not read yet."""
        return self.accounted_read_tokens + self.unknown_read_tokens

    @property
    def free_slots(self) -> int:
        if self.load is None:
            return 0
        if self.load.total_slots == 0:
            return UNLIMITED_SLOTS
        return self.load.total_slots - self.accounted_slots - self.unknown_slots
