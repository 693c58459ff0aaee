"""API keys, their tenants' limits, and what a caller without one sees."""

from __future__ import annotations

import asyncio
import json
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner

from deploy import app
from deploy import keys as keys_command
from deploy.access.access import Access
from deploy.access.api_keys import ApiKeys, new_key, read_keys, write_keys
from deploy.access.tenant_limits import TenantLimits
from deploy.http_api.api import make_api
from deploy.openai_api.errors import ApiError
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config import Settings
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.errors import ConfigError
from tests.unit.deploy.emulation import EmulatedCluster
from tests.unit.deploy.test_http_errors import CHAT, GOOD, chat


def create(path: Path, tenant: str, **options: Any) -> str:
    presented, key = new_key(tenant, **options)
    write_keys(path, [*(read_keys(path) if path.exists() else []), key])
    return presented


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.fixture
async def http(service: OpenAIService, limits: ServingSettings, key_file: Path) -> AsyncIterator[httpx.AsyncClient]:
    create(key_file, "nobody")
    transport = httpx.ASGITransport(
        make_api(service, limits.model_copy(update={"body_timeout_s": 0.2}), Access(key_file)), raise_app_exceptions=False
    )
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_a_key_says_who_calls(http: httpx.AsyncClient, key_file: Path, cluster: EmulatedCluster) -> None:
    key = create(key_file, "acme", salt="pepper", priority=5)
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http)  # type: ignore[arg-type]
    await client.chat.completions.create(model="tiny", messages=GOOD["messages"], extra_body={"cache_salt": "s"})
    await client.chat.completions.create(model="tiny", messages=GOOD["messages"], extra_body={"agent_hints": {"priority": 9}})
    await client.chat.completions.create(model="tiny", messages=GOOD["messages"], extra_body={"agent_hints": {"priority": -9}})
    assert {request.tenant for request in cluster.requests} == {"acme"}
    assert [request.salt for request in cluster.requests] == ["pepper\x1fs", "pepper", "pepper"]
    assert [request.priority for request in cluster.requests] == [5, 5, -9]
    assert (await client.models.list()).data[0].id == "tiny"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize", "/v1/models", "/v1/models/tiny", "/status"])
async def test_nobody_comes_in_without_one(http: httpx.AsyncClient, key_file: Path, cluster: EmulatedCluster, path: str) -> None:
    key = create(key_file, "acme")
    method = "GET" if "models" in path or path == "/status" else "POST"
    for headers in ({}, bearer(""), bearer("dp-"), bearer(key[:-1]), bearer(key + "x"), bearer("x" + key), {"Authorization": key}):
        reply = await http.request(method, path, headers=headers, json=GOOD if method == "POST" else None)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert key not in reply.text
    assert not cluster.requests
    for open_path in ("/health", "/metrics", "/dashboard"):
        assert (await http.get(open_path)).status_code == 200


async def test_forbidden(http: httpx.AsyncClient, key_file: Path) -> None:
    key = create(key_file, "acme")
    reply = await http.post(CHAT, json=GOOD, headers={**bearer(key), "X-Tenant": "other"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "wrong_tenant")
    assert (await http.post(CHAT, json=GOOD, headers={**bearer(key), "X-Tenant": "acme"})).status_code == 200
    write_keys(key_file, [one.model_copy(update={"disabled": True}) for one in read_keys(key_file)])
    reply = await http.post(CHAT, json=GOOD, headers=bearer(key))
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "disabled_api_key")


async def test_rate_is_the_tenants(http: httpx.AsyncClient, key_file: Path) -> None:
    first, second = create(key_file, "acme", requests_per_minute=2), create(key_file, "acme", requests_per_minute=2)
    other = create(key_file, "other")
    statuses = [(await http.post(CHAT, json=GOOD, headers=bearer(key))) for key in (first, second, first, other)]
    assert [reply.status_code for reply in statuses] == [200, 200, 429, 200]
    assert 20 <= int(statuses[2].headers["retry-after"]) <= 30
    assert statuses[2].json()["error"]["code"] == "rate_limit_exceeded"


async def test_concurrency_is_given_back(http: httpx.AsyncClient, key_file: Path, cluster: EmulatedCluster) -> None:
    key = create(key_file, "acme", concurrency=1)
    cluster.stall_at = 2
    held = asyncio.create_task(http.post(CHAT, json=chat(stream=True), headers=bearer(key)))
    await asyncio.wait_for(cluster.stalled.wait(), 10)
    assert (await http.post(CHAT, json=GOOD, headers=bearer(key))).status_code == 429
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    cluster.stall_at = None
    for body in (GOOD, {}, chat(stream=True), chat(model="x")):
        assert (await http.post(CHAT, json=body, headers=bearer(key))).status_code != 429
    assert (await http.post(CHAT, content=b"x" * 200_000, headers=bearer(key))).status_code == 413
    assert (await http.post(CHAT, json=GOOD, headers=bearer(key))).status_code == 200


async def test_a_body_that_does_not_come_is_given_up(http: httpx.AsyncClient, key_file: Path) -> None:
    key = create(key_file, "acme", concurrency=1)

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(3)

    reply = await http.post(CHAT, content=body(), headers=bearer(key))
    assert (reply.status_code, reply.json()["error"]["code"]) == (408, "request_timeout")
    assert (await http.post(CHAT, json=GOOD, headers=bearer(key))).status_code == 200


def test_buckets_fill_up_again() -> None:
    now, replicas = [0.0], [2]
    limits = TenantLimits(lambda: replicas[0], clock=lambda: now[0])
    for _ in range(5):  # ten a minute, five in each of two replicas
        limits.enter("a", 10, None)()
    with pytest.raises(ApiError) as error:
        limits.enter("a", 10, None)
    assert error.value.headers == {"Retry-After": "12"}
    now[0] = 12.01
    limits.enter("a", 10, None)()
    with pytest.raises(ApiError):
        limits.enter("a", 10, None)
    now[0], replicas[0] = 18.02, 1  # the other replica is gone: all of the limit comes here
    limits.enter("a", 10, None)()
    with pytest.raises(ApiError):
        limits.enter("a", 10, None)


@pytest.mark.parametrize(("replicas", "publishing", "allowed"), [(1, 1, 6), (1, 2, 3), (3, 1, 2)])
async def test_a_replica_of_the_application_allows_its_share(
    service: OpenAIService, key_file: Path, monkeypatch: pytest.MonkeyPatch, replicas: int, publishing: int, allowed: int
) -> None:
    """Of what is configured, or of what there is if that is more: Serve may have started others."""

    class Client:
        """Emulates the cluster client of a replica."""

        def __init__(self, namespace: str) -> None:
            self.publishing = publishing

        def publish_metrics(self) -> None:
            pass

        async def aclose(self) -> None:
            pass

    async def ready(*_: Any) -> OpenAIService:
        return service

    monkeypatch.setattr(app, "ClusterClient", Client)
    monkeypatch.setattr(app, "_service", ready)
    monkeypatch.setattr(app.logs, "setup", lambda *_: None)
    monkeypatch.setattr(app.serve, "get_replica_context", lambda: SimpleNamespace(replica_id=SimpleNamespace(unique_id="r")))
    key = create(key_file, "acme", requests_per_minute=6)
    replica: Any = object.__new__(app.Http.func_or_class.__mro__[1])  # without what Serve wraps around it
    await replica.__init__(Settings.load(None, [f"serving.api_keys={key_file}", f"serving.replicas={replicas}"], environ={}), None, None)
    transport = httpx.ASGITransport(replica.__serve_build_asgi_app__(), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        statuses = [(await http.post(CHAT, json=GOOD, headers=bearer(key))).status_code for _ in range(8)]
    assert statuses == [200] * allowed + [429] * (8 - allowed)


def test_the_file_is_read_again_and_a_broken_one_changes_nothing(key_file: Path) -> None:
    first = create(key_file, "acme")
    keys = ApiKeys(key_file)
    assert keys.find(first) is not None
    second = create(key_file, "acme")
    found = keys.find(second)
    assert found is not None and found.tenant == "acme"
    time.sleep(0.01)
    key_file.write_text("{")
    assert keys.find(first) is not None
    with pytest.raises(ConfigError, match="is no file of API keys"):
        ApiKeys(key_file)
    time.sleep(0.01)
    write_keys(key_file, [])
    assert keys.find(first) is None


def test_the_file_holds_no_secrets_and_is_its_owners(key_file: Path) -> None:
    key = create(key_file, "acme")
    secret = key.split("-", 2)[2]
    assert secret not in key_file.read_text() and len(secret) >= 40
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600


def test_the_command(key_file: Path) -> None:
    runner = CliRunner()

    def run(*arguments: str) -> str:
        outcome = runner.invoke(keys_command.command, list(arguments))
        assert outcome.exit_code == 0, outcome.output
        return outcome.output

    key = run("create", str(key_file), "acme", "--requests-per-minute", "60", "--concurrency", "8").strip()
    run("create", str(key_file), "acme")
    entries = json.loads(key_file.read_text())["keys"]
    assert (entries[0]["requests_per_minute"], entries[0]["concurrency"]) == (60, 8)
    assert entries[0]["salt"] == entries[1]["salt"]  # keys of one tenant share prompts unless told otherwise
    listed = run("list", str(key_file))
    assert key.rpartition("-")[0] in listed.replace("\n", "") or key.split("-")[1] in listed
    assert key.split("-", 2)[2] not in listed
    run("revoke", str(key_file), key)
    assert ApiKeys(key_file).find(key) is None
    for wrong in (("create", str(key_file), "two words"), ("revoke", str(key_file), "dp-00000000"), ("list", str(key_file) + "x")):
        outcome = runner.invoke(keys_command.command, list(wrong))
        assert isinstance(outcome.exception, ConfigError)
