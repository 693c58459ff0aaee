"""S3-FIFO: what is used once leaves first, what is used again stays, and pinned keys are passed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dualpath_ray.kv.s3_fifo import S3Fifo


def key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def fill(order: S3Fifo, numbers: range) -> None:
    for number in numbers:
        order.add(key(number))


def test_a_scan_does_not_push_out_what_is_used() -> None:
    order = S3Fifo(20)
    fill(order, range(20))
    for number in range(10):
        order.touch(key(number))
    for number in range(100, 300):
        assert order.evict() is not None
        order.add(key(number))
    assert all(key(number) in order for number in range(10))


def test_what_comes_back_soon_after_it_left_is_taken_for_used() -> None:
    order = S3Fifo(20)
    fill(order, range(20))
    gone = order.evict()
    assert gone == key(0)
    order.add(gone)
    for number in range(100, 120):
        order.evict()
        order.add(key(number))
    assert gone in order


def test_pinned_keys_are_passed_over() -> None:
    order = S3Fifo(4)
    fill(order, range(4))
    order.touch(key(1))
    assert order.evict(lambda candidate: candidate != key(1)) == key(1)
    assert order.evict(lambda candidate: True) is None
    assert len(order) == 3


@given(st.integers(2, 100), st.integers(1, 100), st.booleans(), st.integers(0, 3), st.data())
def test_the_only_key_that_is_not_pinned_is_found(count: int, capacity: int, used: bool, uses: int, data: st.DataObject) -> None:
    """However often it was used, and however many pinned ones have to be passed over each time round."""
    order = S3Fifo(capacity)
    fill(order, range(count))
    if used:  # all but the last of the small queue move to the main one
        for number in range(count):
            order.touch(key(number))
        order.evict()
    free = key(data.draw(st.sampled_from([number for number in range(count) if key(number) in order])))
    for _ in range(uses):
        order.touch(free)
    assert order.evict(lambda candidate: candidate != free) == free


@given(st.lists(st.tuples(st.sampled_from(["add", "touch", "evict", "discard"]), st.integers(0, 15), st.sets(st.integers(0, 15)))))
def test_it_holds_exactly_what_was_added_and_did_not_leave(steps: list[tuple[str, int, set[int]]]) -> None:
    order, held = S3Fifo(8), set[bytes]()
    for what, number, pinned in steps:
        name = key(number)
        if what == "add" and name not in held:
            order.add(name)
            held.add(name)
        elif what == "touch" and name in held:
            order.touch(name)
        elif what == "discard":
            order.discard(name)
            held.discard(name)
        elif what == "evict":
            free = {candidate for candidate in held if int.from_bytes(candidate, "big") not in pinned}
            victim = order.evict(lambda candidate: int.from_bytes(candidate, "big") in pinned)  # noqa: B023
            assert (victim in free) if free else victim is None
            held.discard(victim or b"")
        assert len(order) == len(held) and all(name in order for name in held)
