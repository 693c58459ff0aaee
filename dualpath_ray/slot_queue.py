"""Who gets a gateway's staging slots next: in order of asking, prompts and draining leases (`LeaseRequest.draining`) each in a line of
their own.

A few slots are kept free of prompts, so that blocks can always leave a decode pool: prompts in staging may be waiting for just those pool
blocks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass

from dualpath_ray.errors import CancelledError, DeadlineExceededError, OverloadedError
from dualpath_ray.kv.staging import StagingBuffer
from dualpath_ray.messages import LeaseRequest

DRAIN_SLOTS = 8  # kept free of prompts, at most a quarter of the arena


@dataclass(slots=True, eq=False)
class _Waiter:
    request: LeaseRequest
    turn: asyncio.Future[None]


class SlotQueue:
    """Used on the gateway's event loop. Whoever frees slots must call `serve`."""

    def __init__(self, staging: StagingBuffer, max_waiting: int) -> None:
        self._staging, self._max_waiting = staging, max_waiting
        self._lines: dict[bool, deque[_Waiter]] = {False: deque(), True: deque()}  # by draining
        self._keep = min(DRAIN_SLOTS, staging.total_slots // 4)

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    async def wait(self, request: LeaseRequest) -> None:
        """Return when `staging.grant` will succeed, to be called before anything else is awaited.

        Raises OverloadedError if too many wait already, DeadlineExceededError if no slots came free in time, CancelledError if the request
        was withdrawn meanwhile.
        """
        line = self._lines[request.draining]
        if not line and not self._turn_pending() and self._can_grant(request):
            return
        if len(line) >= self._max_waiting:
            raise OverloadedError(f"{len(line)} requests wait for staging slots already")
        loop = asyncio.get_running_loop()
        waiter = _Waiter(request, loop.create_future())
        line.append(waiter)
        try:
            await asyncio.wait_for(waiter.turn, request.timeout_s)
        except TimeoutError:
            raise DeadlineExceededError(f"no {request.blocks} staging slots came free within {request.timeout_s:.1f} s") from None
        finally:
            line.remove(waiter)
            loop.call_soon(self.serve)

    def withdraw(self, request_id: str) -> None:
        """A waiting prompt needs its slots no longer."""
        for waiter in self._lines[False]:
            if waiter.request.request_id == request_id and not waiter.turn.done():
                waiter.turn.set_exception(CancelledError(f"request {request_id} was withdrawn"))

    def serve(self) -> None:
        """Wake a line's first waiter if its slots are there. It stays first until it has taken them, so nobody overtakes it."""
        if self._turn_pending():
            return
        for draining in (True, False):
            line = self._lines[draining]
            if line and self._can_grant(line[0].request):
                line[0].turn.set_result(None)
                return

    def _turn_pending(self) -> bool:
        """A waiter has been woken and has not taken its slots yet."""
        return any(line and line[0].turn.done() for line in self._lines.values())

    def _can_grant(self, request: LeaseRequest) -> bool:
        return self._staging.can_grant(request.blocks, 0 if request.draining else self._keep, request.load_keys)
