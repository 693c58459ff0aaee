"""Choices, log probabilities, tools, forms and tokenizing, through the stock OpenAI client; every body is valid for its types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deploy.http_api.api import make_api
from deploy.openai_api.service import OpenAIService
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.errors import OverloadedError
from dualpath_ray.requests import SamplingParams
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.deploy.conftest import ANSWER
from tests.unit.deploy.emulation import EmulatedCluster

HELLO: Any = [{"role": "user", "content": "Hello"}]
TOOL: Any = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


async def test_sampling_parameters_reach_the_cluster(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        seed=1,
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"7": 3, "5": -100},
        logprobs=True,
        top_logprobs=2,
        extra_body={
            "min_p": 0.1,
            "repetition_penalty": 1.5,
            "agent_hints": {"priority": -3, "deadline_s": 9.5, "next_turn_s": 2},
        },
        extra_headers={"X-Session-Id": "s-1"},
    )
    request = cluster.requests[0]
    assert request.sampling == SamplingParams(
        1.0, seed=1, min_p=0.1, frequency_penalty=0.5, presence_penalty=-1, repetition_penalty=1.5,
        logit_bias=((5, -100), (7, 3)), logprobs=2,
    )  # fmt: skip
    assert (request.priority, request.timeout, request.next_turn_s, request.session) == (-3, 9.5, 2, "s-1")


async def test_n_choices_have_seeds_of_their_own(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    for _ in range(2):
        reply = await client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=5)
        assert [choice.index for choice in reply.choices] == [0, 1, 2]
        assert [choice.message.content for choice in reply.choices] == [ANSWER] * 3
    seeds = [request.sampling.seed for request in cluster.requests]
    assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:] and seeds[0] == 5
    assert len({request.request_id for request in cluster.requests}) == 6
    usage = reply.usage
    assert usage is not None
    prompt = len(cluster.requests[0].tokens)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, 3 * (len(cluster.answer) + 1))


async def test_n_choices_stream_together(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, n=2, stream=True, stream_options={"include_usage": True})
    texts, reasons, usage = {0: "", 1: ""}, {}, None
    async for chunk in stream:
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == {0: ANSWER, 1: ANSWER} and reasons == {0: "stop", 1: "stop"}
    assert usage is not None and usage.completion_tokens == 2 * (len(cluster.answer) + 1)


async def test_several_prompts(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    reply = await client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    tokens = [request.tokens for request in cluster.requests]
    assert tokens[0] == tokens[1] != tokens[2] == tokens[3]
    assert reply.usage is not None and reply.usage.prompt_tokens == len(tokens[0]) + len(tokens[2])


async def test_one_refused_choice_ends_all(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    with pytest.raises(openai.RateLimitError):  # four at once is the service's limit
        await client.chat.completions.create(model="tiny", messages=HELLO, n=5, stream=True)
    assert not cluster.running
    cluster.failure, cluster.fail_at = OverloadedError("full"), 3
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="tiny", messages=HELLO, n=2)
    assert not cluster.running


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(client: openai.AsyncOpenAI, cluster: EmulatedCluster, stream: bool) -> None:
    options: Any = {"model": "tiny", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
    if stream:
        chunks = [chunk async for chunk in await client.chat.completions.create(stream=True, **options)]
        told = [item for chunk in chunks if chunk.choices[0].logprobs for item in chunk.choices[0].logprobs.content or []]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    else:
        choice = (await client.chat.completions.create(**options)).choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        told, text = choice.logprobs.content, choice.message.content or ""
    assert text == ANSWER
    assert len(told) == len(cluster.answer)  # without the end of sequence
    assert b"".join(bytes(item.bytes or []) for item in told).decode() == ANSWER
    assert {(item.logprob, len(item.top_logprobs)) for item in told} == {(-0.5, 2)}
    assert told[0].top_logprobs[0].token == told[0].token


async def test_completion_logprobs(client: openai.AsyncOpenAI, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    told = (await client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=4)).choices[0].logprobs
    assert told is not None and told.tokens and told.text_offset and told.top_logprobs
    assert told.token_logprobs == [-0.5] * 4
    assert "".join(told.tokens) == tokenizer.decode(cluster.answer[:4])
    assert told.text_offset == [len("".join(told.tokens[:index])) for index in range(4)]
    chunks = [chunk async for chunk in await client.completions.create(model="tiny", prompt="x", logprobs=1, max_tokens=4, stream=True)]
    streamed = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    assert [offset for one in streamed for offset in one.text_offset or []] == told.text_offset


@pytest.mark.parametrize("stream", [False, True])
async def test_tool_calls(cluster: EmulatedCluster, tokenizer: Tokenizer, limits: ServingSettings, stream: bool) -> None:
    card = replace(cluster.card, max_context=1000)
    transport = httpx.ASGITransport(make_api(OpenAIService(cluster, tokenizer, card, limits), limits))
    http = httpx.AsyncClient(transport=transport, base_url="http://test")
    client = openai.AsyncOpenAI(base_url="http://test/v1", api_key="unused", http_client=http)  # type: ignore[arg-type]
    cluster.answer = tokenizer.encode(f"Let me see.\n{CALL}\n{CALL}", special_tokens=False)
    options: Any = {"model": "tiny", "messages": HELLO, "tools": [TOOL], "max_tokens": 500}
    if stream:
        text, reason = "", None
        calls: dict[int, Any] = {}
        async for chunk in await client.chat.completions.create(stream=True, **options):
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            calls |= {call.index: call for call in choice.delta.tool_calls or []}
        found = [calls[index] for index in sorted(calls)]
    else:
        answer = (await client.chat.completions.create(**options)).choices[0]
        text, reason, found = answer.message.content or "", answer.finish_reason, list(answer.message.tool_calls or [])
    assert (text, reason) == ("Let me see.", "tool_calls")
    assert [(call.type, call.function.name, json.loads(call.function.arguments)) for call in found] == [
        ("function", "get_weather", {"city": "Oslo"})
    ] * 2
    assert len({call.id for call in found}) == 2
    prompt = tokenizer.decode(cluster.requests[0].tokens)
    assert "get_weather" in prompt


async def test_tool_choice(client: openai.AsyncOpenAI, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    cluster.answer = tokenizer.encode(CALL, special_tokens=False)
    reply = await client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], tool_choice="none")
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == (CALL, "stop")
    assert "get_weather" not in tokenizer.decode(cluster.requests[0].tokens)
    named: Any = {"type": "function", "function": {"name": "get_weather"}}
    for choice in ("required", named):
        await client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL], tool_choice=choice)
        assert "get_weather" in cluster.requests[-1].sampling.grammar
    await client.chat.completions.create(model="tiny", messages=HELLO, tools=[TOOL])
    assert cluster.requests[-1].sampling.grammar == ""


async def test_forms_become_grammars(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True}}
    for response_format in (schema, {"type": "json_object"}):
        await client.chat.completions.create(model="tiny", messages=HELLO, response_format=response_format)
        assert "json_schema" in cluster.requests[-1].sampling.grammar
    for form in ({"regex": "[a-z]+"}, {"choice": ["a", "b"]}, {"grammar": 'start: "x"'}, {"json": {"type": "integer"}}):
        await client.completions.create(model="tiny", prompt="x", extra_body={"structured_outputs": form})
        assert cluster.requests[-1].sampling.grammar


async def test_tokens_and_back(http: httpx.AsyncClient, tokenizer: Tokenizer, cluster: EmulatedCluster) -> None:
    reply = (await http.post("/tokenize", json={"model": "tiny", "prompt": "one two"})).json()
    assert tuple(reply["tokens"]) == tokenizer.encode("one two", special_tokens=True)
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), 200)
    assert (await http.post("/detokenize", json={"tokens": reply["tokens"]})).json() == {"prompt": "one two"}
    chat = (await http.post("/tokenize", json={"messages": HELLO})).json()
    await http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO})
    assert tuple(chat["tokens"]) == cluster.requests[-1].tokens
    for path, body, status in (
        ("/tokenize", {"model": "other", "prompt": "x"}, 404),
        ("/tokenize", {}, 400),
        ("/detokenize", {"tokens": [512]}, 400),
        ("/detokenize", {"tokens": "x"}, 400),
    ):
        assert (await http.post(path, json=body)).status_code == status


@pytest.mark.parametrize("options", [{}, {"logprobs": True}])
async def test_no_character_of_a_text_ends_an_event(
    http: httpx.AsyncClient, cluster: EmulatedCluster, tokenizer: Tokenizer, options: dict[str, Any]
) -> None:
    """Clients that split at Unicode's line ends, as httpx does, lose nothing."""
    text = "one\x85two\u2028three\u2029."
    cluster.answer = tokenizer.encode(text, special_tokens=False)
    async with http.stream("POST", "/v1/chat/completions", json={"messages": HELLO, "model": "tiny", "stream": True, **options}) as reply:
        events = [line.removeprefix("data: ") async for line in reply.aiter_lines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events) == text


@pytest.mark.parametrize("options", [{}, {"logprobs": True, "top_logprobs": 1}, {"n": 2}, {"tools": [TOOL]}])
async def test_bodies_are_valid_for_openais_types(http: httpx.AsyncClient, options: dict[str, Any]) -> None:
    """The client itself accepts anything."""
    body = {"model": "tiny", "messages": HELLO, **options}
    ChatCompletion.model_validate_json((await http.post("/v1/chat/completions", json=body)).content)
    streamed = (await http.post("/v1/chat/completions", json={**body, "stream": True})).text
    events = [line.removeprefix("data: ") for line in streamed.splitlines() if line]
    assert events.pop() == "[DONE]"
    for event in events:
        ChatCompletionChunk.model_validate_json(event)
    if "tools" not in options:
        text = {"model": "tiny", "prompt": "x", "logprobs": 2, "n": options.get("n", 1)}
        Completion.model_validate_json((await http.post("/v1/completions", json=text)).content)
