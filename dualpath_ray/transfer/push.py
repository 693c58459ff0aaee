"""A push: Layer Blocks of ours, copied into memory that a peer has granted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import DualPathError
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer.messages import Message

Blocks = npt.NDArray[np.int32]
Done = Callable[[DualPathError | None], None]

PRIORITY_LAYERS, PRIORITY_POOL, PRIORITY_PERSIST = 0, 1, 2


@dataclass(slots=True, eq=False)
class Push:
    """Copy Layer Blocks `local_blocks` of our region `local` to blocks `remote_blocks` of `peer`'s region `remote`.

    `on_done(error)` is called once, on the endpoint's thread, when no byte of it is under way any more; `message` is sent to the peer
    behind the data if all went well. A push that outlasts `push_timeout_s` has failed, but is not done before NIXL says so or the peer is
    known to be dead; whoever waits for it has a deadline of its own.
    A push under a `lease` fails with StaleEpochError once that lease of the peer's is closed.
    """

    peer: str
    local: str
    local_blocks: Blocks
    remote: str
    remote_blocks: Blocks
    on_done: Done
    message: Message | None = None
    lease: int | None = None
    priority: int = PRIORITY_LAYERS
    before: Callable[[], None] | None = None  # e.g. wait for a CUDA event; called right before the first byte is posted
    pieces_left: int = field(default=0, init=False)
    attached: bool = field(default=False, init=False)  # NIXL sends `message` itself, behind the one piece
    digest: bytes | None = field(default=None, init=False)  # of the bytes, if the receiver is to compare them
    mismatches: int = field(default=0, init=False)
    error: DualPathError | None = field(default=None, init=False)
    deadline: float = field(default=0.0, init=False)

    @property
    def traffic(self) -> TrafficClass:
        return TrafficClass.KV_WRITE if self.priority == PRIORITY_PERSIST else TrafficClass.KV_READ

    @property
    def kind(self) -> str:
        """What counters call it."""
        return f"{self.local}->{self.remote}"
