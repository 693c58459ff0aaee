"""One request's way through a decode engine, everything it holds there and elsewhere, and what it has cost so far."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from dualpath_ray.engine.decode import StepOutput
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.pool import BlockIds
from dualpath_ray.errors import DualPathError
from dualpath_ray.messages import DecodeTask, LeaseGrant, LoadOutcome, PrefillOutcome
from dualpath_ray.requests import GenerationUsage


@dataclass(slots=True, eq=False)
class Flow:
    """Whatever is set here is given back when the request ends, in whatever way (`DecodeService._clean_up`)."""

    task: DecodeTask
    rule: FinishRule
    started: float
    deadline: float
    events: asyncio.Queue[StepOutput | DualPathError] = field(default_factory=asyncio.Queue)
    tokens: list[int] = field(default_factory=list)  # generated ones
    lease: LeaseGrant | None = None  # on this node's gateway, until delivered
    remote_leases: dict[str, int] = field(default_factory=dict)  # node -> lease on another gateway
    prefilling: bool = False
    pool_blocks: BlockIds | None = None
    running: bool = False
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    read_bytes: dict[str, int] = field(default_factory=dict)
    read_s: float = 0.0
    read_wait_s: dict[str, float] = field(default_factory=dict)
    allocate_s: float = 0.0
    prefill: PrefillOutcome | None = None
    delivery: asyncio.Future[LoadOutcome] | None = None
    keys: list[bytes] = field(default_factory=list)  # root, then the keys of the complete blocks so far

    @property
    def name(self) -> str:
        return self.task.request.request_id

    @property
    def phase(self) -> str:
        """How far the request has come, for diagnosis."""
        if self.running:
            return "decoding"
        if self.delivery is not None:
            return "handing_over"
        if self.prefilling:
            return "prefilling"
        return "ending" if self.tokens else "arming"

    def time_left(self) -> float:
        return max(0.001, self.deadline - time.monotonic())

    # ---- what it cost

    def note_read(self, node_id: str, outcome: LoadOutcome) -> None:
        """What node `node_id` read of the prompt's hits."""
        route = self.task.route
        side = "decode_node" if node_id == route.decode_node else "prefill_node" if node_id == route.prefill_node else "other_nodes"
        self.read_bytes[side] = self.read_bytes.get(side, 0) + outcome.read_bytes
        self.read_s = max(self.read_s, outcome.read_s)
        if outcome.read_bytes:
            self.read_wait_s[side] = max(self.read_wait_s.get(side, 0.0), outcome.first_s)

    def usage(self, block_tokens: int) -> GenerationUsage:
        """As far as it is known: reads are complete once the prompt's KV has been taken over."""
        route, prompt = self.task.route, len(self.task.request.tokens)
        cached = route.hit_blocks * block_tokens
        return GenerationUsage(
            prompt_tokens=prompt,
            cached_tokens=cached,
            computed_tokens=prompt - cached,
            completion_tokens=len(self.tokens),
            read_bytes=dict(self.read_bytes),
            attempts=route.epoch + 1,
            prefill_engine=route.prefill_engine,
            decode_engine=route.decode_engine,
            queue_s=route.queued_s + (self.prefill.queued_s if self.prefill else 0.0),
            read_s=self.read_s,
            prefill_s=self.prefill.computed_s if self.prefill else 0.0,
            read_wait_s=dict(self.read_wait_s),
            first_token_s=self._first_token_s(),
        )

    def _first_token_s(self) -> dict[str, float]:
        """Where the time until the first token went, as far as engines and gateways know. Messages between them are in none of these."""
        prefill = self.prefill
        if prefill is None:
            return {}
        return {
            "queue": self.task.route.queued_s + prefill.queued_s - prefill.awaited_s,
            "allocate": self.allocate_s,
            "wire": prefill.awaited_s + prefill.waited_s,
            "compute": prefill.computed_s - prefill.waited_s,
        }
