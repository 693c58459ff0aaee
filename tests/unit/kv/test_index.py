"""The trie of durable blocks."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dualpath_ray.kv.index import BlockIndex

ROOT = b"root"
CHAIN = [(b"a", ROOT), (b"b", b"a"), (b"c", b"b")]
KEYS = [key for key, _ in CHAIN]


def test_the_longest_match_ends_at_the_first_missing_block() -> None:
    index = BlockIndex()
    assert index.longest_match(KEYS) == 0
    index.add(CHAIN[:2])
    assert index.longest_match(KEYS) == 2
    index.add(CHAIN[2:])
    assert (index.longest_match(KEYS), index.longest_match([])) == (3, 0)
    index.remove([b"b"])
    assert index.longest_match(KEYS) == 1
    assert b"c" in index and b"b" not in index


def test_a_block_that_is_stored_again_makes_its_descendants_reachable() -> None:
    index = BlockIndex()
    index.add(CHAIN)
    index.remove([b"a"])
    assert index.longest_match(KEYS) == 0
    index.add(CHAIN[:1])
    assert index.longest_match(KEYS) == 3


def test_only_blocks_without_present_children_are_leaves() -> None:
    index = BlockIndex()
    index.add([*CHAIN, (b"b2", b"a")])
    assert [index.is_leaf(key) for key in (b"a", b"b", b"c", b"b2")] == [False, False, True, True]
    index.remove([b"b"])
    assert not index.is_leaf(b"a")
    index.remove([b"b2"])
    assert index.is_leaf(b"a")


changes = st.lists(st.one_of(st.tuples(st.just("add"), st.integers(0, 5)), st.tuples(st.just("remove"), st.integers(0, 5))), max_size=40)


@settings(max_examples=40, deadline=None)
@given(changes)
def test_changes_in_any_order_and_repeated_leave_exactly_what_is_present(history: list[tuple[str, int]]) -> None:
    """Blocks 0..5 form the tree parent(n) = (n - 1) // 2; a plain set is the reference."""

    def key(n: int) -> bytes:
        return b"%d" % n

    index, present = BlockIndex(), set[int]()
    for change, n in history:
        if change == "add":
            index.add([(key(n), key((n - 1) // 2))])
            present.add(n)
        else:
            index.remove([key(n)])
            present.discard(n)
    assert len(index) == len(present)
    assert [key(n) in index for n in range(6)] == [n in present for n in range(6)]
    assert [index.is_leaf(key(n)) for n in range(6)] == [not any((child - 1) // 2 == n for child in present) for n in range(6)]
    for n in list(present):
        index.remove([key(n)])
    assert len(index) == 0
    assert not index._children, "counts of children that are gone must not pile up"
