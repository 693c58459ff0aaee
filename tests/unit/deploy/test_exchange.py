"""A client that goes away takes its request with it, over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
import uvicorn
from starlette.types import Message

from deploy.http_api.api import make_api
from deploy.http_api.exchange import Exchange
from deploy.openai_api.caller import Caller
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from tests.unit.deploy.emulation import EmulatedCluster
from tests.unit.deploy.test_http_errors import CHAT, chat


@pytest.fixture
async def address(service: OpenAIService, limits: ServingSettings) -> AsyncIterator[str]:
    config = uvicorn.Config(make_api(service, limits), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = server.force_exit = True  # a test that failed may have left requests behind
    await serving


async def gone(cluster: EmulatedCluster) -> None:
    async with asyncio.timeout(20):
        while cluster.running:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stall_at", [0, 4], ids=["before the first token", "later"])
async def test_a_lost_client_cancels(address: str, cluster: EmulatedCluster, stream: bool, stall_at: int) -> None:
    cluster.stall_at = stall_at
    async with httpx.AsyncClient() as client:
        call = asyncio.create_task(client.post(address + CHAT, json=chat(stream=stream)))
        async with asyncio.timeout(20):
            await cluster.stalled.wait()
        assert len(cluster.running) == 1
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await gone(cluster)
    assert cluster.closed == [cluster.requests[0].request_id]


async def test_leaving_in_the_middle_of_a_stream_cancels(address: str, cluster: EmulatedCluster) -> None:
    cluster.stall_at = 6
    async with httpx.AsyncClient() as client, client.stream("POST", address + CHAT, json=chat(stream=True)) as reply:
        lines = reply.aiter_lines()
        assert "assistant" in await anext(lines)
        await anext(lines)
        assert '"content":' in await anext(lines)  # arrives while the rest is not even generated
        assert cluster.running
    await gone(cluster)
    assert len(cluster.closed) == 1


async def test_a_client_lost_while_it_is_sent_to_cancels(service: OpenAIService, cluster: EmulatedCluster) -> None:
    """What is sent and what is generated wait in two tasks, and both must end."""
    cluster.stall_at = 6
    sending = asyncio.Event()

    async def send(message: Message) -> None:
        if b"content" in message.get("body", b"") and b"role" not in message["body"]:
            sending.set()
            await asyncio.Event().wait()

    async def receive() -> Message:
        await sending.wait()
        return {"type": "http.disconnect"}

    body = json.dumps(chat(stream=True)).encode()
    await Exchange(lambda: service.generate(CHAT, body, Caller("r")))({"type": "http"}, receive, send)
    assert sending.is_set()
    assert not cluster.running
    assert len(cluster.closed) == 1


async def test_more_than_the_limit_at_once_is_refused_and_places_come_back(
    address: str, cluster: EmulatedCluster, limits: ServingSettings
) -> None:
    cluster.stall_at = 2
    async with httpx.AsyncClient() as client:
        calls = [asyncio.create_task(client.post(address + CHAT, json=chat())) for _ in range(limits.max_concurrent_requests)]
        async with asyncio.timeout(20):
            while len(cluster.running) < limits.max_concurrent_requests:
                await asyncio.sleep(0.01)
        refused = await client.post(address + CHAT, json=chat())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        await gone(cluster)
        cluster.stall_at = None
        assert (await client.post(address + CHAT, json=chat())).status_code == 200


async def test_a_stream_over_the_wire_ends_with_done(address: str) -> None:
    async with httpx.AsyncClient() as client:
        reply = await client.post(address + CHAT, json=chat(stream=True), headers={"X-Request-Id": "abc"})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["x-request-id"] == "abc"
    assert reply.text.endswith("data: [DONE]\n\n")
