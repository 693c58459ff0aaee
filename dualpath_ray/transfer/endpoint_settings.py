"""The knobs of an endpoint, and what it counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dualpath_ray.traffic.classes import Marking, TrafficClass


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """`tls`, `net_devices` and `error_handling` reach UCX through the environment of the process (see Settings.transfer)."""

    progress_thread_delay_us: int = 1000
    busy_poll_s: float = 0.0001  # pause between looks right after something has happened ...
    idle_poll_s: float = 0.002  # ... and when nothing has happened for long
    push_timeout_s: float = 30.0
    max_post_bytes: int = 8 << 20  # longer pushes go out in pieces, so that urgent ones need not wait behind them
    traffic: dict[TrafficClass, Marking] = field(default_factory=dict)  # classes that this process pushes in; empty: nothing is marked
    rdma_ports: tuple[str, ...] | None = None  # RDMA or nothing: over these ports (empty: any); None: whatever UCX finds
    copy_threads: int = 0  # threads that copy large pushes to processes of this machine, while the endpoint's thread goes on
    verify: bool = False  # receivers compare what they got with what we sent


@dataclass(slots=True)
class EndpointStats:
    """Counters since start. `push_seconds` is the time the thread spent inside NIXL's posting and checking calls."""

    pushed_bytes: Counter[str] = field(default_factory=Counter)  # by "local->remote" region
    pushes: Counter[str] = field(default_factory=Counter)
    push_seconds: float = 0.0
    failed_pushes: int = 0
    refused_pushes: int = 0
    verified_pushes: int = 0
    mismatched_pushes: int = 0  # arrived damaged
    messages_sent: int = 0
    messages_received: int = 0
    bad_messages: int = 0
