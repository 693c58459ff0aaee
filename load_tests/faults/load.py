"""Agents that play sessions at a steady pace, and compare every token they receive with what it must be.

Each play of a session has a tenant of its own: its first turn finds nothing stored, the later ones find what was stored in between.
Turns begin at fixed times (unless the turn before has not ended), so the rate of tokens is given and an outage is made up for after it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from typing import Any

from dualpath_ray.errors import DualPathError
from dualpath_ray.requests import GenerationRequest, Generator
from load_tests.faults.reference import Session, Turn
from load_tests.faults.throughput import Throughput

LATE_S = 10.0  # a request that has not ended this long after its deadline hangs
RETRY_PAUSE_S = 0.3


@dataclass(slots=True)
class LoadStats:
    """What has happened to requests so far."""

    requests: int = 0
    answered: int = 0
    refused: int = 0  # ended with an explicit retryable error
    unclear: int = 0  # ended with any other error
    vanished: int = 0  # the client went away
    wrong_texts: int = 0
    hung_requests: int = 0
    attempts: Counter[int] = field(default_factory=Counter)  # of answered requests
    errors: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        shown = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: dict(value) if isinstance(value, Counter) else value for name, value in shown.items()}


class Load:
    """Use as a context manager on one event loop; `pause` and `resume` between faults, `vanish` to lose clients."""

    def __init__(
        self,
        routes: Sequence[Generator],
        sessions: Sequence[Session],
        agents: int,
        period_s: float,
        timeout_s: float,
        seed: int,
    ) -> None:
        self.stats, self.throughput = LoadStats(), Throughput()
        self._routes, self._sessions = routes, sessions
        self._agents, self._period_s, self._timeout_s = agents, period_s, timeout_s
        self._random = random.Random(seed)
        self._plays = itertools.count()
        self._running: set[asyncio.Task[None]] = set()
        self._may_start = asyncio.Event()
        self._may_start.set()
        self._players: list[asyncio.Task[None]] = []
        self.trouble: list[str] = []  # what was wrong, for the report

    async def __aenter__(self) -> Load:
        self._players = [asyncio.create_task(self._play(agent)) for agent in range(self._agents)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        for player in self._players:
            player.cancel()
        await asyncio.gather(*self._players, return_exceptions=True)

    @property
    def active(self) -> int:
        return len(self._running)

    async def pause(self) -> None:
        """Start no more turns, and wait for those under way (each has a deadline)."""
        self._may_start.clear()
        while self._running:
            await asyncio.wait(set(self._running), timeout=1.0)

    def resume(self) -> None:
        self._may_start.set()

    def vanish(self, share: float = 0.5) -> int:
        """Some clients go away in the middle of whatever their requests are doing. Returns how many."""
        gone = [task for task in self._running if self._random.random() < share]
        for task in gone:
            task.cancel()
        return len(gone)

    # ---- one agent

    async def _play(self, agent: int) -> None:
        await asyncio.sleep(self._period_s * agent / self._agents)
        while True:
            play = next(self._plays)
            session = self._sessions[play % len(self._sessions)]
            route = self._routes[play % len(self._routes)]
            for number, turn in enumerate(session.turns):
                await self._may_start.wait()
                began = time.monotonic()
                request = GenerationRequest(
                    f"play{play}-{number}",
                    turn.prompt,
                    len(turn.answer),
                    min_new_tokens=len(turn.answer),
                    sampling=session.sampling,
                    tenant=f"play{play}",
                    timeout=self._timeout_s,
                )
                task = asyncio.create_task(self._turn(route, request, turn))
                self._running.add(task)
                try:
                    await asyncio.wait({task})
                finally:
                    task.cancel()
                    self._running.discard(task)
                await asyncio.sleep(max(0.0, began + self._period_s - time.monotonic()))

    async def _turn(self, route: Generator, request: GenerationRequest, turn: Turn) -> None:
        """One request. Whatever becomes of it is counted."""
        stats = self.stats
        stats.requests += 1
        started = time.monotonic()
        received: list[int] = []
        try:
            async with asyncio.timeout(request.timeout + LATE_S):
                attempts = await self._receive(route, request, received)
        except asyncio.CancelledError:
            stats.vanished += 1
            self._compare(request, turn, received, whole=False)
            return
        except TimeoutError:
            stats.hung_requests += 1
            self.trouble.append(f"{request.request_id} has not ended {LATE_S:.0f} s after its deadline")
            self._compare(request, turn, received, whole=False)
            return
        except Exception as error:  # only the package's retryable errors say what to do
            retryable = isinstance(error, DualPathError) and error.retryable
            stats.refused += retryable
            stats.unclear += not retryable
            stats.errors[f"{type(error).__name__}: {error}"[:160]] += 1
            if not retryable:
                self.trouble.append(f"{request.request_id} failed without a way out: {error!r}")
            self._compare(request, turn, received, whole=False)
            return
        stats.answered += 1
        stats.attempts[attempts] += 1
        stats.slowest_s = max(stats.slowest_s, time.monotonic() - started)
        self._compare(request, turn, received, whole=True)

    async def _receive(self, route: Generator, request: GenerationRequest, received: list[int]) -> int:
        attempts = 1
        async with aclosing(route.generate(request)) as deltas:  # type: ignore[type-var]
            async for delta in deltas:
                received += delta.tokens
                self.throughput.add(len(delta.tokens))
                if delta.usage is not None:
                    attempts = delta.usage.attempts
        return attempts

    def _compare(self, request: GenerationRequest, turn: Turn, received: list[int], whole: bool) -> None:
        wanted = list(turn.answer if whole else turn.answer[: len(received)])
        if received != wanted:
            self.stats.wrong_texts += 1
            self.trouble.append(f"{request.request_id}: received {received}, must be {wanted}")
