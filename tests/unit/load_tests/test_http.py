"""The load test's own code, over a real socket, without Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import uvicorn

from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.models.tiny import make_tiny_model
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from load_tests.http import measure
from load_tests.http.applications import IDLE_PROMPT
from load_tests.http.emulated_cluster import EmulatedCluster
from load_tests.http.plot import plot_saturation

LIMIT = 40


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[tuple[str, EmulatedCluster]]:
    model = make_tiny_model("llama", tmp_path / "model")
    card = ModelCard.from_directory(model, "tiny", 1000)
    cluster = EmulatedCluster(card, 0.0, IDLE_PROMPT)
    limits = ServingSettings(max_concurrent_requests=LIMIT)
    service = OpenAIService(cluster, Tokenizer.from_directory(model), card, limits)
    server = uvicorn.Server(uvicorn.Config(make_api(service, limits), port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", cluster
    server.should_exit = server.force_exit = True
    await serving


async def test_saturation_counts_whole_streams(served: tuple[str, EmulatedCluster], tmp_path: Path) -> None:
    url, _ = served
    found = await measure.saturation({"nothing": url, "emulated": url}, "tiny", [1, 4], 8, 0.2)
    for curve in found["curves"].values():
        for point in curve.values():
            assert point["failures"] == 0 and point["streams_per_s"] > 0
            assert point["events_per_s"] / point["streams_per_s"] >= 3  # several tokens may share an event, the end and [DONE] do not
    assert found["ratio_to_nothing"]["nothing"] == 1
    plot_saturation(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000


async def test_idle_streams_are_held_and_then_gone(served: tuple[str, EmulatedCluster]) -> None:
    url, cluster = served
    found = await measure.idle_streams(url, "tiny", LIMIT - 5, 0.3)
    assert (found["opened"], found["lost_while_held"], found["others"]["failures"]) == (LIMIT - 5, 0, 0)
    async with asyncio.timeout(20):
        while cluster.running:
            await asyncio.sleep(0.01)


async def test_refusals_are_failures(served: tuple[str, EmulatedCluster]) -> None:
    url, _ = served
    found = await measure.drain(url, "another", lambda: time.sleep(0.1), 0.2)
    assert found["failures"] > 0 and "404" in found["first_failure"]
    tenants = await measure.fairness(url, "tiny", 4, 0.2, (3, 2))
    assert 0 < tenants["share_of_modest"] < 1
