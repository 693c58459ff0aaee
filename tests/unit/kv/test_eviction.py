"""What a full store gives up: the least recently used ends of chains, never a middle."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from dualpath_ray.kv.eviction import plan_eviction, unrooted
from dualpath_ray.kv.keys import ROOT_TAG

ROOT = ROOT_TAG + bytes(12)


@dataclass(frozen=True)
class Block:
    key: bytes
    parent: bytes
    used_at: float
    nbytes: int = 10


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def chain(start: int, times: list[float], parent: bytes = ROOT) -> list[Block]:
    blocks = []
    for number, used_at in enumerate(times, start):
        blocks.append(Block(name(number), parent, used_at))
        parent = name(number)
    return blocks


def victims(blocks: list[Block], excess: int) -> list[int]:
    return [int.from_bytes(blocks[number].key, "big") for number in plan_eviction(blocks, excess, -1.0).victims]


def test_the_chain_used_least_recently_goes_from_its_end() -> None:
    blocks = chain(1, [5, 5, 5]) + chain(10, [3, 3, 3])
    assert victims(blocks, 20) == [12, 11]
    assert victims(blocks, 41) == [12, 11, 10, 3, 2]
    assert victims(blocks, 0) == []


def test_a_use_of_a_child_is_a_use_of_its_parents() -> None:
    """Parents may have been served from memory, where the store saw no use."""
    assert victims(chain(1, [1, 2, 9]) + chain(10, [5]), 10) == [10]


def test_a_shared_prefix_outlives_its_colder_branch() -> None:
    stem = chain(1, [1, 1])
    blocks = stem + chain(10, [8], stem[-1].key) + chain(20, [4, 4], stem[-1].key)
    assert victims(blocks, 50) == [21, 20, 10, 2, 1]


def test_orphans_go_first_once_they_are_old() -> None:
    blocks = chain(1, [1.0]) + chain(10, [5.0, 6.0], parent=name(99)) + chain(20, [8.0], parent=name(98))
    plan = plan_eviction(blocks, 0, orphaned_before=7.0)
    assert [blocks[number].key for number in plan.orphans] == [name(11), name(10)]
    assert plan.victims == ()
    assert unrooted(blocks) == [False, True, True, True]
    assert plan_eviction(blocks, 20, orphaned_before=7.0).victims == (), "what orphans free needs no victims"


def test_a_claimed_circle_is_an_orphan() -> None:
    blocks = [Block(name(1), name(2), 1.0), Block(name(2), name(1), 2.0)]
    assert len(plan_eviction(blocks, 0, orphaned_before=5.0).orphans) == 2


@pytest.mark.parametrize("seed", range(30))
def test_every_prefix_of_the_order_leaves_whole_chains(seed: int) -> None:
    """On random forests: whatever was removed before a crash, no block is left whose parent is gone."""
    choice = random.Random(seed)
    blocks: list[Block] = []
    for number in range(1, 120):
        parent = choice.choice(blocks).key if blocks and choice.random() < 0.85 else ROOT
        blocks.append(Block(name(number), parent, choice.randrange(20)))
    choice.shuffle(blocks)
    order = plan_eviction(blocks, 10 * len(blocks), -1.0).victims
    assert sorted(order) == list(range(len(blocks)))
    present = {block.key for block in blocks}
    for number in order:
        present.discard(blocks[number].key)
        assert all(block.parent in present or block.parent == ROOT for block in blocks if block.key in present)
    # and it is the least recently used that went: nothing that stays was used, itself or below, before something that went
    half = 10 * (len(blocks) // 2)
    gone = set(plan_eviction(blocks, half, -1.0).victims)
    children: dict[bytes, list[Block]] = {}
    for block in blocks:
        children.setdefault(block.parent, []).append(block)

    def used(block: Block) -> float:
        return max([block.used_at, *(used(child) for child in children.get(block.key, []))])

    latest_gone = max(used(blocks[number]) for number in gone)
    assert all(used(block) >= latest_gone for number, block in enumerate(blocks) if number not in gone)
