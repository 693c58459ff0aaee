"""One request's way through a decode engine, and everything it holds there and elsewhere."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from dualpath_ray.engine.decode import StepOutput
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.pool import BlockIds
from dualpath_ray.errors import DualPathError
from dualpath_ray.messages import DecodeTask, LeaseGrant, LoadOutcome, PrefillOutcome


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
