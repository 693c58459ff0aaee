"""Whatever a client gets wrong: OpenAI's error object, the right status, and a service that lives on."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import tokenizers

from deploy.openai_api.caller import Caller
from deploy.openai_api.reply import JsonReply
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.errors import StoreError
from dualpath_ray.serving.chat_template import ChatTemplate
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.deploy.emulation import EmulatedCluster

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
GOOD: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def schema(value: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": value}}


def chat(**fields: Any) -> dict[str, Any]:
    return {**GOOD, **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "Hello", **fields}


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"a":NaN}', b'{"model":"\\ud800"}', b"[]", b"3", b"[" * 5000])
async def test_bodies_that_are_no_json_object(http: httpx.AsyncClient, body: bytes) -> None:
    reply = await http.post(CHAT, content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "code"),
    [
        (CHAT, {"messages": GOOD["messages"]}, 400, "model", "missing_required_parameter"),
        (CHAT, {"model": "tiny"}, 400, "messages", "missing_required_parameter"),
        (CHAT, chat(model="other"), 404, "model", "model_not_found"),
        (TEXT, text(model="x" * 10_000), 404, "model", "model_not_found"),
        (CHAT, chat(messages=[]), 400, "messages", "invalid_value"),
        (CHAT, chat(messages=[{"role": "king", "content": "x"}]), 400, "messages", "invalid_value"),
        (CHAT, chat(messages=[{"role": "user", "content": None}]), 400, "messages", "invalid_value"),
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]), 400, "messages", "invalid_value"),
        (CHAT, chat(temperature=-0.1), 400, "temperature", "invalid_value"),
        (CHAT, chat(temperature=2.1), 400, "temperature", "invalid_value"),
        (CHAT, chat(temperature="1"), 400, "temperature", "invalid_value"),
        (CHAT, chat(top_p=0), 400, "top_p", "invalid_value"),
        (CHAT, chat(top_p=1.5), 400, "top_p", "invalid_value"),
        (CHAT, chat(top_k=-2), 400, "top_k", "invalid_value"),
        (CHAT, chat(seed=2**63), 400, "seed", "invalid_value"),
        (CHAT, chat(max_tokens=0), 400, "max_tokens", "invalid_value"),
        (CHAT, chat(max_completion_tokens=-1), 400, "max_completion_tokens", "invalid_value"),
        (CHAT, chat(max_tokens=True), 400, "max_tokens", "invalid_value"),
        (CHAT, chat(max_tokens=5, min_tokens=6), 400, "min_tokens", "invalid_value"),
        (CHAT, chat(stop=""), 400, "stop", "invalid_value"),
        (CHAT, chat(stop=["a"] * 17), 400, "stop", "invalid_value"),
        (CHAT, chat(timeout=0), 400, "timeout", "invalid_value"),
        (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", "invalid_value"),
        (CHAT, chat(n=0), 400, "n", "invalid_value"),
        (CHAT, chat(n=17), 400, "n", "invalid_value"),
        (CHAT, chat(logprobs=3), 400, "logprobs", "invalid_value"),
        (CHAT, chat(top_logprobs=2), 400, None, "invalid_value"),
        (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", "invalid_value"),
        (TEXT, text(logprobs=-1), 400, "logprobs", "invalid_value"),
        (CHAT, chat(tools=[{"type": "function"}]), 400, "tools", "missing_required_parameter"),
        (CHAT, chat(tool_choice="required"), 400, None, "invalid_value"),
        (CHAT, chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}), 400, None, "invalid_value"),
        (CHAT, chat(tools=[TOOL, TOOL]), 400, None, "invalid_value"),
        (CHAT, chat(tools=[TOOL], response_format={"type": "json_object"}), 400, None, "invalid_value"),
        (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format", "invalid_value"),
        (CHAT, chat(response_format=schema({"type": "objekt"})), 422, "response_format", "invalid_schema"),
        (CHAT, chat(response_format=schema({"enum": [2**64]})), 422, "response_format", "invalid_schema"),
        (CHAT, chat(structured_outputs={"json": {"maximum": -(2**64)}}), 422, "structured_outputs", "invalid_schema"),
        (CHAT, chat(response_format=schema({"type": "object"}), min_tokens=3), 400, "min_tokens", "invalid_value"),
        (CHAT, chat(structured_outputs={"regex": "(a"}), 422, "structured_outputs", "invalid_schema"),
        (CHAT, chat(structured_outputs={"regex": "a", "choice": ["b"]}), 400, "structured_outputs", "invalid_value"),
        (CHAT, chat(frequency_penalty=2.5), 400, "frequency_penalty", "invalid_value"),
        (CHAT, chat(presence_penalty=-3), 400, "presence_penalty", "invalid_value"),
        (CHAT, chat(repetition_penalty=0), 400, "repetition_penalty", "invalid_value"),
        (CHAT, chat(logit_bias={"a": 1}), 400, "logit_bias", "invalid_value"),
        (CHAT, chat(logit_bias={"512": 1}), 400, "logit_bias", "invalid_value"),
        (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias", "invalid_value"),
        (CHAT, chat(agent_hints={"priority": 101}), 400, "agent_hints", "invalid_value"),
        (CHAT, chat(agent_hints={"urgency": 1}), 400, "agent_hints", "invalid_value"),
        (CHAT, chat(functions=[{"name": "f"}]), 400, "functions", "unsupported_parameter"),
        (TEXT, text(echo=True), 400, "echo", "unsupported_parameter"),
        (CHAT, chat(max_tokens=200), 400, "messages", "context_length_exceeded"),
        (TEXT, text(prompt=[5] * 200), 400, "prompt", "context_length_exceeded"),
        (TEXT, text(prompt=[5] * 150, max_tokens=51), 400, "prompt", "context_length_exceeded"),
        (TEXT, text(prompt=""), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=[]), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=[512]), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=[-1]), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=[1, "a"]), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=["a"] * 17), 400, "prompt", "invalid_value"),
        (TEXT, text(prompt=["a"] * 9, n=2), 400, "n", "invalid_value"),
    ],
)
async def test_wrong_parameters(
    http: httpx.AsyncClient, cluster: EmulatedCluster, path: str, body: dict[str, Any], status: int, param: str | None, code: str | None
) -> None:
    reply = await http.post(path, json=body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"] and len(error["message"]) < 500
    assert reply.headers["content-type"] == "application/json"
    assert not cluster.requests
    assert (await http.post(CHAT, json=GOOD)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "messages.0.content.0.type: Input should be 'text'"),
        (CHAT, chat(messages=[{"role": "user", "content": 3}]), "messages.0.content: Input should be a valid string"),
        (CHAT, chat(tool_choice="sometimes"), "tool_choice: Input should be 'none', 'auto' or 'required'"),
        (CHAT, chat(tool_choice={"type": "allowed_tools"}), "tool_choice.type: Input should be 'function'"),
        (CHAT, chat(stop=["a", ""]), "stop.1: String should have at least 1 character"),
        (TEXT, text(prompt=[1, "a"]), "prompt.1: Input should be a valid integer"),
        (CHAT, chat(temperature=3, n=0), "n: Input should be greater than or equal to 1 (and 1 more)"),
    ],
)
async def test_the_message_says_where(http: httpx.AsyncClient, path: str, body: dict[str, Any], message: str) -> None:
    assert (await http.post(path, json=body)).json()["error"]["message"] == message


async def test_tools_need_a_template_that_knows_them(cluster: EmulatedCluster, tokenizer: Tokenizer, limits: ServingSettings) -> None:
    plain = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer._core.to_str()), ChatTemplate("{{ messages[0].content }}"))
    service = OpenAIService(cluster, plain, cluster.card, limits)
    reply = await service.generate(CHAT, chat(tools=[TOOL]), Caller("x"))
    assert isinstance(reply, JsonReply)
    assert (reply.status, json.loads(reply.body)["error"]["param"]) == (400, "tools")


async def test_what_asks_for_nothing_and_what_is_unknown_is_ignored(http: httpx.AsyncClient, cluster: EmulatedCluster) -> None:
    body = chat(
        n=1, tools=[], tool_choice="none", response_format={"type": "text"}, presence_penalty=0, logprobs=False, logit_bias={},
        stop=None, seed=None, stream=None, store=True, metadata={"a": "b"}, service_tier="auto", parallel_tool_calls=True,
    )  # fmt: skip
    assert (await http.post(CHAT, json=body)).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2", 404, "unknown_url"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
        ("GET", CHAT, 405, "method_not_allowed"),
        ("POST", f"{CHAT}/", 404, "unknown_url"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
    ],
)
async def test_wrong_addresses(http: httpx.AsyncClient, method: str, path: str, status: int, code: str) -> None:
    reply = await http.request(method, path)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)


async def test_large_bodies_are_refused(http: httpx.AsyncClient) -> None:
    reply = await http.post(CHAT, content=json.dumps(chat(padding="x" * 100_000)))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


async def test_large_bodies_of_undeclared_size_are_not_read_to_their_end(http: httpx.AsyncClient) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 10_000

    reply = await http.post(CHAT, content=chunks())
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")
    assert sent < 20


async def test_overload_says_when_to_retry(http: httpx.AsyncClient, cluster: EmulatedCluster) -> None:
    cluster.failure = StoreError("disk gone")
    reply = await http.post(CHAT, json=GOOD)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "disk gone" in reply.json()["error"]["message"]


async def test_request_ids_are_returned(http: httpx.AsyncClient) -> None:
    for path in ("/health", "/v1/models", "/nowhere"):
        assert (await http.get(path, headers={"X-Request-Id": "my-id"})).headers["x-request-id"] == "my-id"
    generated = (await http.get("/health", headers={"X-Request-Id": "a b\tc"})).headers["x-request-id"]
    assert len(generated) == 32
    assert (await http.post(CHAT, json=GOOD, headers={"X-Request-Id": "r1"})).headers["x-request-id"] == "r1"


async def test_unusable_tenant(http: httpx.AsyncClient) -> None:
    reply = await http.post(CHAT, json=GOOD, headers={"X-Tenant": "a b"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_header")


async def test_health_and_metrics(http: httpx.AsyncClient, cluster: EmulatedCluster) -> None:
    assert (await http.get("/health")).json() == {"status": "ok", "engines": 2}
    metrics = await http.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "dualpath_requests_total 1" in metrics.text
    cluster.report = {"status": "starting"}
    assert (await http.get("/health")).status_code == 503
    cluster.failure = StoreError("no scheduler")
    reply = await http.get("/health")
    assert (reply.status_code, reply.json()["reason"]) == (503, "no scheduler")


async def test_no_text_of_a_request_is_logged(http: httpx.AsyncClient, cluster: EmulatedCluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = [{"role": "user", "content": "my secret"}]
    for body in (chat(messages=secret), chat(messages=secret, n="x"), chat(messages=secret, max_tokens=500), chat(model="my secret")):
        await http.post(CHAT, json=body)
    await http.post(CHAT, content=b'{"my secret"')
    await http.post(CHAT, json=chat(response_format=schema({"type": "my secret"})))
    for failure in (StoreError("disk gone"), RuntimeError("a defect")):
        cluster.failure = failure
        await http.post(CHAT, json=chat(messages=secret))
    ours = [record for record in caplog.records if record.name.startswith(("deploy", "dualpath_ray", "actors"))]
    assert ours and not any("my secret" in record.getMessage() + str(record.exc_text) for record in ours)


async def test_document_describes_the_bodies(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    schema = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rsplit("/", 1)[1]
    assert "messages" in document["components"]["schemas"][name]["properties"]
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= set(document["components"]["schemas"])
