"""The service through the stock OpenAI client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from deploy.openai_api.caller import Caller
from deploy.openai_api.reply import StreamReply
from deploy.openai_api.service import CHAT, OpenAIService
from dualpath_ray import errors
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.requests import SamplingParams
from dualpath_ray.serving.tokenizer import Tokenizer
from tests.unit.deploy.conftest import ANSWER
from tests.unit.deploy.emulation import EmulatedCluster

HELLO: Any = [{"role": "user", "content": "Hello"}]


async def test_chat(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    reply = await client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, seed=-3, user="someone")
    choice = reply.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert reply.object == "chat.completion"
    assert reply.id == cluster.requests[0].request_id
    assert not cluster.closed
    usage = reply.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    prompt = len(cluster.requests[0].tokens)
    assert (usage.prompt_tokens, usage.completion_tokens) == (prompt, len(cluster.answer) + 1)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == prompt // 2
    extension = usage.model_extra["dualpath"]  # type: ignore[index]
    assert extension["read_bytes"] == {"prefill_node": 10, "decode_node": 20}
    assert extension["computed_tokens"] == prompt - prompt // 2


async def test_chat_streams_role_text_reason_and_usage(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    stream = await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(pieces) == ANSWER
    assert len([piece for piece in pieces if piece]) > 5
    assert not any("\ufffd" in piece for piece in pieces)
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(cluster.answer) + 1
    assert {chunk.id for chunk in chunks} == {cluster.requests[0].request_id}
    assert not cluster.running and not cluster.closed


async def test_tokens_faster_than_the_interval_share_an_event(
    cluster: EmulatedCluster, tokenizer: Tokenizer, limits: ServingSettings
) -> None:
    service = OpenAIService(cluster, tokenizer, cluster.card, limits.model_copy(update={"stream_interval_s": 10}))
    reply = await service.generate(CHAT, {"model": "tiny", "messages": HELLO, "stream": True, "logprobs": True}, Caller("r"))
    assert isinstance(reply, StreamReply)
    begin, rest = [events async for events in reply.events()]
    await reply.aclose()
    chunks = [json.loads(line.removeprefix("data: ")) for line in (begin + rest).split("\n\n")[:-2]]
    deltas = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert len(deltas) == 4 and deltas[0] == deltas[-1] == "" and "".join(deltas) == ANSWER  # the role, one token, the others, the reason
    told = [len((chunk["choices"][0].get("logprobs") or {"content": []})["content"]) for chunk in chunks]
    assert told == [0, 1, len(cluster.answer) - 1, 0]
    assert rest.endswith("data: [DONE]\n\n")
    assert not cluster.running and not cluster.closed


async def test_stream_without_usage(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    assert all([chunk.choices and "usage" not in chunk.model_fields_set async for chunk in stream])


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_cancels_the_rest(
    client: openai.AsyncOpenAI, cluster: EmulatedCluster, tokenizer: Tokenizer, stream: bool
) -> None:
    expected = ANSWER[: ANSWER.index("r is 4")]
    if stream:
        chunks = await client.chat.completions.create(model="tiny", messages=HELLO, stop=["no", "r is 4"], stream=True)
        choices = [chunk.choices[0] async for chunk in chunks]
        text, reason = "".join(choice.delta.content or "" for choice in choices), choices[-1].finish_reason
    else:
        reply = await client.chat.completions.create(model="tiny", messages=HELLO, stop=["no", "r is 4"])
        text, reason = reply.choices[0].message.content or "", reply.choices[0].finish_reason
    assert (text, reason) == (expected, "stop")
    assert cluster.closed == [cluster.requests[0].request_id]
    assert not cluster.running


async def test_completions_take_text_and_tokens(client: openai.AsyncOpenAI, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    tokens = list(tokenizer.encode("one two", special_tokens=True))
    for prompt in ("one two", ["one two"], tokens, [tokens]):
        reply = await client.completions.create(model="tiny", prompt=prompt, max_tokens=5)
        assert (reply.object, reply.choices[0].finish_reason) == ("text_completion", "length")
        assert reply.choices[0].text == tokenizer.decode(cluster.answer[:5])
    assert {request.tokens for request in cluster.requests} == {tuple(tokens)}


async def test_completions_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.completions.create(model="tiny", prompt="x", stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-2:] == [None, "stop"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 5


async def test_parameters_reach_the_cluster(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=9,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.25,
        seed=11,
        extra_body={"top_k": 3, "ignore_eos": True, "min_tokens": 2, "cache_salt": "s", "timeout": 5},
        extra_headers={"X-Tenant": "acme", "X-Request-Id": "abc", "traceparent": "00-1-2-01"},
    )
    request = cluster.requests[0]
    assert request.sampling == SamplingParams(0.5, 0.25, 3, 11)
    assert (request.max_new_tokens, request.min_new_tokens, request.stop_token_ids) == (7, 2, ())
    assert (request.tenant, request.timeout, request.trace) == ("acme", 5, {"traceparent": "00-1-2-01"})
    assert (request.salt, request.block_salt) == ("s", "acme\x1fs")
    assert request.request_id.startswith("chatcmpl-abc-")


async def test_defaults(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    for _ in range(2):
        await client.chat.completions.create(model="tiny", messages=HELLO, top_p=None, extra_body={"top_k": -1})
    first, second = cluster.requests
    assert (first.sampling.temperature, first.sampling.top_p, first.sampling.top_k) == (1.0, 1.0, 0)
    assert first.sampling.seed != second.sampling.seed
    assert (first.max_new_tokens, first.tenant, first.timeout) == (64, "", 600.0)
    await client.completions.create(model="tiny", prompt=[5] * 190)
    assert cluster.requests[-1].max_new_tokens == 10  # never past the context


async def test_messages_of_agents(client: openai.AsyncOpenAI, cluster: EmulatedCluster, tokenizer: Tokenizer) -> None:
    await client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}],
            },
            {"role": "tool", "content": "out", "tool_call_id": "1"},
        ],
        max_tokens=1,
    )
    prompt = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\nout<|im_end|>\n<|im_start|>assistant\n"
    )
    assert cluster.requests[0].tokens == tokenizer.encode(prompt, special_tokens=False)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).model_extra["max_model_len"] == 200  # type: ignore[index]
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("some/other")


@pytest.mark.parametrize(
    ("failure", "raised", "code"),
    [
        (errors.InvalidRequestError("no"), openai.BadRequestError, None),
        (errors.OverloadedError("full"), openai.RateLimitError, "overloaded"),
        (errors.DeadlineExceededError("late"), openai.InternalServerError, "deadline_exceeded"),
        (errors.TransferError("peer died"), openai.InternalServerError, "unavailable"),
        (RuntimeError("a secret detail"), openai.InternalServerError, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_failures_before_the_first_token_are_statuses(
    client: openai.AsyncOpenAI, cluster: EmulatedCluster, failure: Exception, raised: type[openai.APIStatusError], code: str, stream: bool
) -> None:
    cluster.failure = failure
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert caught.value.code == code
    assert "secret" not in caught.value.message


async def test_failure_in_a_stream_is_an_error_event(client: openai.AsyncOpenAI, cluster: EmulatedCluster) -> None:
    cluster.failure, cluster.fail_at = errors.TransferError("engine lost"), 3
    stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="engine lost"):
        async for _ in stream:
            pass
    assert not cluster.running
