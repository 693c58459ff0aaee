"""Decode engines that step in lockstep."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil

from dualpath_ray.simulation.curves import DecodeCurve
from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.round_state import RoundState

ENTRY_STEPS = 1.9  # between a request's KV being in HBM and the boundary it joins at (half a step more in the mean); Oracle's second token


class DecodeGroup:
    """Continuous batching with an event only at the boundaries between steps at which a request joins or leaves.

    All engines of the group share a counter of steps. A request that must make k more tokens leaves k boundaries after the one it joined
    at. The step time is constant between events, so nothing else need be computed. Contexts are counted with half of the tokens to be
    generated, their mean over the request's life.
    """

    def __init__(
        self, engines: Sequence[str], room: int, curve: DecodeCurve, loop: EventLoop, finished: Callable[[RoundState], None]
    ) -> None:
        self._curve = curve
        self._loop = loop
        self._finished = finished
        self._index = {engine: i for i, engine in enumerate(engines)}
        self._context = [0.0] * len(engines)
        self._free = [room] * len(engines)
        self._waiting: list[deque[RoundState]] = [deque() for _ in engines]
        self.full_s = 0.0  # time in which a request waited for memory
        self._queued = 0
        self._requests = 0
        self.step_s = curve.seconds(0, 0)
        self._step = 0  # the last boundary with an event, and when it was
        self._since = 0.0
        self._joining: dict[int, list[RoundState]] = {}
        self._leaving: dict[int, list[RoundState]] = {}
        self._busy: list[int] = []  # heap of the boundaries that have one or the other
        self._next = 0  # the one that the pending event is for, 0: none

    def join(self, state: RoundState) -> None:
        """The request's KV is in HBM. It makes its remaining tokens (all but the first, which prefill made), as soon as its engine has the
        memory.
        """
        boundary = self._step + ceil((self._loop.now - self._since) / self.step_s + ENTRY_STEPS)
        self._put(self._joining, boundary, state)
        if not self._next or boundary < self._next:
            self._await(boundary)

    def _put(self, agenda: dict[int, list[RoundState]], boundary: int, state: RoundState) -> None:
        states = agenda.get(boundary)
        if states is not None:
            states.append(state)
            return
        agenda[boundary] = [state]
        heapq.heappush(self._busy, boundary)

    def _await(self, boundary: int) -> None:
        self._next = boundary
        self._loop.at(self._since + (boundary - self._step) * self.step_s, self._boundary, boundary)

    def _boundary(self, boundary: int) -> None:
        """Requests leave and join. An event that was overtaken by an earlier one finds another boundary next, or another time for it."""
        now = self._loop.now
        if boundary != self._next or now < self._since + (boundary - self._step) * self.step_s:
            return
        if self._queued:
            self.full_s += now - self._since
        self._step, self._since = boundary, now
        while self._busy and self._busy[0] == boundary:
            heapq.heappop(self._busy)
        done = self._leaving.pop(boundary, ())
        for state in done:
            self._release(state)
        for state in self._joining.pop(boundary, ()):
            self._waiting[self._engine(state)].append(state)
            self._queued += 1
            self._admit(self._engine(state))
        self.step_s = self._curve.seconds(self._requests / len(self._context), max(self._context))
        self._next = 0
        if self._busy:
            self._await(self._busy[0])
        for state in done:
            self._finished(state)

    def _engine(self, state: RoundState) -> int:
        if state.assignment is None:
            raise ValueError(f"request {state.request_id} decodes without an assignment")
        return self._index[state.assignment.decode_engine]

    def _admit(self, engine: int) -> None:
        waiting = self._waiting[engine]
        while waiting and self._free[engine] >= waiting[0].prompt + waiting[0].generate:
            state = waiting.popleft()
            self._queued -= 1
            state.second_token = self._loop.now + self.step_s
            self._put(self._leaving, self._step + state.generate - 1, state)
            self._requests += 1
            self._free[engine] -= state.prompt + state.generate
            self._context[engine] += state.prompt + state.generate / 2

    def _release(self, state: RoundState) -> None:
        engine = self._engine(state)
        self._requests -= 1
        self._free[engine] += state.prompt + state.generate
        self._context[engine] -= state.prompt + state.generate / 2
        if self._waiting[engine]:
            self._admit(engine)
