"""Pushes on their way out of an endpoint: cut into pieces, posted most urgent first, looked after until they have landed."""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dualpath_ray.errors import DualPathError, TransferError
from dualpath_ray.transfer import messages
from dualpath_ray.transfer.endpoint_settings import EndpointSettings, EndpointStats
from dualpath_ray.transfer.lanes import Lanes
from dualpath_ray.transfer.links import Links
from dualpath_ray.transfer.memory import Region
from dualpath_ray.transfer.push import Blocks, Push
from dualpath_ray.transfer.verification import digest

log = logging.getLogger(__name__)

LANDING_S = 1.0


@dataclass(slots=True, eq=False)
class _Posted:
    push: Push
    links: Links
    handle: Any
    nbytes: int


class PushQueue:
    """On the endpoint's thread. `on_end(push)` is called when no byte of a push is under way any more; `push.error` says how it ended."""

    def __init__(
        self,
        lanes: Lanes,
        regions: Mapping[str, Region],
        settings: EndpointSettings,
        stats: EndpointStats,
        on_end: Callable[[Push], None],
    ) -> None:
        self._lanes, self._regions = lanes, regions
        self._settings, self._stats, self._on_end = settings, stats, on_end
        self._waiting: list[tuple[int, int, Push, Blocks, Blocks]] = []  # heap of pieces by (priority, arrival)
        self._arrival = itertools.count()
        self._posted: list[_Posted] = []

    @property
    def empty(self) -> bool:
        return not self._waiting and not self._posted

    @property
    def any_posted(self) -> bool:
        """Something is under way that must be looked after."""
        return bool(self._posted)

    def add(self, push: Push) -> None:
        push.deadline = time.monotonic() + self._settings.push_timeout_s
        per_piece = max(1, self._settings.max_post_bytes // self._regions[push.local].block_bytes)
        starts = range(0, len(push.local_blocks), per_piece)
        push.pieces_left = len(starts)
        push.attached = len(starts) == 1 and not self._settings.verify
        if not push.pieces_left:
            self._on_end(push)
        for start in starts:
            piece = slice(start, start + per_piece)
            entry = (push.priority, next(self._arrival), push, push.local_blocks[piece], push.remote_blocks[piece])
            heapq.heappush(self._waiting, entry)

    def post(self) -> int:
        """Post the most urgent piece, if any; one at a time, since a same-host push copies its bytes inside the call."""
        if not self._waiting:
            return 0
        _, _, push, local_blocks, remote_blocks = heapq.heappop(self._waiting)
        if push.error is None and time.monotonic() > push.deadline:
            push.error = self._overdue(push)
        if push.error is not None:
            self._piece_ended(push, push.error)
            return 1
        start = time.perf_counter()
        links = self._lanes.to(push.peer, push.traffic)
        handle = None
        try:
            if push.before is not None:
                push.before()
                push.before = None
                start = time.perf_counter()
            remote = links.remote(push.peer, push.remote)
            local = self._regions[push.local]
            if self._settings.verify and push.digest is None and local.kind == links.kind(push.peer, push.remote) == "DRAM":
                push.digest = digest(local, push.local_blocks)
            notice = messages.encode(push.message) if push.attached and push.message is not None else b""
            handle = links.agent.make_prepped_xfer("WRITE", links.local(push.local), local_blocks, remote, remote_blocks, notice)
            state = links.agent.transfer(handle)
        except Exception as error:
            if handle is not None:
                links.release(handle)
            self._piece_ended(push, self._lanes.failed(push.peer, push.traffic, error))
            return 1
        finally:
            self._stats.push_seconds += time.perf_counter() - start
        posted = _Posted(push, links, handle, len(local_blocks) * self._regions[push.local].block_bytes)
        if state == "DONE":
            self._piece_landed(posted)
        else:
            self._posted.append(posted)
        return 1

    def check(self) -> int:
        """Look after posted pieces; returns how many ended."""
        ended = 0
        now = time.monotonic() if self._posted else 0.0
        for posted in list(self._posted):
            if posted.links.is_dead(posted.push.peer):
                self._posted.remove(posted)
                posted.links.release(posted.handle)
                self._piece_ended(posted.push, TransferError(f"{posted.push.peer} died"))
                ended += 1
                continue
            try:
                state = posted.links.agent.check_xfer_state(posted.handle)
            except Exception as error:
                self._posted.remove(posted)
                posted.links.release(posted.handle)
                self._piece_ended(posted.push, self._lanes.failed(posted.push.peer, posted.push.traffic, error))
                ended += 1
                continue
            if state == "DONE":
                self._posted.remove(posted)
                self._piece_landed(posted)
                ended += 1
            elif now > posted.push.deadline and posted.push.error is None:
                # It cannot be taken back: bytes may land until NIXL says that it has ended, or the peer is known to be dead.
                posted.push.error = self._overdue(posted.push)
                log.warning("%s", posted.push.error)
        return ended

    def abandon(self, error: DualPathError) -> None:
        """The endpoint closes: end everything with `error`.

        What is under way gets a moment to land: UCX aborts the process when its worker is destroyed in the middle of a copy.
        """
        for _, _, push, _, _ in self._waiting:
            self._piece_ended(push, error)
        self._waiting.clear()
        deadline = time.monotonic() + LANDING_S
        while self._posted and time.monotonic() < deadline:
            if not self.check():
                time.sleep(self._settings.busy_poll_s)
        for posted in self._posted:
            posted.links.release(posted.handle)
            self._piece_ended(posted.push, error)
        self._posted.clear()

    def _overdue(self, push: Push) -> TransferError:
        return TransferError(f"a push to {push.peer} did not end within {self._settings.push_timeout_s} s")

    def _piece_landed(self, posted: _Posted) -> None:
        posted.links.release(posted.handle)
        self._lanes.landed(posted.push.traffic, posted.push.peer)
        self._stats.pushed_bytes[posted.push.kind] += posted.nbytes
        self._piece_ended(posted.push, None)

    def _piece_ended(self, push: Push, error: DualPathError | None) -> None:
        push.error = push.error or error
        push.pieces_left -= 1
        if push.pieces_left == 0:
            self._on_end(push)
