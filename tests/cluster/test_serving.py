"""The HTTP application on real Ray Serve, with TLS and the files of batches, in front of real engines. Plain HTTP is what the demo uses."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import trustme
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from actors.client import ClusterClient
from deploy.app import application
from deploy.openai_api.batch import run_batch
from deploy.openai_api.service import OpenAIService
from deploy.running_service import free_port, http_options
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.cluster.conftest import RunningCluster

PROMPT = "Every block is read through the storage NIC that is idle. " * 8
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def address(shared: RunningCluster, authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("serving")
    ours = authority.issue_cert("127.0.0.1")
    certificate, key = directory / "tls.crt", directory / "tls.key"
    ours.cert_chain_pems[0].write_to_path(certificate)
    ours.private_key_pem.write_to_path(key)
    settings = shared.cluster.settings
    given = {"files": directory / "files", "tls_certificate": certificate, "tls_key": key, "batch_concurrency": 2}
    given |= {"max_concurrent_requests": 8, "max_queued_requests": 8}
    settings = settings.model_copy(update={"serving": settings.serving.model_copy(update=given)})
    port = free_port("127.0.0.1")
    serve.start(http_options=http_options(settings, port), logging_config={"log_level": "WARNING", "enable_access_log": False})
    serve.run(application(settings, start_engines=False), name="test", route_prefix="/")
    yield f"https://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
async def http(address: str, authority: trustme.CA) -> AsyncIterator[httpx.AsyncClient]:
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    async with httpx.AsyncClient(base_url=address, verify=trusting, timeout=60) as client:
        yield client


@pytest.fixture
async def api(http: httpx.AsyncClient, address: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0, http_client=http)


async def test_greedy_text_is_the_same_streamed_or_whole_cold_or_cached(
    api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster
) -> None:
    name = (await client.describe()).served_name
    options: dict[str, Any] = {"model": name, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = await api.chat.completions.create(**options)
    await shared.settle(client)
    stream = await api.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    cached = usage.prompt_tokens_details.cached_tokens or 0
    assert cached > 0 and cached % shared.cluster.settings.model.block_tokens == 0
    assert usage.model_extra["dualpath"]["computed_tokens"] == usage.prompt_tokens - cached  # type: ignore[index]


async def test_an_answer_that_ends_at_a_stop_string_has_ended(
    http: httpx.AsyncClient, api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster
) -> None:
    """Its usage is what that of any other answer is, and it is no cancelled request."""
    name = (await client.describe()).served_name
    options: dict[str, Any] = {"model": name, "prompt": f"stop {PROMPT}", "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = await api.completions.create(**options, max_tokens=6)
    await shared.settle(client)
    before = {outcome: await ended(http, outcome) for outcome in ("cancelled", "stop")}
    text = whole.choices[0].text
    cut = await api.completions.create(**options, max_tokens=500, stop=text[len(text) // 2 :])
    assert (cut.choices[0].finish_reason, cut.choices[0].text) == ("stop", text[: len(text) // 2])
    assert cut.usage is not None and cut.usage.prompt_tokens_details is not None
    cached = cut.usage.prompt_tokens_details.cached_tokens or 0
    read = cut.usage.model_extra["dualpath"]["read_bytes"]  # type: ignore[index]
    blocks = cached // shared.cluster.settings.model.block_tokens
    assert blocks > 0 and sum(read.values()) == blocks * (await client.facts()).geometry.full_block_bytes
    await shared.settle(client)
    assert {outcome: await ended(http, outcome) for outcome in ("cancelled", "stop")} == {**before, "stop": before["stop"] + 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_lost_client_frees_everything(http: httpx.AsyncClient, client: ClusterClient, shared: RunningCluster, stream: bool) -> None:
    name = (await client.describe()).served_name
    body = {"model": name, "messages": MESSAGES, "max_tokens": 700, "ignore_eos": True, "stream": stream}
    before = await ended(http, "cancelled")
    call = asyncio.create_task(http.post("/v1/chat/completions", json=body))
    await shared.wait_for(client, lambda status: bool(status["running"]))
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await shared.wait_for(client, lambda status: not status["running"])  # `client` checks that nothing else is left either
    assert await ended(http, "cancelled") == before + 1


async def test_metrics_say_where_the_first_token_s_time_went(
    http: httpx.AsyncClient, api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster
) -> None:
    name = (await client.describe()).served_name
    for _ in range(2):
        await api.completions.create(model=name, prompt=f"parts {PROMPT}", max_tokens=2, extra_body={"ignore_eos": True})
        await shared.settle(client)
    families = list(text_string_to_metric_families((await http.get("/metrics")).text))
    samples = [sample for family in families for sample in family.samples]

    def total(metric: str, **labels: str) -> float:
        found = [s.value for s in samples if s.name == metric and labels.items() <= s.labels.items()]
        assert found, f"there is no {metric} {labels}"
        return sum(found)

    parts = [total("dualpath_ttft_part_seconds_sum", part=part) for part in ("queue", "handshake", "allocate", "wire", "compute")]
    assert all(part > 0 for part in parts[1:])
    assert sum(parts) == pytest.approx(total("dualpath_ttft_seconds_sum"))
    assert total("dualpath_kv_read_wait_seconds_count") >= 1
    assert total("dualpath_hit_tokens_total", source="storage") >= total("dualpath_tokens_total", kind="cached") > 0
    assert total("dualpath_snic_busy_seconds_total", service="gateway") > 0
    for service in ("gateway", "prefill", "decode"):
        assert total("dualpath_cnic_busy_seconds_total", service=service) > 0
    assert total("dualpath_engine_busy_seconds_total", service="prefill") > 0
    assert total("dualpath_persisted_blocks_total") > 0
    assert total("dualpath_leases") == 0
    assert total("dualpath_scheduler_decision_seconds_count") >= 2


async def test_the_status_page_is_served_with_the_cluster_s_picture(
    http: httpx.AsyncClient, client: ClusterClient, shared: RunningCluster
) -> None:
    page = await http.get("/dashboard")
    status = (await http.get("/status")).json()
    assert page.headers["content-type"].startswith("text/html") and "<title>" in page.text
    assert set(status["processes"]) == {"p0", "d0", "prefill-p0-0", "decode-d0-0"}
    assert status["processes"]["d0"]["figures"]["persisted_bytes"] > 0


async def ended(http: httpx.AsyncClient, outcome: str) -> float:
    families = text_string_to_metric_families((await http.get("/metrics")).text)
    samples = [sample for family in families for sample in family.samples if sample.name == "dualpath_requests_total"]
    return sum(sample.value for sample in samples if sample.labels["outcome"] == outcome)


async def test_bad_requests_are_refused_and_the_service_lives_on(
    http: httpx.AsyncClient, api: openai.AsyncOpenAI, client: ClusterClient
) -> None:
    name = (await client.describe()).served_name
    assert (await http.post("/v1/chat/completions", content=b"{")).status_code == 400
    assert (await http.get("/nowhere")).json()["error"]["code"] == "unknown_url"
    assert (await http.get("/health")).json() == {"status": "ok"}
    assert "dualpath_requests_total" in (await http.get("/metrics")).text
    assert (await http.post("/v1/completions", content=b"x" * (33 << 20))).status_code == 413
    for wrong, code in (
        ({"model": "other"}, "model_not_found"),
        ({"max_tokens": 2000}, "context_length_exceeded"),
        ({"temperature": -1}, "invalid_value"),
    ):
        with pytest.raises(openai.APIStatusError) as caught:
            await api.chat.completions.create(**{"model": name, "messages": MESSAGES, **wrong})
        assert caught.value.code == code
    reply = await api.completions.create(model=name, prompt="still here", max_tokens=2, extra_body={"ignore_eos": True})
    assert reply.usage is not None and reply.usage.completion_tokens == 2


async def test_what_does_not_fit_is_refused_in_openai_s_shape(api: openai.AsyncOpenAI, client: ClusterClient) -> None:
    """By Serve's proxy: these requests never reach the application."""
    name = (await client.describe()).served_name
    options: dict[str, Any] = {"model": name, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
    calls = [api.completions.create(prompt=f"{index} {PROMPT}", **options) for index in range(40)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert 0 < len(refused) < 40
    for error in refused:
        assert isinstance(error, openai.RateLimitError)
        assert (error.code, error.type, error.response.headers["retry-after"]) == ("overloaded", "rate_limit_error", "1")


async def test_a_request_has_one_id(http: httpx.AsyncClient, api: openai.AsyncOpenAI, client: ClusterClient) -> None:
    """Proxy and application both know it; the stock client shows it with every answer."""
    name = (await client.describe()).served_name
    reply = await api.completions.create(model=name, prompt="x", max_tokens=1, extra_headers={"X-Request-Id": "my-id"})
    assert reply._request_id == "my-id" and reply.id.startswith("cmpl-my-id-")
    made = (await http.get("/v1/models", headers={"X-Request-Id": "not fit"})).headers.get_list("x-request-id")
    assert len(made) == 1 and made != ["not fit"]


async def test_a_dead_http_replica_is_worth_a_retry(api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster) -> None:
    name = (await client.describe()).served_name
    options: dict[str, Any] = {"model": name, "max_tokens": 300, "extra_body": {"ignore_eos": True}}
    calls = [asyncio.create_task(one.completions.create(prompt=PROMPT, **options)) for one in (api, api.with_options(max_retries=8))]
    await shared.wait_for(client, lambda status: status["running"] == 2)
    (replica,) = [one for one in psutil.Process().children(recursive=True) if "ServeReplica:test:Http" in " ".join(one.cmdline())]
    replica.kill()
    with pytest.raises(openai.InternalServerError) as caught:
        await calls[0]
    assert (caught.value.status_code, caught.value.code, caught.value.response.headers["retry-after"]) == (503, "unavailable", "1")
    assert (await calls[1]).choices[0].finish_reason == "length"


async def test_forms_choices_and_logprobs(api: openai.AsyncOpenAI, client: ClusterClient) -> None:
    name = (await client.describe()).served_name
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 99}}, "required": ["n"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    options: dict[str, Any] = {"model": name, "messages": MESSAGES, "seed": 1, "n": 2, "logprobs": True, "top_logprobs": 1}
    whole = await api.chat.completions.create(**options, max_tokens=40, response_format=form)
    texts = {choice.index: choice.message.content or "" for choice in whole.choices}
    assert all(set(json.loads(text)) == {"n"} for text in texts.values())
    assert all(item.logprob <= 0 for choice in whole.choices if choice.logprobs for item in choice.logprobs.content or [])
    streamed = {0: "", 1: ""}
    async for chunk in await api.chat.completions.create(**options, max_tokens=40, response_format=form, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": schema}}
    call = await api.chat.completions.create(
        model=name, messages=MESSAGES, max_tokens=80, tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert call.choices[0].finish_reason == "tool_calls"
    (called,) = call.choices[0].message.tool_calls or ()
    assert called.type == "function" and set(json.loads(called.function.arguments)) == {"n"}


async def test_tenants_share_no_blocks(api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster) -> None:
    name = (await client.describe()).served_name

    async def cached(tenant: str) -> int:
        reply = await api.completions.create(
            model=name, prompt=f"tenants {PROMPT}", max_tokens=1, extra_headers={"X-Tenant": tenant}, extra_body={"ignore_eos": True}
        )
        await shared.settle(client)
        assert reply.usage is not None and reply.usage.prompt_tokens_details is not None
        return reply.usage.prompt_tokens_details.cached_tokens or 0

    assert await cached("acme") == 0
    assert await cached("bolt") == 0
    assert await cached("acme") > 0


async def test_a_batch_gives_the_text_that_http_gives(
    api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster, tmp_path: Path
) -> None:
    card = await client.describe()
    service = OpenAIService(client, Tokenizer.from_directory(Path(card.model_path)), card, shared.cluster.settings.serving)
    bodies = [{"model": card.served_name, "prompt": f"{index} {PROMPT}", "max_tokens": 5, "temperature": 0} for index in range(6)]
    lines = [
        json.dumps({"custom_id": str(index), "method": "POST", "url": "/v1/completions", "body": body}).encode()
        for index, body in enumerate(bodies)
    ]
    path = tmp_path / "out.jsonl"
    with path.open("w") as results:
        await run_batch(service, lines, results, concurrency=3)
    answers = {result["custom_id"]: result["response"]["body"] for result in map(json.loads, path.read_text().splitlines())}
    for index, body in enumerate(bodies):
        reply = await api.completions.create(**body)  # type: ignore[call-overload]
        assert answers[str(index)]["choices"][0]["text"] == reply.choices[0].text


async def test_a_batch_over_http_outlives_its_runner(api: openai.AsyncOpenAI, client: ClusterClient, shared: RunningCluster) -> None:
    """From upload to results with the stock client; half-way the runner's process is killed, and Serve's next one goes on."""
    name = (await client.describe()).served_name
    body = {"model": name, "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    requests = [
        {"custom_id": str(index), "method": "POST", "url": "/v1/chat/completions", "body": {**body, "seed": index}} for index in range(40)
    ]
    lines = "".join(json.dumps(request) + "\n" for request in [*requests, {**requests[0], "custom_id": "bad", "body": {}}])
    file = await api.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
    batch = await api.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    (runner,) = [one for one in psutil.Process().children(recursive=True) if "ServeReplica:test:Batches" in " ".join(one.cmdline())]
    async with asyncio.timeout(120):
        while (batch := await api.batches.retrieve(batch.id)).status in ("validating", "in_progress"):
            if runner.is_running() and batch.request_counts and batch.request_counts.completed > 2:
                assert batch.request_counts.completed < 40
                runner.kill()
                runner.wait()
            await asyncio.sleep(0.1)
    assert not runner.is_running() and batch.status == "completed"
    counts = batch.request_counts
    assert counts is not None and (counts.total, counts.completed, counts.failed) == (41, 40, 1)
    results = [json.loads(line) for line in (await api.files.content(batch.output_file_id or "")).text.splitlines()]
    assert sorted(int(result["custom_id"]) for result in results) == list(range(40))
    assert len({result["response"]["body"]["choices"][0]["message"]["content"] for result in results}) == 1
    (failed,) = (await api.files.content(batch.error_file_id or "")).text.splitlines()
    assert (json.loads(failed)["custom_id"], json.loads(failed)["response"]["status_code"]) == ("bad", 400)
