"""The knobs of a gateway, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath_ray.transfer.memory import HugePages


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    max_waiting_leases: int = 1024
    max_persist_queue_blocks: int = 4096
    resident_share: float = 0.0  # of the slots that may hold resident blocks; 0: nothing stays in memory
    note_uses_s: float = 30.0  # uses of resident blocks are noted in the store this often
    huge_pages: HugePages = "off"
    numa_node: int | None = None  # of the arena; None: as the kernel likes
    layer_groups: int = 4  # a Full Block is read in this many ranges of layers, first layers first


@dataclass(slots=True)
class GatewayStats:
    """Counters since start, in bytes, blocks and seconds."""

    read_bytes: int = 0
    read_blocks: int = 0
    read_s: float = 0.0
    dram_local_blocks: int = 0  # hits that were in this node's memory, used on this node
    dram_peer_blocks: int = 0  # the same, sent to another node
    persisted_blocks: int = 0
    persisted_bytes: int = 0
    persist_failures: int = 0
    persist_skipped: int = 0
    corrupt_blocks: int = 0
    leases: int = 0
    lease_wait_s: float = 0.0
