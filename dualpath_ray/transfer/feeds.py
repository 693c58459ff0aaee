"""What a prefill engine receives and sends for one chunk of one request: streams of hit KV, and where its new KV goes."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import DualPathError

if TYPE_CHECKING:
    from dualpath_ray.transfer.batch_gate import BatchGate


@dataclass(frozen=True, slots=True)
class HitSource:
    """Where some blocks of a sequence's cached KV lie: blocks `blocks` of the sequence are at `positions` of a lease of gateway `agent`."""

    agent: str
    lease: int
    positions: tuple[int, ...]
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class NewKV:
    """Where the KV computed for a chunk goes: staging slots `slots` under `lease` of gateway `agent`.

    `slots[i]` takes block `first_block + i` of the sequence.
    """

    agent: str
    lease: int
    slots: npt.NDArray[np.int32]
    first_block: int


@dataclass(slots=True, eq=False)
class Incoming:
    number: int
    source: HitSource
    feed: ChunkFeed
    ready: bool = False
    closed: bool = False
    lost: bool = False  # nobody will say that it is closed before its source is known to be dead
    closing: bool = False  # its source has been told to push nothing more
    landed: set[int] = field(default_factory=set)  # layers
    heard_at: float = field(default_factory=time.monotonic)  # when its source last said anything, or was asked again

    @property
    def rows(self) -> range:
        """What it may write to of every window layer, in blocks. Only when its feed is in a batch."""
        first = self.feed.first_row_block
        return range(first + min(self.source.blocks), first + max(self.source.blocks) + 1)


class ChunkFeed:
    """The open streams of one chunk. `ready` is done when their first layers can be had, or raises why they cannot."""

    def __init__(self, new_kv: NewKV) -> None:
        self.new_kv = new_kv
        self.ready: Future[None] = Future()
        self.incoming: list[Incoming] = []
        self.first_row_block = 0
        self.error: DualPathError | None = None
        self.gate: BatchGate | None = None

    @property
    def rows(self) -> range:
        """Its rows in every window layer, in blocks. Only when it is in a batch."""
        return range(self.first_row_block, self.first_row_block + self.new_kv.first_block + len(self.new_kv.slots))

    def fail(self, error: DualPathError) -> None:
        self.error = self.error or error
        if not self.ready.done():
            self.ready.set_exception(error)
