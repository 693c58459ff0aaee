"""Which blocks a full store gives up: those whose chain was used least recently, children before their parents.

A use of a block is a use of everything it continues, so a block counts as used when any of its descendants was. Ordered by that time, and
by depth where it is equal, every prefix of the order leaves whole chains: what is cut off is always their end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dualpath_ray.kv.keys import is_root


class Block(Protocol):
    """What is asked of a block. Times in seconds, by one clock."""

    @property
    def key(self) -> bytes: ...
    @property
    def parent(self) -> bytes: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def used_at(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """Positions in the sequence of blocks, in the order in which they must be removed.

    `orphans` hang on a block that is not there, and have hung there unused for long; `victims` make room.
    """

    orphans: tuple[int, ...]
    victims: tuple[int, ...]


def plan_eviction(blocks: Sequence[Block], excess_bytes: int, orphaned_before: float) -> Plan:
    """Remove orphans last used before `orphaned_before`, then victims until `excess_bytes` are freed by both together."""
    place = {block.key: number for number, block in enumerate(blocks)}
    parents = np.fromiter((place.get(block.parent, -1) for block in blocks), dtype=np.int64, count=len(blocks))
    order, depth, rooted = _walk(blocks, parents)
    used = np.fromiter((block.used_at for block in blocks), dtype=np.float64, count=len(blocks))
    for number in reversed(order):
        parent = parents[number]
        if depth[number] and used[number] > used[parent]:
            used[parent] = used[number]
    coldest_first = np.lexsort((-depth, used))
    orphans = tuple(number for number in coldest_first.tolist() if not rooted[number] and used[number] < orphaned_before)
    excess_bytes -= sum(blocks[number].nbytes for number in orphans)
    gone, victims = set(orphans), []
    for number in coldest_first.tolist():
        if excess_bytes <= 0:
            break
        if number not in gone:
            victims.append(number)
            excess_bytes -= blocks[number].nbytes
    return Plan(orphans, tuple(victims))


def unrooted(blocks: Sequence[Block]) -> list[bool]:
    """For each block, whether a lookup cannot reach it: somewhere above it a block is missing."""
    place = {block.key: number for number, block in enumerate(blocks)}
    parents = np.fromiter((place.get(block.parent, -1) for block in blocks), dtype=np.int64, count=len(blocks))
    return [not value for value in _walk(blocks, parents)[2]]


def _walk(blocks: Sequence[Block], parents: np.ndarray) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Blocks with parents before children, their depths below the top of their chain, and whether that top is a tenant's first block.

    Keys are digests of their parents', so there are no circles; blocks that claim one are left at depth 0, unreachable.
    """
    children: dict[int, list[int]] = {}
    order: list[int] = []
    depth = np.zeros(len(blocks), dtype=np.int64)
    rooted = np.zeros(len(blocks), dtype=np.bool_)
    for number, parent in enumerate(parents.tolist()):
        if parent < 0:
            order.append(number)
            rooted[number] = is_root(blocks[number].parent)
        else:
            children.setdefault(parent, []).append(number)
    for number in order:  # grows while it is gone through
        for child in children.get(number, ()):
            depth[child], rooted[child] = depth[number] + 1, rooted[number]
            order.append(child)
    return order, depth, rooted


def total_bytes(blocks: Iterable[Block]) -> int:
    return sum(block.nbytes for block in blocks)
