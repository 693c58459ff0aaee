"""Slots are lent once at a time, and come back only when nobody can write to them any more."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dualpath_ray.errors import StaleEpochError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.staging import Lease, StagingBuffer
from dualpath_ray.transfer.memory import PAGE_BYTES

GEOMETRY = KVGeometry(layers=3, kv_heads=1, head_dim=8, block_tokens=4)
SLOTS = 6
WRITERS = ("w0", "w1", "w2")


def test_slots_start_on_pages_and_do_not_overlap() -> None:
    staging = StagingBuffer(GEOMETRY, SLOTS)
    for slot in range(SLOTS):
        view = staging.slot(slot)
        assert view.nbytes == GEOMETRY.full_block_bytes
        assert view.ctypes.data % PAGE_BYTES == 0
        view[:] = slot + 1
    for slot in range(SLOTS):
        assert (staging.slot(slot) == slot + 1).all()


def test_the_region_describes_every_layer_block_of_every_slot() -> None:
    staging = StagingBuffer(GEOMETRY, SLOTS)
    rows = staging.region.descriptors()
    addresses = [int(row[0] + np.uint64(i) * row[3]) for row in rows for i in range(int(row[4]))]
    expected = [
        staging.slot(slot).ctypes.data + layer * GEOMETRY.layer_block_bytes for slot in range(SLOTS) for layer in range(GEOMETRY.layers)
    ]
    assert addresses == expected


def test_more_slots_than_are_free_are_not_granted() -> None:
    staging = StagingBuffer(GEOMETRY, SLOTS)
    staging.grant("owner", "r", SLOTS - 1, frozenset())
    assert staging.can_grant(1) and not staging.can_grant(2)
    with pytest.raises(ValueError, match="2 slots wanted, 1 free"):
        staging.grant("owner", "r", 2, frozenset())
    staging.check_integrity()
    assert staging.free_slots == 1


def test_a_released_lease_waits_for_its_writers_and_holds() -> None:
    staging = StagingBuffer(GEOMETRY, SLOTS)
    lease = staging.grant("owner", "r", 2, frozenset({"w0", "w1"}))
    staging.hold(lease)
    staging.release(lease)
    assert staging.writer_done(lease.lease_id, "w0") is lease
    staging.unhold(lease)
    assert staging.free_slots == SLOTS - 2
    staging.writer_done(lease.lease_id, "w1", "died")
    assert staging.free_slots == SLOTS
    assert lease.write_errors == ["w1: died"]


def test_strangers_and_repetitions_do_not_end_a_lease() -> None:
    staging = StagingBuffer(GEOMETRY, SLOTS)
    lease = staging.grant("owner", "r", 2, frozenset({"w0", "w1"}))
    staging.release(lease)
    assert staging.writer_done(lease.lease_id, "stranger", "an error") is None
    staging.writer_done(lease.lease_id, "w0")
    assert staging.writer_done(lease.lease_id, "w0", "an error") is None
    assert staging.free_slots == SLOTS - 2
    assert not lease.write_errors


def test_what_is_free_again_cannot_be_held() -> None:
    """Whoever comes late would read slots that are another request's by now."""
    staging = StagingBuffer(GEOMETRY, SLOTS)
    lease = staging.grant("owner", "r", 2, frozenset())
    staging.release(lease)
    with pytest.raises(StaleEpochError, match="lease 1"):
        staging.hold(lease)


class StagingMachine(RuleBasedStateMachine):
    """All interleavings of what a gateway does with leases, against a reference that keeps each lease's debts apart."""

    leases: Bundle[Lease] = Bundle("leases")
    held: Bundle[Lease] = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.staging = StagingBuffer(GEOMETRY, SLOTS)
        self.given: list[Lease] = []
        self.writers: dict[int, set[str]] = {}
        self.holds: dict[int, int] = {}
        self.released: set[int] = set()

    def busy(self, lease: Lease) -> bool:
        number = lease.lease_id
        return number not in self.released or bool(self.writers[number]) or self.holds[number] > 0

    @rule(target=leases, blocks=st.integers(0, SLOTS), writers=st.frozensets(st.sampled_from(WRITERS)))
    def grant(self, blocks: int, writers: frozenset[str]) -> object:
        taken = {int(slot) for lease in self.given if self.busy(lease) for slot in lease.slots}
        assert self.staging.can_grant(blocks) == (blocks <= SLOTS - len(taken))
        if not self.staging.can_grant(blocks):
            with pytest.raises(ValueError, match="slots wanted"):
                self.staging.grant("owner", "r", blocks, writers)
            return None
        lease = self.staging.grant("owner", "r", blocks, writers)
        assert len(lease.slots) == blocks
        assert not taken & set(lease.slots.tolist()), "a slot was lent twice"
        assert lease.lease_id not in self.writers, "lease ids are never used twice"
        self.given.append(lease)
        self.writers[lease.lease_id], self.holds[lease.lease_id] = set(writers), 0
        return lease

    @rule(lease=leases, agent=st.sampled_from((*WRITERS, "stranger")), error=st.sampled_from([None, "broken"]))
    def writer_done(self, lease: object, agent: str, error: str | None) -> None:
        """Also late ones, repeated ones and those of strangers."""
        if isinstance(lease, Lease):
            expected = agent in self.writers[lease.lease_id]
            assert (self.staging.writer_done(lease.lease_id, agent, error) is lease) == expected
            self.writers[lease.lease_id].discard(agent)

    @rule(agent=st.sampled_from(WRITERS))
    def writer_died(self, agent: str) -> None:
        for lease in self.staging.leases:
            self.staging.writer_done(lease.lease_id, agent, "died")
        for writers in self.writers.values():
            writers.discard(agent)

    @rule(target=held, lease=leases)
    def hold(self, lease: object) -> object:
        if not isinstance(lease, Lease):
            return None
        if not self.busy(lease):
            with pytest.raises(StaleEpochError):
                self.staging.hold(lease)
            return None
        self.staging.hold(lease)
        self.holds[lease.lease_id] += 1
        return lease

    @rule(lease=consumes(held))
    def unhold(self, lease: object) -> None:
        if isinstance(lease, Lease):
            self.holds[lease.lease_id] -= 1
            self.staging.unhold(lease)

    @rule(lease=leases)
    def release(self, lease: object) -> None:
        if isinstance(lease, Lease):
            self.released.add(lease.lease_id)
            self.staging.release(lease)

    @invariant()
    def books_balance(self) -> None:
        self.staging.check_integrity()
        busy = [lease for lease in self.given if self.busy(lease)]
        assert set(self.staging.leases) == set(busy)
        assert self.staging.free_slots == SLOTS - sum(len(lease.slots) for lease in busy)


StagingMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestStagingMachine = StagingMachine.TestCase
