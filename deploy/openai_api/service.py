"""The generation endpoints: a body and a caller in, a reply out. HTTP and batch files both end here."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from pydantic_core import from_json

from deploy.openai_api.answers import ChatAnswer, TextAnswer
from deploy.openai_api.caller import Caller
from deploy.openai_api.choices import Choices
from deploy.openai_api.errors import ApiError, api_error
from deploy.openai_api.forms import check, grammar_of
from deploy.openai_api.reply import JsonReply, Reply, StreamReply, json_object
from deploy.openai_api.requests import ChatCompletionRequest, CompletionRequest, DetokenizeRequest, GenerationFields, TokenizeRequest
from deploy.openai_api.translation import generation_requests, stop_strings
from deploy.openai_api.unsupported import refuse_unsupported
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.errors import DualPathError, InvalidRequestError, OverloadedError
from dualpath_ray.grammars import Grammars
from dualpath_ray.requests import GenerationRequest, Generator
from dualpath_ray.serving.completion import TextDelta, complete
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer
from dualpath_ray.telemetry.exposition import Exposition

logger = logging.getLogger(__name__)

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


class Backend(Generator, Protocol):
    """The cluster as the service sees it."""

    async def describe(self) -> ModelCard:
        """The served model."""
        ...

    async def health(self) -> Mapping[str, Any]:
        """A JSON object whose `status` is "ok" while requests can be served."""
        ...

    async def status(self) -> Mapping[str, Any]:
        """A picture of the cluster as a JSON object."""
        ...

    async def metrics(self, accept: str = "") -> Exposition:
        """All processes' metrics in the text format that the HTTP header `accept` asks for."""
        ...


class OpenAIService:
    """Serves one model. Nothing here raises for what a client or the cluster did wrong: every such failure is a reply."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, card: ModelCard, limits: ServingSettings) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._card = card
        self._limits = limits
        self._grammars = Grammars(Path(card.model_path), None, card.eos_token_ids)
        self._started = int(time.time())
        self._active = 0

    async def generate(self, path: str, raw: bytes | Mapping[str, Any], caller: Caller) -> Reply:
        """Answer a body sent to `path` (CHAT or TEXT), as JSON text or parsed.

        A StreamReply has its first tokens already, and is the caller's to close.
        """
        try:
            body = _parse(raw) if isinstance(raw, bytes) else raw
            refuse_unsupported(body)
            if path == CHAT:
                return await self._chat(body, caller)
            if path == TEXT:
                return await self._text(body, caller)
            raise ApiError(404, f"there is no endpoint {path}; use {CHAT} or {TEXT}", code="unknown_url")
        except Exception as error:
            failure = api_error(error)
            logger.info("request %s: %d %s", caller.request_id, failure.status, failure.code)
            return JsonReply.of_error(failure)

    def models(self) -> JsonReply:
        return json_object({"object": "list", "data": [self._model_object()]})

    def model(self, name: str) -> JsonReply:
        if name != self._card.served_name:
            return JsonReply.of_error(self._unknown_model(name))
        return json_object(self._model_object())

    async def health(self) -> JsonReply:
        """200 while the cluster can serve requests, otherwise 503; what the cluster says about itself either way."""
        try:
            report = await self._backend.health()
        except DualPathError as error:
            return json_object({"status": "unavailable", "reason": str(error)}, 503)
        return json_object(report, 200 if report.get("status") == "ok" else 503)

    async def status(self) -> JsonReply:
        """What the scheduler knows, for people: `dualpath top` and the page at /dashboard."""
        try:
            return json_object(await self._backend.status())
        except DualPathError as error:
            return json_object({"status": "unavailable", "reason": str(error)}, 503)

    async def metrics(self, accept: str) -> Exposition:
        return await self._backend.metrics(accept)

    async def _chat(self, body: Mapping[str, Any], caller: Caller) -> Reply:
        fields = ChatCompletionRequest.model_validate(body)
        self._check_model(fields.model)
        tools = fields.offered_tools()
        tokens = await self._chat_tokens(fields, tools)
        name = _completion_id("chatcmpl", caller)
        answer = ChatAnswer(name, int(time.time()), fields.model, self._tokenizer)
        return await self._answer(fields, [tokens], answer, caller, calls=bool(tools))

    async def _text(self, body: Mapping[str, Any], caller: Caller) -> Reply:
        fields = CompletionRequest.model_validate(body)
        self._check_model(fields.model)
        prompts = await self._prompts(fields.prompt)
        answer = TextAnswer(_completion_id("cmpl", caller), int(time.time()), fields.model, self._tokenizer)
        return await self._answer(fields, prompts, answer, caller, calls=False)

    async def _answer(
        self, fields: GenerationFields, prompts: Sequence[tuple[int, ...]], answer: ChatAnswer | TextAnswer, caller: Caller, *, calls: bool
    ) -> Reply:
        if fields.stream_options is not None and not fields.stream:
            raise ApiError(400, "stream_options is only possible with stream", param="stream_options", code="invalid_value")
        self._check_tokens([int(token) for token in fields.logit_bias or ()], "logit_bias")
        requests = generation_requests(
            fields,
            prompts,
            request_id=answer.id,
            caller=caller,
            card=self._card,
            limits=self._limits,
            grammar=await self._grammar(fields),
        )
        stop = stop_strings(fields, self._limits)
        self._check_room(len(requests))
        streams = [self._admitted(request, stop) for request in requests]
        choices = Choices(streams, fields.n or 1, calls=calls, logprobs=fields.alternatives() is not None)
        try:
            # Before the status line goes out, so that a refusal is a status and not an event
            if fields.stream:
                include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
                return StreamReply(answer, choices, await choices.first(), include_usage=include_usage)
            finished = await choices.finished()
        except BaseException:
            await choices.aclose()
            raise
        await choices.aclose()
        return JsonReply.of(answer.whole(finished, choices.usage()))

    async def _grammar(self, fields: GenerationFields) -> str:
        grammar = grammar_of(fields)
        if grammar:
            await asyncio.to_thread(check, self._grammars, grammar, fields)
        return grammar

    async def _admitted(self, request: GenerationRequest, stop: Sequence[str]) -> AsyncGenerator[TextDelta, None]:
        """The completion, counted as active for as long as it runs."""
        self._check_room(1)
        self._active += 1
        try:
            async with aclosing(complete(self._backend, self._tokenizer, request, stop, self._limits.stream_interval_s)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._active -= 1

    def _check_room(self, requests: int) -> None:
        if self._active + requests > self._limits.max_concurrent_requests:
            raise OverloadedError(f"{self._active} requests are being served; try again later or add replicas (serving.replicas)")

    async def tokenize(self, raw: bytes) -> JsonReply:
        """Token ids of a prompt or of messages."""
        try:
            fields = TokenizeRequest.model_validate(_parse(raw))
            self._check_model(fields.model)
            if fields.prompt is not None:
                tokens = await self._tokenizer.encode_text(fields.prompt, special_tokens=fields.add_special_tokens)
            else:
                tokens = await self._chat_tokens(fields, [tool.model_dump(exclude_none=True) for tool in fields.tools or ()])
        except Exception as error:
            return JsonReply.of_error(api_error(error))
        return json_object({"count": len(tokens), "max_model_len": self._card.max_context, "tokens": list(tokens)})

    async def detokenize(self, raw: bytes) -> JsonReply:
        """Text of token ids, special tokens left out."""
        try:
            fields = DetokenizeRequest.model_validate(_parse(raw))
            self._check_model(fields.model)
            self._check_tokens(fields.tokens, "tokens")
            text = await asyncio.to_thread(self._tokenizer.decode, fields.tokens)
        except Exception as error:
            return JsonReply.of_error(api_error(error))
        return json_object({"prompt": text})

    async def _chat_tokens(self, fields: ChatCompletionRequest | TokenizeRequest, tools: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        messages = [message.for_template() for message in fields.messages or ()]
        try:
            return await self._tokenizer.encode_chat(messages, tools)
        except InvalidRequestError as error:
            raise ApiError(400, str(error), param="tools" if "tools" in str(error) else "messages", code="unsupported_messages") from error

    async def _prompts(self, prompt: str | list[int] | list[str] | list[list[int]]) -> list[tuple[int, ...]]:
        several: list[Any] = prompt if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list) else [prompt]
        if len(several) > self._limits.max_choices:
            raise ApiError(
                400,
                f"{len(several)} prompts in one request; at most {self._limits.max_choices} are possible (serving.max_choices)",
                param="prompt",
                code="invalid_value",
            )
        prompts = [await self._tokenizer.encode_text(one) if isinstance(one, str) else tuple(one) for one in several]
        for tokens in prompts:
            if not tokens:
                raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
            self._check_tokens(tokens, "prompt")
        return prompts

    def _check_tokens(self, tokens: Sequence[int], param: str) -> None:
        if tokens and max(tokens) >= self._tokenizer.vocabulary:
            raise ApiError(400, f"token ids must be less than {self._tokenizer.vocabulary}", param=param, code="invalid_value")

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._card.served_name:
            raise self._unknown_model(name)

    def _unknown_model(self, name: str) -> ApiError:
        message = f"the model {name[:100]!r} does not exist; this service has {self._card.served_name!r}"
        return ApiError(404, message, param="model", code="model_not_found")

    def _model_object(self) -> dict[str, Any]:
        return {
            "id": self._card.served_name,
            "object": "model",
            "created": self._started,
            "owned_by": "dualpath-ray",
            "max_model_len": self._card.max_context,
        }


def _parse(raw: bytes) -> Mapping[str, Any]:
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def _completion_id(prefix: str, caller: Caller) -> str:
    """Unique even when a client uses an X-Request-Id twice, and still to be found by it in logs and traces."""
    return f"{prefix}-{caller.request_id}-{secrets.token_hex(4)}"
