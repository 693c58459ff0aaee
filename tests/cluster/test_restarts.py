"""Processes are killed; the next turn, or the same one, gives the same text (must hold 5)."""

from __future__ import annotations

import os
import signal

import pytest

from actors.client import ClusterClient
from dualpath_ray.requests import GenerationRequest, SamplingParams
from tests.cluster.conftest import RunningCluster
from tests.cluster.test_generation import prompt


@pytest.mark.parametrize("victims", [["prefill-p0-0", "decode-d0-0"], ["p0", "d0"]])
async def test_next_turn_after_a_crash_is_served_from_storage(shared: RunningCluster, client: ClusterClient, victims: list[str]) -> None:
    tokens = prompt(500 + len(victims[0]), 200)
    before = await shared.ask(client, f"before-{victims[0]}", tokens, max_new=24)
    await shared.settle(client)
    for victim in victims:
        await shared.kill(client, victim)
    after = await shared.ask(client, f"after-{victims[0]}", tokens, max_new=24)
    assert after.tokens == before.tokens
    assert after.usage is not None
    assert after.usage.cached_tokens == 192


async def test_scheduler_is_rebuilt_from_what_the_others_push(shared: RunningCluster, client: ClusterClient) -> None:
    tokens = prompt(510, 200)
    before = await shared.ask(client, "before-scheduler", tokens)
    await shared.settle(client)
    old = (await client.status())["scheduler"]
    blocks = (await client.status())["index_blocks"]
    pid = await _scheduler_pid(shared)
    shared.kill_process(pid)
    await shared.wait_for(
        client, lambda status: status["scheduler"] != old and len(status["processes"]) == 4 and status["index_blocks"] == blocks
    )
    after = await shared.ask(client, "after-scheduler", tokens)
    assert after.tokens == before.tokens
    assert after.usage is not None
    assert after.usage.cached_tokens == 192


async def _scheduler_pid(shared: RunningCluster) -> int:
    from actors.calls import SCHEDULER, ActorCalls

    pid: int = await ActorCalls(shared.cluster.namespace).call(SCHEDULER, "process_id")
    return pid


@pytest.mark.parametrize("victim", ["decode-d0-0", "prefill-p0-0", "d0"])
async def test_a_request_survives_the_death_of_a_process_in_mid_stream(shared: RunningCluster, client: ClusterClient, victim: str) -> None:
    """No token is repeated or lost: sampling depends on seed, position and the tokens so far, which the penalties count."""
    tokens = prompt(520, 300)
    sampling = SamplingParams(temperature=0.9, seed=7, frequency_penalty=0.3, presence_penalty=0.5)
    expected = await shared.ask(client, f"calm-{victim}", tokens, max_new=200, sampling=sampling)
    await shared.settle(client)
    pid = (await client.status())["processes"][victim]["pid"]
    got: list[int] = []
    killed = False
    request = GenerationRequest(f"stormy-{victim}", tuple(tokens), 200, sampling=sampling, timeout=90.0)
    async for delta in client.generate(request):
        got += delta.tokens
        if len(got) >= 20 and not killed:
            killed = True
            shared.kill_process(pid)
    assert killed
    assert got == expected.tokens
    await shared.wait_for(client, lambda status: status["processes"][victim]["pid"] != pid)


async def test_a_hung_process_is_ended_and_started_again(shared: RunningCluster, client: ClusterClient) -> None:
    """Ray never notices a process that does not answer; the scheduler does, because its reports stop."""
    victim = "prefill-p0-0"
    tokens = prompt(530, 200)
    before = await shared.ask(client, f"before-hang-{victim}", tokens)
    await shared.settle(client)
    process = (await client.status())["processes"][victim]
    os.kill(process["pid"], signal.SIGSTOP)
    after = await shared.ask(client, f"during-hang-{victim}", tokens)
    assert after.tokens == before.tokens
    assert (await client.status())["processes"][victim]["agent"] != process["agent"]
