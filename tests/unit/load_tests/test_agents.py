from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest

from dualpath_ray.errors import OverloadedError
from dualpath_ray.requests import GenerationDelta, GenerationRequest, GenerationUsage
from load_tests.replay.agents import run_offline, run_online
from load_tests.replay.cluster_caller import ClusterCaller
from load_tests.replay.records import percentiles, summary
from load_tests.replay.trajectory import Trajectory, Turn


class Echo:
    """A generator in one process: answers with token 9, one at a time, and remembers what it was asked."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.requests: list[GenerationRequest] = []
        self.active = self.most_active = 0
        self._fail_at = fail_at

    async def generate(self, request: GenerationRequest) -> AsyncIterator[GenerationDelta]:
        self.requests.append(request)
        number = len(self.requests)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            await asyncio.sleep(0)
            if number == self._fail_at:
                raise OverloadedError("full")
            for _ in range(request.max_new_tokens - 1):
                yield GenerationDelta((9,))
            usage = GenerationUsage(len(request.tokens), 16, len(request.tokens) - 16, read_bytes={"decode_node": 64})
            yield GenerationDelta((9,), "length", usage)
        finally:
            self.active -= 1


SESSIONS = [Trajectory((Turn(20, 3), Turn(5, 2))), Trajectory((Turn(8, 1), Turn(4, 4), Turn(2, 2)))]


async def test_each_turn_continues_the_whole_history() -> None:
    server = Echo()
    replay = await run_offline(ClusterCaller(server), SESSIONS, 512)
    assert len(replay.records) == 5
    for agent, session in enumerate(SESSIONS):
        prompts = [request.tokens for request in server.requests if request.request_id.startswith(f"replay-{agent}-")]
        for number, (before, after) in enumerate(pairwise(prompts)):
            turn = session.turns[number]
            assert after[: len(before)] == before
            assert after[len(before) : len(before) + turn.generate] == (9,) * turn.generate
    assert [record.generated for record in replay.records] == [record.wanted for record in replay.records]
    assert server.most_active == 2


async def test_agents_start_with_their_contexts() -> None:
    server = Echo()
    await run_offline(ClusterCaller(server), SESSIONS[:1], 512, contexts=[[1, 2, 3]])
    assert server.requests[0].tokens[:3] == (1, 2, 3)
    assert len(server.requests[0].tokens) == 23


async def test_other_seeds_append_other_tokens() -> None:
    servers = [Echo(), Echo()]
    for seed, server in enumerate(servers):
        await run_offline(ClusterCaller(server), SESSIONS[:1], 512, seed, contexts=[[1, 2, 3]])
    one, other = (server.requests[0].tokens for server in servers)
    assert one[:3] == other[:3] and one[3:] != other[3:]


async def test_a_failed_turn_ends_its_agent_and_is_counted() -> None:
    replay = await run_offline(ClusterCaller(Echo(fail_at=1)), SESSIONS, 512)
    figures = summary(replay)
    assert figures["failed_turns"] == 1
    assert figures["first_error"] == "OverloadedError: full"
    assert figures["turns"] == 3


async def test_sharing_nothing_gives_each_turn_its_tenant() -> None:
    server = Echo()
    await run_offline(ClusterCaller(server, share_nothing=True), SESSIONS, 512)
    assert len({request.tenant for request in server.requests}) == 5


async def test_online_agents_arrive_one_after_the_other() -> None:
    started = time.monotonic()
    replay = await run_online(ClusterCaller(Echo()), SESSIONS, 1000.0, 512, seed=3)
    first = [min(record.started for record in replay.records if record.agent == agent) for agent in (0, 1)]
    assert started < first[0] < first[1]


def test_percentiles_of_nothing() -> None:
    assert percentiles([]) == {}
    assert percentiles([1.0, 3.0])["mean"] == pytest.approx(2.0)
