"""Bytes that change on their way: an emulation, within one process, of memory or a network that damages them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

from dualpath_ray.transfer.push import Push
from dualpath_ray.transfer.push_queue import PushQueue


def damage_pushes(monkeypatch: pytest.MonkeyPatch, hit: Callable[[Push], bool]) -> list[Push]:
    """Flip a bit in the receiver's memory whenever the last piece of a push that `hit` chooses has landed. Returns those hit so far."""
    damaged: list[Push] = []
    landed = PushQueue._piece_landed

    def piece_landed(self: PushQueue, posted) -> None:  # type: ignore[no-untyped-def]
        push = posted.push
        if push.pieces_left == 1 and hit(push):
            region = posted.links._peers[push.peer].region(push.remote)
            group, place = divmod(int(push.remote_blocks[-1]), region.group_blocks)
            byte = ctypes.c_uint8.from_address(region.base + group * region.group_stride + place * region.block_bytes + 3)
            byte.value ^= 0x40  # the exponent of the block's first float32
            damaged.append(push)
        landed(self, posted)

    monkeypatch.setattr(PushQueue, "_piece_landed", piece_landed)
    return damaged
