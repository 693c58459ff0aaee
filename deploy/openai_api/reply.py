"""What the service answers, before any transport has touched it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from deploy.openai_api.answers import Answer
from deploy.openai_api.errors import ApiError, api_error
from dualpath_ray.serving.completion import TextDelta


@dataclass(frozen=True, slots=True)
class JsonReply:
    """A complete answer: `body` is JSON text."""

    status: int
    body: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: BaseModel) -> JsonReply:
        return cls(200, to_json(answer))

    @classmethod
    def of_error(cls, error: ApiError) -> JsonReply:
        return cls(error.status, json.dumps(error.body()), error.headers)


class StreamReply:
    """An answer that is still being generated. Its owner must call `aclose`, which cancels the generation unless it has ended."""

    def __init__(self, answer: Answer, first: TextDelta, rest: AsyncGenerator[TextDelta, None], *, include_usage: bool) -> None:
        self._answer = answer
        self._first = first
        self._rest = rest
        self._include_usage = include_usage

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events. A failure becomes an error event and ends the stream without `[DONE]`."""
        opening = self._answer.opening()
        if opening is not None:
            yield self._event(opening)
        try:
            async with aclosing(self._deltas()) as deltas:
                async for delta in deltas:
                    if delta.text:
                        yield self._event(self._answer.piece(delta.text))
                    if delta.finish_reason is not None:
                        yield self._event(self._answer.closing(delta.finish_reason))
                        if self._include_usage:
                            yield self._event(self._answer.usage(delta.usage))
        except Exception as error:
            yield f"data: {json.dumps(api_error(error).body())}\n\n"
        else:
            yield "data: [DONE]\n\n"

    async def aclose(self) -> None:
        await self._rest.aclose()

    async def _deltas(self) -> AsyncGenerator[TextDelta, None]:
        yield self._first
        async for delta in self._rest:
            yield delta

    def _event(self, chunk: BaseModel) -> str:
        # Where a stream ends with the usage, OpenAI has a null in every other chunk; otherwise there is no such field.
        return f"data: {to_json(chunk, exclude=None if self._include_usage else {'usage'})}\n\n"


Reply = JsonReply | StreamReply


def to_json(answer: BaseModel, exclude: set[str] | None = None) -> str:
    return answer.model_dump_json(exclude_unset=True, exclude=exclude)


def json_object(value: Mapping[str, Any], status: int = 200) -> JsonReply:
    return JsonReply(status, json.dumps(value))
