"""Comparing pushed bytes where they have landed with those that were sent (`transfer.verify`).

The sender hashes the Layer Blocks of a push right before it posts them. When they have landed it asks the receiver, which hashes its own
memory and answers; only then is the push done, and only if both agree does its message count as arrived. So whatever waits for a push
(a layer's gate, a lease, a delivery) waits for the comparison without knowing of it. Bytes that differ are counted and pushed again;
when that does not help the push has failed, and the request is planned anew.
"""

from __future__ import annotations

import ctypes
import itertools
import time
from collections.abc import Callable, Mapping

import numpy as np
import xxhash

from dualpath_ray.errors import TransferError
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer import messages
from dualpath_ray.transfer.endpoint_settings import EndpointStats
from dualpath_ray.transfer.memory import Region
from dualpath_ray.transfer.messages import Message, Verified, Verify
from dualpath_ray.transfer.push import Blocks, Push

MAX_PUSHES = 3  # of the same bytes


def digest(region: Region, blocks: Blocks) -> bytes:
    """XXH3-128 of these Layer Blocks of our own DRAM, one after the other. Raises IndexError for a block outside the region."""
    if region.kind != "DRAM":
        raise ValueError(f"region {region.name!r} is not in this host's memory")
    if len(blocks) and not 0 <= blocks.min() <= blocks.max() < region.blocks:
        raise IndexError(f"region {region.name!r} has blocks 0 to {region.blocks - 1}")
    memory = memoryview((ctypes.c_uint8 * region.nbytes).from_address(region.base))
    groups, places = np.divmod(blocks.astype(np.int64), region.group_blocks)
    hasher = xxhash.xxh3_128()
    for start in (groups * region.group_stride + places * region.block_bytes).tolist():
        hasher.update(memory[start : start + region.block_bytes])
    return hasher.digest()


class Verification:
    """One per endpoint, on its thread. `again(push)` posts it once more; `ended(push)` is called once for each."""

    def __init__(
        self,
        regions: Mapping[str, Region],
        stats: EndpointStats,
        send: Callable[[str, Message, TrafficClass], None],
        again: Callable[[Push], None],
        ended: Callable[[Push], None],
    ) -> None:
        self._regions, self._stats = regions, stats
        self._send, self._again, self._ended = send, again, ended
        self._numbers = itertools.count(1)
        self._asked: dict[int, Push] = {}

    def landed(self, push: Push) -> None:
        """NIXL has moved the bytes of a push that carries a digest: have them compared, or end it if it failed."""
        if push.error is not None or push.digest is None:
            self._ended(push)
            return
        number = next(self._numbers)
        self._asked[number] = push
        message = b"" if push.message is None else messages.encode(push.message)
        self._send(push.peer, Verify(number, push.remote, push.remote_blocks.tobytes(), push.digest, message), push.traffic)

    def compare(self, sender: str, question: Verify) -> Message | None:
        """The receiver's part: answers `sender`, and returns the push's message if its bytes are here. Raises for a senseless question."""
        blocks = np.frombuffer(question.blocks, dtype=np.int32)
        same = digest(self._regions[question.region], blocks) == question.digest
        self._send(sender, Verified(question.number, same), TrafficClass.KV_READ)
        return messages.decode(question.message) if same and question.message else None

    def answered(self, sender: str, answer: Verified) -> None:
        push = self._asked.get(answer.number)
        if push is None or push.peer != sender:
            return
        del self._asked[answer.number]
        if answer.same:
            self._stats.verified_pushes += 1
            self._ended(push)
            return
        self._stats.mismatched_pushes += 1
        push.mismatches += 1
        if push.mismatches < MAX_PUSHES:
            self._again(push)
        else:
            push.error = TransferError(f"bytes pushed to {push.peer} arrived damaged, {push.mismatches} times")
            self._ended(push)

    def expire(self) -> None:
        """Pushes whose receiver does not answer have failed: nothing of them is under way."""
        if not self._asked:
            return
        now = time.monotonic()
        self._fail([number for number, push in self._asked.items() if now > push.deadline], "was not confirmed in time")

    def peer_died(self, agent: str) -> None:
        self._fail([number for number, push in self._asked.items() if push.peer == agent], "was not confirmed before the peer died")

    def close(self) -> None:
        self._fail(list(self._asked), "was not confirmed before the endpoint closed")

    def _fail(self, numbers: list[int], why: str) -> None:
        for number in numbers:
            push = self._asked.pop(number)
            push.error = TransferError(f"a push to {push.peer} {why}")
            self._ended(push)
