"""What actors tell the scheduler, and what clients ask of it. Sent through Ray, so plain picklable dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.transfer.memory import PeerInfo
from policies.vocabulary import EngineLoad, NodeLoad, Role

BlockPairs = tuple[tuple[bytes, bytes], ...]
"""(key, parent) of blocks that are durable."""


def attempt_name(request_id: str, epoch: int) -> str:
    """How an attempt of a request is called in reports and in the decision core, so that attempts are never mixed up."""
    return f"{request_id}/{epoch}"


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What must be equal in all processes of a cluster, and what clients need to make requests."""

    fingerprint: str
    geometry: KVGeometry
    max_context: int
    model_path: str
    served_name: str


@dataclass(frozen=True, slots=True)
class Registration:
    """A process introduces itself (again, after it or the scheduler has been restarted). `peer.agent` tells incarnations apart.

    `ray_node` is the Ray node (hex id) it runs on; `start_s` the time from its constructor until it could serve.
    """

    engine_id: str
    node_id: str
    role: Role | None  # None: a gateway, whose engine_id is its node_id
    actor_name: str
    peer: PeerInfo
    facts: ModelFacts
    pid: int
    ray_node: str = ""
    start_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Welcome:
    """The scheduler's answer. `send_index`: it knows no blocks yet, please tell it all that are durable.

    `given_up`: this process was taken for dead, others have been told or soon will be; it must end itself.
    """

    scheduler: str
    pid: int
    send_index: bool = False
    given_up: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """Pushed on change and at least every `scheduling.report_interval_s`, as long as the scheduler has time for so many.

    `active` are the requests a decode engine holds; `prefilled` and `finished` those that passed that point since the last report;
    `read` those whose storage reads a gateway has ended since then; `came` and `gone` blocks that a gateway has in memory, or has no more.
    """

    engine_id: str
    agent: str
    load: EngineLoad | NodeLoad
    active: frozenset[str] = frozenset()
    prefilled: tuple[str, ...] = ()
    finished: tuple[str, ...] = ()
    added: BlockPairs = ()
    removed: tuple[bytes, ...] = ()
    came: tuple[bytes, ...] = ()
    gone: tuple[bytes, ...] = ()
    read: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)  # counters since the process started, and levels; for status and scaling
    index_complete: bool = False  # the last part of what `send_index` asked for


@dataclass(frozen=True, slots=True)
class Heard:
    """The answer to a report. `scheduler` is empty if its sender must register first; the next report may come after `pause_s`."""

    scheduler: str
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Submission:
    """Ask for a route. `keys` are the block keys of the prompt's complete blocks.

    `suspect`: actor that did not answer the attempt before; the scheduler looks after it first, instead of sending the request there again.
    """

    request_id: str
    epoch: int
    prompt_tokens: int
    max_new_tokens: int
    keys: tuple[bytes, ...]
    tenant: str = ""
    priority: int = 0
    timeout_s: float = 60.0
    suspect: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
