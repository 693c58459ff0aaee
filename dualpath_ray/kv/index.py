"""Which blocks can be read from storage: a trie whose nodes are Full Blocks (paper section A.5).

Keys are chained, so a set of keys with their parents *is* the trie, and the longest match of a prompt is the run of its leading keys
that are present. The index is soft state: gateways push what they have made durable, and a scan of the store rebuilds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BlockIndex:
    """Durable blocks by key. Not thread-safe."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}
        self._children: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def __contains__(self, key: bytes) -> bool:
        return key in self._parents

    def add(self, blocks: Iterable[tuple[bytes, bytes]]) -> None:
        """Add (key, parent) pairs; known keys are left alone."""
        for key, parent in blocks:
            if key not in self._parents:
                self._parents[key] = parent
                self._children[parent] = self._children.get(parent, 0) + 1

    def remove(self, keys: Iterable[bytes]) -> None:
        """Forget blocks. Their descendants stay, unreachable until the block is stored again."""
        for key in keys:
            parent = self._parents.pop(key, None)
            if parent is None:
                continue
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]

    def longest_match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are present."""
        for position, key in enumerate(keys):
            if key not in self._parents:
                return position
        return len(keys)

    def is_leaf(self, key: bytes) -> bool:
        """Whether no present block continues this one (only leaves may be evicted)."""
        return key not in self._children
