"""A gateway's staging buffer: an arena of Full-Block slots in DRAM, lent out under leases (architecture.md, invariant 1).

A slot is only ever *read* by the gateway that owns it (everything moves by push), so what must be guarded against is late
*writers*. A lease names the peers that may write to its slots. Its slots are free again only when the lease has been released, no
local activity holds it, and each writer has said that nothing of its is under way, or is known to be dead. Lease ids are never
used twice, so they serve as the epoch that every write carries.

Used from one thread (the gateway's event loop).
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import StaleEpochError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.transfer.memory import PAGE_BYTES, Region, allocate, round_up

REGION = "staging"


@dataclass(slots=True, eq=False)
class Lease:
    """Slots lent to one request. `writers` still may write; `holds` counts local activities that use the slots."""

    lease_id: int
    owner: str  # agent of the process that asked for it
    request_id: str
    slots: npt.NDArray[np.int32]
    writers: set[str]
    holds: int = 0
    released: bool = False
    granted_at: float = field(default_factory=time.monotonic)
    write_errors: list[str] = field(default_factory=list)

    @property
    def quiet(self) -> bool:
        """Nobody will write to the slots any more."""
        return not self.writers


class StagingBuffer:
    """See the module's docstring. `slots` Full Blocks, each starting on a page."""

    def __init__(self, geometry: KVGeometry, slots: int) -> None:
        self.geometry = geometry
        self.slot_stride = round_up(geometry.full_block_bytes, PAGE_BYTES)
        self.arena = allocate(self.slot_stride * slots)
        self.region = Region(REGION, self.arena.ctypes.data, geometry.layer_block_bytes, geometry.layers, self.slot_stride, groups=slots)
        self.total_slots = slots
        self._free = list(range(slots - 1, -1, -1))
        self._leases: dict[int, Lease] = {}
        self._ids = itertools.count(1)

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    def slot(self, slot: int) -> npt.NDArray[np.uint8]:
        """The slot's Full Block, uint8 `[full_block_bytes]`."""
        start = slot * self.slot_stride
        return self.arena[start : start + self.geometry.full_block_bytes]

    def can_grant(self, blocks: int, keep: int = 0) -> bool:
        """Whether `blocks` slots are free with `keep` more to spare (which a request for nearly the whole arena need not leave)."""
        return blocks + min(keep, self.total_slots - blocks) <= len(self._free)

    def grant(self, owner: str, request_id: str, blocks: int, writers: frozenset[str]) -> Lease:
        """Lend `blocks` slots. Ask `can_grant` first."""
        if not self.can_grant(blocks):
            raise ValueError(f"{blocks} slots wanted, {len(self._free)} free")
        slots = np.array([self._free.pop() for _ in range(blocks)], dtype=np.int32)
        lease = Lease(next(self._ids), owner, request_id, slots, set(writers))
        self._leases[lease.lease_id] = lease
        return lease

    def get(self, lease_id: int) -> Lease:
        """Raises StaleEpochError when the lease has been released or never existed."""
        lease = self._leases.get(lease_id)
        if lease is None or lease.released:
            raise StaleEpochError(f"lease {lease_id} is not valid (any more)")
        return lease

    def hold(self, lease: Lease) -> None:
        """Keep the slots from being lent again. Raises StaleEpochError when they are free already: they may be another request's."""
        if lease.lease_id not in self._leases:
            raise StaleEpochError(f"the slots of lease {lease.lease_id} are free already")
        lease.holds += 1

    def unhold(self, lease: Lease) -> None:
        lease.holds -= 1
        self._free_if_unused(lease)

    def writer_done(self, lease_id: int, agent: str, error: str | None = None) -> Lease | None:
        """A writer has acknowledged. Returns the lease if it is still there; late and repeated messages do nothing."""
        lease = self._leases.get(lease_id)
        if lease is None or agent not in lease.writers:
            return None
        lease.writers.discard(agent)
        if error is not None:
            lease.write_errors.append(f"{agent}: {error}")
        self._free_if_unused(lease)
        return lease

    def release(self, lease: Lease) -> None:
        """The owner needs the lease no longer. Slots become free when nobody can touch them."""
        lease.released = True
        self._free_if_unused(lease)

    def _free_if_unused(self, lease: Lease) -> None:
        if lease.released and not lease.writers and lease.holds == 0 and lease.lease_id in self._leases:
            del self._leases[lease.lease_id]
            self._free.extend(reversed(lease.slots.tolist()))

    def check_integrity(self) -> None:
        """Each slot is free or in exactly one lease. Raises AssertionError."""
        seen = list(self._free)
        for lease in self._leases.values():
            seen += lease.slots.tolist()
        if sorted(seen) != list(range(self.total_slots)):
            raise AssertionError(f"staging: {len(seen)} slots accounted for, {self.total_slots} exist, {len(set(seen))} distinct")
