"""A gateway's staging buffer: an arena of Full-Block slots in DRAM, lent out under leases (architecture.md, invariant 1).

A slot is only ever *read* by the gateway that owns it (everything moves by push), so what must be guarded against is late
*writers*. A lease names the peers that may write to its slots. Its slots are free again only when the lease has been released, no
local activity holds it, and each writer has said that nothing of its is under way, or is known to be dead. Lease ids are never
used twice, so they serve as the epoch that every write carries.

A slot goes round like this, without its bytes ever being copied:

    free -> leased (its lease's alone) -> resident (`publish`: a durable block under its key, read only, shared by leases that load it)
         -> free (evicted when a lease needs the slot and no lease uses the block)

Slots at positions that the gateway itself fills (`Lease.sealed`) are never told to anyone (`Lease.writable_slots`), so nobody can write
to a block that is, or is about to become, resident.

Used from one thread (the gateway's event loop).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dualpath_ray.errors import StaleEpochError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.resident import ResidentBlocks
from dualpath_ray.transfer.memory import PAGE_BYTES, HugePages, Region, allocate, round_up

REGION = "staging"
NO_SLOT = -1


def slot_bytes(geometry: KVGeometry) -> int:
    """What a slot takes: a Full Block in whole pages."""
    return round_up(geometry.full_block_bytes, PAGE_BYTES)


@dataclass(slots=True, eq=False)
class Lease:
    """Slots lent to one request. `writers` still may write; `holds` counts local activities that use the slots.

    `sealed` positions are filled by the gateway and by nobody else; `shared` ones (position -> key) are resident blocks.
    """

    lease_id: int
    owner: str  # agent of the process that asked for it
    request_id: str
    slots: npt.NDArray[np.int32]
    writers: set[str]
    holds: int = 0
    released: bool = False
    granted_at: float = field(default_factory=time.monotonic)
    write_errors: list[str] = field(default_factory=list)
    sealed: frozenset[int] = frozenset()
    shared: dict[int, bytes] = field(default_factory=dict)

    @property
    def writable_slots(self) -> npt.NDArray[np.int32]:
        """The slots as others may know them: NO_SLOT at sealed positions."""
        slots = self.slots.copy()
        slots[list(self.sealed)] = NO_SLOT
        return slots

    @property
    def quiet(self) -> bool:
        """Nobody will write to the slots any more."""
        return not self.writers


class StagingBuffer:
    """See the module's docstring. `slots` Full Blocks, each starting on a page; at most `resident_slots` of them stay resident."""

    def __init__(
        self, geometry: KVGeometry, slots: int, resident_slots: int = 0, huge_pages: HugePages = "off", numa_node: int | None = None
    ) -> None:
        self.geometry = geometry
        self.slot_stride = slot_bytes(geometry)
        self.arena = allocate(self.slot_stride * slots, huge_pages, numa_node)
        self.region = Region(REGION, self.arena.ctypes.data, geometry.layer_block_bytes, geometry.layers, self.slot_stride, groups=slots)
        self.total_slots = slots
        self.residents = ResidentBlocks(min(resident_slots, slots))
        self._free = list(range(slots - 1, -1, -1))
        self._leases: dict[int, Lease] = {}
        self._ids = itertools.count(1)

    @property
    def free_slots(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    @property
    def available_slots(self) -> int:
        """Slots that a lease could have now: free ones, and those of resident blocks that no lease uses."""
        return len(self._free) + self.residents.evictable

    @property
    def leases(self) -> tuple[Lease, ...]:
        return tuple(self._leases.values())

    def slot(self, slot: int) -> npt.NDArray[np.uint8]:
        """The slot's Full Block, uint8 `[full_block_bytes]`."""
        start = slot * self.slot_stride
        return self.arena[start : start + self.geometry.full_block_bytes]

    def can_grant(self, blocks: int, keep: int = 0, loads: Mapping[int, bytes] | None = None) -> bool:
        """Whether `blocks` slots are available with `keep` more to spare (which a request for nearly the whole arena need not leave).

        Of `loads` (position -> key), those that other leases use already take no slot.
        """
        wanted = blocks - (self.residents.pinned_among(loads.values()) if loads else 0)
        return wanted + min(keep, self.total_slots - blocks) <= self.available_slots

    def grant(self, owner: str, request_id: str, blocks: int, writers: frozenset[str], loads: Mapping[int, bytes] | None = None) -> Lease:
        """Lend `blocks` slots. Ask `can_grant` first. Positions in `loads` are sealed, and shared at once if their block is resident."""
        loads = loads or {}
        if not self.can_grant(blocks, loads=loads):
            raise ValueError(f"{blocks} slots wanted, {self.available_slots} free")
        slots = np.full(blocks, NO_SLOT, dtype=np.int32)
        shared: dict[int, bytes] = {}
        for position, key in loads.items():
            slot = self.residents.pin(key)
            if slot is not None:
                slots[position], shared[position] = slot, key
        for position in np.flatnonzero(slots == NO_SLOT).tolist():
            slots[position] = self._take_slot()
        lease = Lease(next(self._ids), owner, request_id, slots, set(writers), sealed=frozenset(loads), shared=shared)
        self._leases[lease.lease_id] = lease
        return lease

    def _take_slot(self) -> int:
        if self._free:
            return self._free.pop()
        slot = self.residents.evict()
        assert slot is not None, "can_grant counts evictable slots"
        return slot

    def publish(self, lease: Lease, position: int, key: bytes) -> bool:
        """Let the block at `position`, whose bytes are whole, known to be good and durable, stay resident under `key`.

        False if it cannot (it is resident already, or there is no room for one more). Raises StaleEpochError when the lease's slots are
        free already, ValueError while anyone could still write to the slot.
        """
        if lease.lease_id not in self._leases:
            raise StaleEpochError(f"the slots of lease {lease.lease_id} are free already")
        if position not in lease.sealed and not lease.quiet:
            raise ValueError(f"position {position} of lease {lease.lease_id} may still be written to by {sorted(lease.writers)}")
        if not self.residents.capacity or position in lease.shared or key in self.residents:
            return False
        if len(self.residents) >= self.residents.capacity:
            slot = self.residents.evict()
            if slot is None:
                return False
            self._free.append(slot)
        self.residents.add(key, int(lease.slots[position]))
        lease.shared[position] = key
        return True

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
            for position in range(len(lease.slots) - 1, -1, -1):
                if position in lease.shared:
                    self.residents.unpin(lease.shared[position])
                else:
                    self._free.append(int(lease.slots[position]))

    def check_integrity(self) -> None:
        """Each slot is free, resident or in exactly one lease, and leases share resident slots only. Raises AssertionError."""
        resident = self.residents.slots()
        seen = [*self._free, *resident.values()]
        for lease in self._leases.values():
            seen += [slot for position, slot in enumerate(lease.slots.tolist()) if position not in lease.shared]
            for position, key in lease.shared.items():
                if resident.get(key) != lease.slots[position]:
                    raise AssertionError(f"staging: lease {lease.lease_id} shares slot {lease.slots[position]}, but the block is elsewhere")
        if sorted(seen) != list(range(self.total_slots)):
            raise AssertionError(f"staging: {len(seen)} slots accounted for, {self.total_slots} exist, {len(set(seen))} distinct")
        self.residents.check_integrity(key for lease in self._leases.values() for key in lease.shared.values())
