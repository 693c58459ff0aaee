"""The generation endpoints: a body and a caller in, a reply out. HTTP and batch files both end here."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from pydantic_core import from_json

from deploy.openai_api.answers import Answer, ChatAnswer, TextAnswer
from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError, api_error
from deploy.openai_api.reply import JsonReply, Reply, StreamReply, json_object
from deploy.openai_api.requests import ChatCompletionRequest, CompletionRequest, GenerationFields
from deploy.openai_api.translation import generation_request, stop_strings
from deploy.openai_api.unsupported import refuse_unsupported
from dualpath_ray.config.serving import ServingSettings
from dualpath_ray.errors import DualPathError, OverloadedError
from dualpath_ray.requests import GenerationRequest, Generator
from dualpath_ray.serving.completion import TextDelta, complete
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.serving.tokenizer import Tokenizer

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

    async def metrics(self) -> str:
        """All processes' metrics in Prometheus' text format."""
        ...


class OpenAIService:
    """Serves one model. Nothing here raises for what a client or the cluster did wrong: every such failure is a reply."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, card: ModelCard, limits: ServingSettings) -> None:
        self._backend = backend
        self._tokenizer = tokenizer
        self._card = card
        self._limits = limits
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

    async def metrics(self) -> str:
        return await self._backend.metrics()

    async def _chat(self, body: Mapping[str, Any], caller: Caller) -> Reply:
        fields = ChatCompletionRequest.model_validate(body)
        self._check_model(fields.model)
        tokens = await self._tokenizer.encode_chat([message.for_template() for message in fields.messages])
        name = _completion_id("chatcmpl", caller)
        return await self._answer(fields, tokens, ChatAnswer(name, int(time.time()), fields.model), name, caller)

    async def _text(self, body: Mapping[str, Any], caller: Caller) -> Reply:
        fields = CompletionRequest.model_validate(body)
        self._check_model(fields.model)
        tokens = await self._prompt_tokens(fields.prompt)
        name = _completion_id("cmpl", caller)
        return await self._answer(fields, tokens, TextAnswer(name, int(time.time()), fields.model), name, caller)

    async def _answer(self, fields: GenerationFields, tokens: tuple[int, ...], answer: Answer, name: str, caller: Caller) -> Reply:
        if fields.stream_options is not None and not fields.stream:
            raise ApiError(400, "stream_options is only possible with stream", param="stream_options", code="invalid_value")
        request = generation_request(fields, tokens, request_id=name, caller=caller, card=self._card, limits=self._limits)
        deltas = self._admitted(request, stop_strings(fields, self._limits))
        if fields.stream:
            include_usage = bool(fields.stream_options and fields.stream_options.include_usage)
            # Before the status line goes out, so that a refusal is a status and not an event
            first = await anext(deltas)
            return StreamReply(answer, first, deltas, include_usage=include_usage)
        async with aclosing(deltas):
            collected = [delta async for delta in deltas]
        last = collected[-1]
        assert last.finish_reason is not None  # `complete` ends no other way
        return JsonReply.of(answer.whole("".join(delta.text for delta in collected), last.finish_reason, last.usage))

    async def _admitted(self, request: GenerationRequest, stop: Sequence[str]) -> AsyncGenerator[TextDelta, None]:
        """The completion, counted as active for as long as it runs."""
        if self._active >= self._limits.max_concurrent_requests:
            raise OverloadedError(f"{self._active} requests are being served; try again later or add replicas (serving.replicas)")
        self._active += 1
        try:
            async with aclosing(complete(self._backend, self._tokenizer, request, stop)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._active -= 1

    async def _prompt_tokens(self, prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[int, ...]:
        one: Any = prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise ApiError(400, f"{len(prompt)} prompts in one request are not supported; send one each", param="prompt")
            one = prompt[0]
        tokens = await self._tokenizer.encode_text(one) if isinstance(one, str) else tuple(one)
        if not tokens:
            raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
        if max(tokens) >= self._tokenizer.vocabulary:
            raise ApiError(400, f"token ids must be less than {self._tokenizer.vocabulary}", param="prompt", code="invalid_value")
        return tokens

    def _check_model(self, name: str) -> None:
        if name != self._card.served_name:
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
