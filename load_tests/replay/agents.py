"""Running agents: offline (all at once), online (arriving one after the other), or single requests at a trace's times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from load_tests.replay.records import Replay, TurnRecord
from load_tests.replay.request_traces import TraceRequest
from load_tests.replay.trajectory import Trajectory, made_up_tokens

Contexts = Sequence[Sequence[int]]


class Caller(Protocol):
    """How one turn reaches the server; see ClusterCaller and OpenAICaller."""

    async def turn(self, record: TurnRecord, tokens: tuple[int, ...]) -> list[int]: ...


async def run_offline(
    caller: Caller, trajectories: Sequence[Trajectory], vocabulary: int, seed: int = 0, contexts: Contexts = ()
) -> Replay:
    """All agents start together and go through their turns back to back; ends when the last one has finished.

    `contexts` are the tokens that each agent has before its first turn (nothing by default).
    """
    return await _run(caller, trajectories, [0.0] * len(trajectories), vocabulary, seed, contexts)


async def run_online(
    caller: Caller,
    trajectories: Sequence[Trajectory],
    agents_per_s: float,
    vocabulary: int,
    seed: int = 0,
    contexts: Contexts = (),
    arrival_seed: int | None = None,
) -> Replay:
    """Agents arrive in a Poisson process of `agents_per_s`; each then goes through its turns.

    With the same `arrival_seed` (default: `seed`), another rate gives the same arrivals, stretched in time.
    """
    gaps = np.random.default_rng(seed if arrival_seed is None else arrival_seed).exponential(1.0 / agents_per_s, len(trajectories))
    return await _run(caller, trajectories, np.cumsum(gaps).tolist(), vocabulary, seed, contexts)


async def run_requests(caller: Caller, requests: Sequence[TraceRequest], vocabulary: int, speed: float = 1.0) -> Replay:
    """Every request at its time in the trace, `speed` times as fast; one of a session waits for the one before it."""
    records: list[TurnRecord] = []
    ends: dict[str, asyncio.Event] = {}
    started = time.monotonic()

    async def ask(number: int, request: TraceRequest, before: asyncio.Event | None, end: asyncio.Event) -> None:
        try:
            await asyncio.sleep(request.at_s / speed)
            if before is not None:
                await before.wait()
            record = TurnRecord(number, 0, request.input_tokens, request.output_tokens, time.monotonic())
            records.append(record)
            await caller.turn(record, request.prompt(vocabulary))
        finally:
            end.set()

    tasks = []
    for number, request in enumerate(requests):
        end = asyncio.Event()
        before = ends.get(request.session) if request.session else None
        ends[request.session] = end
        tasks.append(ask(number, request, before, end))
    await asyncio.gather(*tasks)
    return Replay(started, time.monotonic(), tuple(records))


async def _run(
    caller: Caller,
    trajectories: Sequence[Trajectory],
    arrivals: Sequence[float],
    vocabulary: int,
    seed: int,
    contexts: Contexts,
) -> Replay:
    records: list[TurnRecord] = []
    started = time.monotonic()

    async def agent(index: int, trajectory: Trajectory) -> None:
        await asyncio.sleep(arrivals[index])
        contents = made_up_tokens(seed * 1_000_003 + index, trajectory.total_tokens, vocabulary).tolist()
        context = list(contexts[index]) if contexts else []
        for number, turn in enumerate(trajectory.turns):
            at = sum(t.append + t.generate for t in trajectory.turns[:number])
            context += contents[at : at + turn.append]
            record = TurnRecord(index, number, len(context), turn.generate, time.monotonic())
            records.append(record)
            generated = await caller.turn(record, tuple(context))
            if record.error:
                return  # the rest of the session has lost its history
            context += generated or contents[at + turn.append : at + turn.append + turn.generate]
            if turn.pause_s:
                await asyncio.sleep(turn.pause_s)

    await asyncio.gather(*(agent(index, trajectory) for index, trajectory in enumerate(trajectories)))
    return Replay(started, time.monotonic(), tuple(records))
