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

from policies.vocabulary import EngineLoad, NodeLoad

UNLIMITED_SLOTS = 1 << 60


@dataclass(slots=True, eq=False)
class EngineAccount:
    """One engine's load. `tokens` and `requests` are the paper's `tok_e` and `seq_e`: accounted and unknown ones.

    `available`: it and its gateway have reported recently and the node is not drained. `accounted_hbm_tokens` is the part of a decode
    engine's tokens whose memory is promised; `accounted_s` the predicted time of a prefill engine's requests (0 without a cost curve).
    `turn` grows with each request of a decode engine; it begins at another parity than its neighbour's (read mode `alternate`).
    """

    load: EngineLoad
    node: NodeAccount = field(repr=False)
    available: bool = False
    capacity_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    free_hbm_tokens: int = 0
    accounted_tokens: int = 0
    accounted_requests: int = 0
    accounted_hbm_tokens: int = 0
    accounted_s: float = 0.0
    last_chosen: int = 0
    turn: int = 0
    request_ids: dict[str, None] = field(default_factory=dict)
    engine_id: str = field(init=False)
    group: str = field(init=False)

    def __post_init__(self) -> None:
        self.engine_id = self.load.engine_id
        self.group = self.load.group or self.load.node_id

    def report(self, load: EngineLoad) -> None:
        self.load = load
        self.capacity_tokens = max(self.capacity_tokens, load.free_hbm_tokens, load.hbm_capacity_tokens)
        self.tokens = max(self.accounted_tokens, load.unfinished_tokens)
        self.requests = max(self.accounted_requests, load.unfinished_requests)
        self.free_hbm_tokens = min(self.capacity_tokens - self.accounted_hbm_tokens, load.free_hbm_tokens)

    def add(self, request_id: str, tokens: int, seconds: float = 0.0) -> None:
        self.request_ids[request_id] = None
        self.accounted_tokens += tokens
        self.tokens += tokens
        self.accounted_requests += 1
        self.requests += 1
        self.accounted_s += seconds

    def drop(self, request_id: str, tokens: int, seconds: float = 0.0) -> None:
        del self.request_ids[request_id]
        self.accounted_tokens -= tokens
        self.tokens -= tokens
        self.accounted_requests -= 1
        self.requests -= 1
        self.accounted_s = self.accounted_s - seconds if self.request_ids else 0.0  # no rounding error stays

    def promise(self, tokens: int) -> None:
        """Memory for so many tokens is promised (or, if negative, free again)."""
        self.accounted_hbm_tokens += tokens
        self.free_hbm_tokens -= tokens

    def order(self, placement: str) -> tuple[Any, ...]:
        """Sort key of the engine under a placement rule; smaller is better."""
        if placement == "round_robin":
            return (self.last_chosen,)
        if placement == "least_requests":
            return (self.requests, self.last_chosen)
        return (self.tokens, self.last_chosen)


@dataclass(slots=True, eq=False)
class NodeAccount:
    """One node's storage NIC and staging slots. `read_tokens` is the paper's `read_q`: tokens assigned to its storage NIC and not read yet.

    `open_prefill` are its prefill engines that may get work, `long_queue` says in which class; both belong to
    policies/prefill_placement.py.
    """

    node_id: str
    load: NodeLoad | None = None
    read_tokens: int = 0
    free_slots: int = 0
    accounted_read_tokens: int = 0
    accounted_slots: int = 0
    engine_ids: dict[str, None] = field(default_factory=dict)
    open_prefill: dict[str, EngineAccount] = field(default_factory=dict)
    long_queue: bool = False

    def report(self, load: NodeLoad) -> None:
        self.load = load
        self.read_tokens = max(self.accounted_read_tokens, load.read_queue_tokens)
        self.free_slots = min(load.total_slots - self.accounted_slots, load.free_slots) if load.total_slots else UNLIMITED_SLOTS

    def read(self, tokens: int) -> None:
        """So many more tokens are to be read (or, if negative, have been)."""
        self.accounted_read_tokens += tokens
        self.read_tokens += tokens

    def lease(self, slots: int) -> None:
        """So many more slots are taken (or, if negative, free again)."""
        self.accounted_slots += slots
        self.free_slots -= slots
