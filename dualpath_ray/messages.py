"""What actors say to each other, as typed dataclasses. Control only: no token's KV travels in these (architecture.md).

An *assignment* fixes where a request runs. It is made by the scheduler and carried to the decode engine, which orchestrates the
request; `epoch` counts the attempts of one request, so that a late message of an earlier attempt can be told apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualpath_ray.requests import Drawn, GenerationRequest, SamplingParams
from dualpath_ray.transfer.feeds import HitSource
from dualpath_ray.transfer.memory import PeerInfo


@dataclass(frozen=True, slots=True)
class ReadPart:
    """Hit blocks `[first_block, first_block + blocks)` are read from storage by gateway `node_id`."""

    node_id: str
    first_block: int
    blocks: int


@dataclass(frozen=True, slots=True)
class Route:
    """Where one attempt of a request runs. `peers` has the data-plane address of every process named here, by engine id.

    Of the prompt's blocks, `stored_blocks` are in storage and `hit_blocks` of these are read; the others are computed again.
    """

    request_id: str
    epoch: int
    prefill_engine: str
    decode_engine: str
    prefill_node: str
    decode_node: str
    hit_blocks: int
    reads: tuple[ReadPart, ...]
    peers: Mapping[str, PeerInfo]
    queued_s: float = 0.0
    stored_blocks: int = 0


@dataclass(frozen=True, slots=True)
class BlockLoad:
    """Read block `key` from storage into position `position` of a lease."""

    position: int
    key: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Forward:
    """Send loaded Full Blocks on to another gateway: position i of the lease goes to its slot `slots[i]` under `lease_id`."""

    peer: PeerInfo
    lease_id: int
    slots: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Ask a gateway for `blocks` staging slots, filled as `loads` says, writable by the agents in `writers`.

    `epoch` is the request's attempt, so that the end of its reads can be told to the scheduler.

    `draining`: the slots take blocks *out* of a decode pool on their way to storage. Such leases do not queue behind prompts and may
    use the slots kept for them: prompts in staging may be waiting for just the pool blocks that draining frees.
    `gateway`: agent that is meant. Another incarnation must refuse: it may never have heard that one of the writers is dead.
    """

    request_id: str
    owner: str
    blocks: int
    loads: tuple[BlockLoad, ...] = ()
    writers: frozenset[str] = frozenset()
    peers: tuple[PeerInfo, ...] = ()
    forward: Forward | None = None
    timeout_s: float = 60.0
    trace: Mapping[str, str] = field(default_factory=dict)
    draining: bool = False
    epoch: int = 0
    gateway: str = ""

    @property
    def load_keys(self) -> dict[int, bytes]:
        """Key of each position that the gateway fills."""
        return {load.position: load.key for load in self.loads}


@dataclass(frozen=True, slots=True)
class LeaseGrant:
    """`slots[i]` is where position i may be written; NO_SLOT (-1) where the gateway fills it itself."""

    agent: str
    lease_id: int
    slots: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """What a lease's loads cost: bytes read from storage, seconds from the grant to their end and to the first layers in memory, and bytes
    that were in memory already."""

    read_bytes: int = 0
    read_s: float = 0.0
    first_s: float = 0.0
    dram_bytes: int = 0


@dataclass(frozen=True, slots=True)
class PersistBlock:
    """Write position `position` of a lease to storage under `key`."""

    position: int
    key: bytes
    parent: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """Push a whole prompt's KV from a lease into a decode engine's pool: position i goes to pool block `pool_blocks[i]`.

    `hits` of the positions were read by this gateway or came from another one, so only later positions are in `persist`.
    """

    lease_id: int
    peer: PeerInfo
    pool_blocks: npt.NDArray[np.int32]
    persist: tuple[PersistBlock, ...] = ()
    timeout_s: float = 60.0
    trace: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PrefillTask:
    """Compute the KV of `tokens` after `cached_tokens` (whole blocks, provided by `sources`), and the first token.

    New KV goes to `slots` (position i = block i of the sequence) under `lease_id` of gateway `gateway`. `engine`: agent that is meant;
    another incarnation must refuse, for it may never have heard that one of the sources is dead.
    """

    request_id: str
    epoch: int
    tokens: npt.NDArray[np.int32]
    cached_tokens: int
    sources: tuple[HitSource, ...]
    gateway: PeerInfo
    lease_id: int
    slots: npt.NDArray[np.int32]
    peers: tuple[PeerInfo, ...]
    sampling: SamplingParams
    masked_token_ids: tuple[int, ...] = ()  # tokens that must not be drawn (stop ids before min_new_tokens)
    resumed_tokens: int = 0  # that many of the last tokens were generated by earlier attempts
    timeout_s: float = 60.0
    trace: Mapping[str, str] = field(default_factory=dict)
    engine: str = ""


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    first: Drawn
    queued_s: float
    computed_s: float
    waited_s: float  # part of computed_s spent waiting for layers
    awaited_s: float = 0.0  # part of queued_s spent waiting for the first layers of the hits
    peak_window_bytes: int = 0


@dataclass(frozen=True, slots=True)
class DecodeTask:
    """One attempt of a request, for the decode engine that shall orchestrate it. `keys`: block keys of the prompt's complete blocks."""

    request: GenerationRequest
    route: Route
    keys: tuple[bytes, ...]
    root: bytes
