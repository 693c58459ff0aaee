"""What a place holds in all, whoever's blocks they are: the view of those who keep it in order (collector, `dualpath store`).

A BlockStore serves one model; an inventory lists, checks and removes the blocks of every model below one directory or prefix, because they
share its room. It is made for few, long calls on a thread of the caller's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """A block as it lies there. `nbytes` is the room it takes, `used_at` seconds since the epoch by the storage's clock."""

    key: bytes
    parent: bytes
    nbytes: int
    used_at: float
    model: str  # fingerprint (cut to 64 bytes) and geometry, to tell models apart by


@dataclass(frozen=True, slots=True)
class Usage:
    """How full the place was when it was last gone through. `number` counts publications up."""

    number: int
    nbytes: int
    blocks: int
    at: float

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Usage | None:
        """None for what no Usage of this release is."""
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError):
            return None


class Inventory(Protocol):
    """Methods raise StoreError when the storage fails. Several processes may use one place, through inventories of their own."""

    @property
    def name(self) -> str:
        """The place, for people."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every sound block; counts others in `damaged`."""
        ...

    @property
    def damaged(self) -> int:
        """Files or objects that `entries` found under a block's name without a block's header."""
        ...

    def used_since(self, entry: Entry) -> bool:
        """Whether the block was used after it was listed, as far as can be told."""
        ...

    def remove(self, entries: Sequence[Entry]) -> int:
        """Remove blocks; returns how many were there."""
        ...

    def sweep(self, age_s: float) -> int:
        """Remove what crashed writers left behind, and damaged blocks, older than `age_s`; returns how many."""
        ...

    def content(self, entry: Entry) -> bytes:
        """A whole block with its header. Raises BlockMissingError if it is gone."""
        ...

    def put_aside(self, entry: Entry) -> None:
        """Take a damaged block out of service."""
        ...

    def collecting(self) -> AbstractContextManager[bool]:
        """Within it, this process is the only one that collects, if the value is true."""
        ...

    def now(self) -> float:
        """The storage's clock."""
        ...

    def publish(self, usage: Usage) -> None: ...
    def usage(self) -> Usage | None: ...

    def note_written(self, writer: str, number: int, nbytes: int) -> None:
        """Say that `writer` has written so much since publication `number`."""
        ...

    def written_by_others(self, writer: str, number: int) -> int:
        """What the other writers said last about that publication."""
        ...
