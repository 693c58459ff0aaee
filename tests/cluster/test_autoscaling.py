"""Ray's autoscaler adds and removes (fake) machines as `actors/autoscaler.py` wants them; no request fails on the way."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dualpath_ray.errors import ConfigError
from tests.cluster.conftest import RunningCluster
from tests.cluster.isolation import needs_isolation, run_isolated
from tests.cluster.test_generation import prompt


@pytest.mark.live
@pytest.mark.timeout(900)
@needs_isolation
def test_machines_follow_the_load(tiny_llama: Path, short_tmp: Path) -> None:
    command = [sys.executable, "-m", "tests.cluster.autoscaling_scenario", str(tiny_llama), str(short_tmp)]
    result = run_isolated(command, timeout_s=850)
    assert result.returncode == 0, result.stderr[-4000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert seen["failures"] == []
    assert seen["answered"] > 30
    assert seen["machines"] == [{"prefill": 1, "decode": 1}, {"prefill": 2, "decode": 1}]
    for moment in ("p1 joined", "d1 joined"):
        assert any(event.startswith(moment) for event in seen["events"])
    order = [event.partition(":")[0] for event in seen["events"]]
    for node in {event.split()[0] for event in order if event.endswith(" draining")}:
        assert order.index(f"{node} draining") < order.index(f"{node} left"), "a node finishes what it has before it goes"
    assert not [event for event in order if event.split()[1] in ("died", "hung", "lost")], "nobody died on the way"


async def test_a_node_switches_its_role_under_load(start_cluster: Callable[..., RunningCluster], tiny_llama: Path) -> None:
    """Its gateway, and with it the staging memory, stays."""
    running = start_cluster(
        f"model.spec={tiny_llama}", "cluster.prefill_nodes=2", "autoscaling.enabled=true", "autoscaling.interval_s=3600"
    )
    cluster, client = running.cluster, running.client()
    autoscaler = cluster._autoscaler
    assert autoscaler is not None
    expected = (await running.ask(client, "alone", prompt(700, 200), max_new=60)).tokens
    gateway = (await client.status())["processes"]["p1"]["agent"]
    asking = [asyncio.ensure_future(running.ask(client, f"q{i}", prompt(700, 200), max_new=60)) for i in range(12)]
    autoscaler.switch(cluster.nodes["p1"])
    with pytest.raises(ConfigError, match="p1 is draining"):
        autoscaler.switch(cluster.nodes["p1"])
    for answer in await asyncio.gather(*asking):
        assert answer.tokens == expected
        assert answer.usage is not None and answer.usage.attempts == 1
    await running.wait_for(client, lambda status: not status["processes"]["decode-p1-0"]["draining"])
    processes = (await client.status())["processes"]
    assert set(processes) == {"p0", "p1", "d0", "prefill-p0-0", "decode-p1-0", "decode-d0-0"}
    assert processes["p1"]["agent"] == gateway
    answers = await asyncio.gather(*(running.ask(client, f"s{i}", prompt(700, 200), max_new=60) for i in range(6)))
    assert {answer.usage.decode_engine for answer in answers if answer.usage} == {"decode-p1-0", "decode-d0-0"}
    assert all(answer.tokens == expected for answer in answers)
    await running.check_no_leaks(client)
