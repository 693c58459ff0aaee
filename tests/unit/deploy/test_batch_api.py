"""/v1/files and /v1/batches through the stock client, with a real runner over an emulated cluster."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from deploy.access.access import Access
from deploy.batches import runner as runner_module
from deploy.batches.runner import BatchRunner
from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from tests.unit.deploy.emulation import EmulatedCluster
from tests.unit.deploy.test_access import create
from tests.unit.deploy.test_batch import CHAT, line

LINES = b"".join(line(f"id-{index}") for index in range(8))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "POLL_S", 0.02)


@pytest.fixture
def limits(tmp_path: Path) -> ServingSettings:
    return ServingSettings(files=tmp_path / "files", max_body_bytes=10_000, max_file_bytes=20_000, default_max_tokens=64)  # type: ignore[arg-type]


def connect(service: OpenAIService, limits: ServingSettings, access: Access | None = None, key: str = "none") -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(make_api(service, limits, access), raise_app_exceptions=False)
    http = httpx.AsyncClient(transport=transport, base_url="http://test")
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http, max_retries=0)  # type: ignore[arg-type]


@pytest.fixture
def client(service: OpenAIService, limits: ServingSettings) -> openai.AsyncOpenAI:
    return connect(service, limits)


@asynccontextmanager
async def running(service: OpenAIService, limits: ServingSettings) -> AsyncIterator[None]:
    assert limits.files is not None
    task = asyncio.create_task(BatchRunner(service, limits.files, 4, 10_000).run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def ended(client: openai.AsyncOpenAI, name: str) -> Any:
    async with asyncio.timeout(20):
        while (batch := await client.batches.retrieve(name)).status not in ("completed", "failed", "cancelled", "expired"):
            await asyncio.sleep(0.02)
    return batch


async def order(client: openai.AsyncOpenAI, content: bytes, endpoint: Any = CHAT) -> Any:
    file = await client.files.create(file=("in.jsonl", content), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"a": "b"})


async def results(client: openai.AsyncOpenAI, name: str | None) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (await client.files.content(name or "")).text.splitlines()]


async def test_a_batch_from_upload_to_results(client: openai.AsyncOpenAI, service: OpenAIService, limits: ServingSettings) -> None:
    batch = await order(client, LINES + line("bad", body={"model": "tiny"}))
    assert (batch.status, batch.metadata) == ("validating", {"a": "b"})
    async with running(service, limits):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.total) == ("completed", 9)
    assert (batch.request_counts.completed, batch.request_counts.failed) == (8, 1)
    assert sorted(result["custom_id"] for result in await results(client, batch.output_file_id)) == [f"id-{index}" for index in range(8)]
    (failed,) = await results(client, batch.error_file_id)
    assert (failed["custom_id"], failed["response"]["status_code"]) == ("bad", 400)
    assert [one.id for one in (await client.batches.list()).data] == [batch.id]
    assert "_caller" not in batch.model_extra


async def test_a_runner_that_died_is_followed_by_one_that_goes_on(
    client: openai.AsyncOpenAI, service: OpenAIService, limits: ServingSettings, cluster: EmulatedCluster
) -> None:
    batch = await order(client, LINES)
    async with running(service, limits):
        async with asyncio.timeout(20):
            while len(cluster.requests) < 6:
                await asyncio.sleep(0)
        cluster.stall_at = 3  # whatever is under way now does not end
        await asyncio.wait_for(cluster.stalled.wait(), 20)
    cluster.stall_at = None
    async with running(service, limits):
        batch = await ended(client, batch.id)
    assert (batch.status, batch.request_counts.completed) == ("completed", 8)
    assert 8 < len(cluster.requests) <= 8 + 4  # again is asked what was under way, and nothing else
    names = [result["custom_id"] for result in await results(client, batch.output_file_id)]
    assert sorted(names) == [f"id-{index}" for index in range(8)]


async def test_cancel_keeps_what_is_done(
    client: openai.AsyncOpenAI, service: OpenAIService, limits: ServingSettings, cluster: EmulatedCluster
) -> None:
    batch = await order(client, LINES)
    cluster.stall_at = 1
    async with running(service, limits):
        await asyncio.wait_for(cluster.stalled.wait(), 20)
        assert (await client.batches.cancel(batch.id)).status == "cancelling"
        batch = await ended(client, batch.id)
    assert (batch.status, batch.output_file_id) == ("cancelled", None)
    assert not cluster.running
    with pytest.raises(openai.ConflictError):
        await client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("content", "code", "number"),
    [
        (b"{\n", "invalid_json", 1),
        (b"\n\n", "empty_file", None),
        (LINES + line("id-3"), "duplicate_custom_id", 9),
        (line("a", url="/v1/completions"), "mismatched_endpoint", 1),
        (line("a") + b"x" * 15_000, "invalid_json", 2),
    ],
)
async def test_a_file_that_is_no_batch_fails_before_anything_runs(
    client: openai.AsyncOpenAI,
    service: OpenAIService,
    limits: ServingSettings,
    cluster: EmulatedCluster,
    content: bytes,
    code: str,
    number: int,
) -> None:
    batch = await order(client, content)
    async with running(service, limits):
        batch = await ended(client, batch.id)
    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)
    assert not cluster.requests


async def test_files(client: openai.AsyncOpenAI) -> None:
    made = [await client.files.create(file=(f"{index}.jsonl", LINES), purpose="batch") for index in range(3)]
    assert (made[0].bytes, made[0].filename) == (len(LINES), "0.jsonl")
    listed = await client.files.list(limit=2)
    assert len(listed.data) == 2 and listed.has_more
    assert {file.id async for file in client.files.list(limit=2)} == {file.id for file in made}
    assert (await client.files.content(made[0].id)).content == LINES
    assert (await client.files.delete(made[0].id)).deleted
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            await call(made[0].id)
    with pytest.raises(openai.NotFoundError):
        await client.batches.create(input_file_id=made[0].id, endpoint=CHAT, completion_window="24h")  # type: ignore[arg-type]
    for wrong in ("../../etc/passwd", "file-" + "0" * 24, "batch-x"):
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(wrong)


async def test_uploads_that_cannot_be(client: openai.AsyncOpenAI, limits: ServingSettings) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        await client.files.create(file=("in.jsonl", b"x" * 30_000), purpose="batch")
    assert error.value.status_code == 413
    with pytest.raises(openai.BadRequestError):
        await client.files.create(file=("in.jsonl", LINES), purpose="fine-tune")
    http = client._client
    for options in (
        {"content": b"x"},
        {"files": {"other": b"x"}, "data": {"purpose": "batch"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data"}},
        {"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        {"content": b"--b\r\nContent-Disposition: x\r\n\r\n", "headers": {"content-type": "multipart/form-data; boundary=b"}},
    ):
        assert (await http.post("http://test/v1/files", **options)).status_code == 400  # type: ignore[arg-type]
    assert limits.files is not None
    assert not list(limits.files.rglob("*.data"))


async def test_looking_makes_nothing(service: OpenAIService, limits: ServingSettings) -> None:
    client = connect(service, limits)
    for tenant in ("a", "b"):
        assert not (await client.files.list(extra_headers={"X-Tenant": tenant})).data
        assert not (await client.batches.list(extra_headers={"X-Tenant": tenant})).data
    assert limits.files is not None and not limits.files.exists()


async def test_tenants_see_their_own(service: OpenAIService, limits: ServingSettings, tmp_path: Path, cluster: EmulatedCluster) -> None:
    key_file = tmp_path / "keys.json"
    first, second = create(key_file, "acme", priority=3), create(key_file, "other/..")
    access = Access(key_file)
    mine, theirs = connect(service, limits, access, first), connect(service, limits, access, second)
    batch = await order(mine, LINES)
    for call in (theirs.files.retrieve(batch.input_file_id), theirs.batches.retrieve(batch.id), theirs.batches.cancel(batch.id)):
        with pytest.raises(openai.NotFoundError):
            await call
    assert not (await theirs.files.list()).data and not (await theirs.batches.list()).data
    with pytest.raises(openai.AuthenticationError):
        await connect(service, limits, access).files.list()
    async with running(service, limits):
        await ended(mine, batch.id)
    assert {(request.tenant, request.priority) for request in cluster.requests} == {("acme", -7)}
