"""Damaged pushes are found where they landed, and repeated (`transfer.verify`)."""

from __future__ import annotations

import numpy as np
import pytest

from dualpath_ray.errors import TransferError
from dualpath_ray.transfer.memory import Region, allocate
from dualpath_ray.transfer.messages import LayerLanded, StreamReady, Verify
from dualpath_ray.transfer.verification import MAX_PUSHES, digest
from tests.unit.transfer.damage import damage_pushes
from tests.unit.transfer.site import WAIT_S, sites

MESSAGE = LayerLanded(1, 2)
BLOCKS = range(40)


def test_a_digest_is_of_exactly_the_named_blocks() -> None:
    """Of slots with padding behind them, as staging has."""
    memory = allocate(4 * 1024)
    memory[:] = np.random.default_rng(1).integers(0, 256, memory.size)
    region = Region("staging", memory.ctypes.data, 256, 3, 1024, 4)
    blocks = np.array([4, 0, 11], dtype=np.int32)
    before = digest(region, blocks)
    slots = memory.reshape(4, 1024)
    for slot, start, stop in ((0, 256, 1024), (1, 0, 256), (1, 512, 1024), (2, 0, 1024), (3, 0, 512), (3, 768, 1024)):
        slots[slot, start:stop] ^= 0xFF
    assert digest(region, blocks) == before
    for slot, byte in ((0, 0), (0, 255), (1, 256), (1, 511), (3, 512), (3, 767)):
        slots[slot, byte] ^= 1
        assert digest(region, blocks) != before
        slots[slot, byte] ^= 1
    assert digest(region, blocks[::-1].copy()) != before, "order counts"
    for outside in (-1, 12):
        with pytest.raises(IndexError):
            digest(region, np.array([0, outside], dtype=np.int32))


@pytest.mark.parametrize("max_post_bytes", [1 << 20, 7 * 256])
def test_bytes_damaged_on_the_way_are_pushed_again(monkeypatch: pytest.MonkeyPatch, max_post_bytes: int) -> None:
    with sites("a", "b", verify=True, max_post_bytes=max_post_bytes) as (a, b):
        damaged = damage_pushes(monkeypatch, lambda push: not damaged)
        a.memory[:] = np.random.default_rng(1).integers(0, 256, a.memory.shape)
        b.listen(LayerLanded)
        for _ in range(2):
            assert a.push(b.name, BLOCKS, BLOCKS, message=MESSAGE).result(WAIT_S) is None
            sender, message, seen = b.next()
            assert (sender, message) == (a.name, MESSAGE)
            np.testing.assert_array_equal(seen[: len(BLOCKS)], a.memory[: len(BLOCKS)])
        assert b.arrived.empty()
        assert len(damaged) == a.endpoint.stats.mismatched_pushes == 1
        assert a.endpoint.stats.verified_pushes == 2 and a.endpoint.stats.pushes == {"memory->memory": 2}


def test_without_verification_damage_goes_unnoticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others are worth: the same damage does arrive."""
    with sites("a", "b") as (a, b):
        damaged = damage_pushes(monkeypatch, lambda push: True)
        assert a.push(b.name, BLOCKS, BLOCKS).result(WAIT_S) is None
        assert damaged and not np.array_equal(b.memory, a.memory)
        assert not a.endpoint.stats.mismatched_pushes and not a.endpoint.stats.verified_pushes


def test_bytes_that_are_damaged_each_time_fail_the_push_and_its_message_never_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    with sites("a", "b", verify=True) as (a, b):
        damaged = damage_pushes(monkeypatch, lambda push: push.message is MESSAGE)
        b.listen(LayerLanded, StreamReady)
        error = a.push(b.name, BLOCKS, BLOCKS, message=MESSAGE, lease=7).result(WAIT_S)
        assert isinstance(error, TransferError) and "damaged" in str(error)
        assert len(damaged) == a.endpoint.stats.mismatched_pushes == MAX_PUSHES
        assert a.push(b.name, BLOCKS, BLOCKS, message=StreamReady(1)).result(WAIT_S) is None
        assert b.next()[1] == StreamReady(1)
        a.settled()
        assert not a.endpoint._lease_pushes, "the lease may be given back"


def test_a_receiver_that_does_not_answer_fails_the_push_in_time() -> None:
    with sites("a", "b", verify=True, push_timeout_s=0.2) as (a, b):
        b.endpoint.on(Verify, lambda sender, question: None)
        error = a.push(b.name, BLOCKS, BLOCKS, message=MESSAGE).result(WAIT_S)
        assert isinstance(error, TransferError) and "in time" in str(error)


def test_a_receiver_that_dies_or_a_sender_that_closes_ends_what_waits_for_an_answer() -> None:
    with sites("a", "b", "c", verify=True) as (a, b, c):
        for silent in (b, c):
            silent.endpoint.on(Verify, lambda sender, question: None)
        first, second = a.push(b.name, BLOCKS, BLOCKS), a.push(c.name, BLOCKS, BLOCKS)
        a.endpoint.forget(b.name)
        assert isinstance(first.result(WAIT_S), TransferError)
        assert not second.done()
        a.endpoint.close()
        assert isinstance(second.result(WAIT_S), TransferError)


def test_senseless_questions_are_counted_and_answers_of_strangers_ignored() -> None:
    with sites("a", "b") as (a, b):
        good = np.arange(3, dtype=np.int32).tobytes()
        questions = [
            Verify(1, "nowhere", good, b"", b""),
            Verify(2, "memory", np.array([64], dtype=np.int32).tobytes(), b"", b""),
            Verify(3, "memory", np.array([-1], dtype=np.int32).tobytes(), b"", b""),
            Verify(4, "memory", b"123", b"", b""),
            Verify(5, "memory", good, digest(b.endpoint.info.region("memory"), np.arange(3, dtype=np.int32)), b"\xc1"),
        ]
        for question in questions:
            a.endpoint.send(b.name, question)
        b.listen(StreamReady)
        a.endpoint.send(b.name, StreamReady(1))
        assert b.next()[1] == StreamReady(1)
        assert b.endpoint.stats.bad_messages == len(questions)
