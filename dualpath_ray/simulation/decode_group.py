"""Decode engines that step in lockstep."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence

from dualpath_ray.simulation.curves import DecodeCurve
from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.round_state import RoundState


class DecodeGroup:
    """Continuous batching without an event per step.

    All engines of the group share a step counter that advances at 1 / step time; a request that must make k more tokens leaves when the
    counter has advanced by k. The step time changes only when a request joins or leaves. Contexts are counted with half of the tokens to
    be generated, their mean over the request's life.
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
        self._steps = 0.0
        self._since = 0.0
        self.step_s = curve.seconds(0, 0)
        self._leaving: list[tuple[float, int, RoundState]] = []
        self._joined = 0
        self._version = 0

    def join(self, state: RoundState) -> None:
        """The request makes its remaining tokens (all but the first, which prefill made), as soon as its engine has the memory."""
        self._advance()
        engine = self._engine(state)
        self._waiting[engine].append(state)
        self._queued += 1
        self._admit(engine)
        self._reschedule()

    def _engine(self, state: RoundState) -> int:
        if state.assignment is None:
            raise ValueError(f"request {state.request_id} decodes without an assignment")
        return self._index[state.assignment.decode_engine]

    def _admit(self, engine: int) -> None:
        waiting = self._waiting[engine]
        while waiting and self._free[engine] >= waiting[0].prompt + waiting[0].generate:
            state = waiting.popleft()
            self._queued -= 1
            self._joined += 1
            state.second_token = self._loop.now + self.step_s
            heapq.heappush(self._leaving, (self._steps + state.generate - 1, self._joined, state))
            self._requests += 1
            self._free[engine] -= state.prompt + state.generate
            self._context[engine] += state.prompt + state.generate / 2

    def _release(self, state: RoundState) -> None:
        engine = self._engine(state)
        self._requests -= 1
        self._free[engine] += state.prompt + state.generate
        self._context[engine] -= state.prompt + state.generate / 2
        self._admit(engine)

    def _advance(self) -> None:
        now = self._loop.now
        if self._queued:
            self.full_s += now - self._since
        self._steps += (now - self._since) / self.step_s
        self._since = now

    def _reschedule(self) -> None:
        self.step_s = self._curve.seconds(self._requests / len(self._context), max(self._context))
        self._version += 1
        if self._leaving:
            delay = max(0.0, self._leaving[0][0] - self._steps) * self.step_s
            self._loop.at(self._loop.now + delay, self._leave, self._version)

    def _leave(self, version: int) -> None:
        if version != self._version:
            return
        self._advance()
        done: list[RoundState] = []
        while self._leaving and self._leaving[0][0] <= self._steps + 1e-6:
            state = heapq.heappop(self._leaving)[2]
            self._release(state)
            done.append(state)
        self._reschedule()
        for state in done:
            self._finished(state)
