"""What the service answers, before any transport has touched it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from openai.types import CompletionUsage
from pydantic import BaseModel

from deploy.openai_api.answers import Answer
from deploy.openai_api.choices import ChoicePart, Choices
from deploy.openai_api.errors import ApiError, api_error

_HERE = "\ue000"  # a character of nobody's, where a frame's text goes


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

    def __init__(self, answer: Answer, choices: Choices, first: ChoicePart, *, include_usage: bool) -> None:
        """`first` has been taken from `choices` already."""
        self._answer = answer
        self._choices = choices
        self._first = first
        self._include_usage = include_usage
        self._frames: dict[int, tuple[str, str]] = {}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events. A failure becomes an error event and ends the stream without `[DONE]`."""
        for index in range(self._choices.count):
            opening = self._answer.opening(index)
            if opening is not None:
                yield self._event(opening)
        try:
            for event in self._events_of(self._first):
                yield event
            async with aclosing(self._choices.parts()) as parts:
                async for part in parts:
                    for event in self._events_of(part):
                        yield event
            if self._include_usage:
                yield self._event(self._answer.usage(self._usage()))
        except Exception as error:
            yield f"data: {json.dumps(api_error(error).body())}\n\n"
        else:
            yield "data: [DONE]\n\n"

    async def aclose(self) -> None:
        await self._choices.aclose()

    def _events_of(self, part: ChoicePart) -> list[str]:
        events = []
        if part.logprobs is not None:
            if part.text or part.logprobs:
                events.append(self._event(self._answer.piece(part.index, part.text, part.logprobs)))
        elif part.text:
            events.append(self._text_event(part.index, part.text))
        for position, call in part.calls:
            events.append(self._event(self._answer.call(part.index, position, call)))
        if part.reason is not None:
            events.append(self._event(self._answer.closing(part.index, part.reason)))
        return events

    def _text_event(self, index: int, text: str) -> str:
        """The event of a piece of text alone. Most of a stream's events are such, and only their text differs: the rest is made once."""
        if index not in self._frames:
            head, tail = self._event(self._answer.piece(index, _HERE)).split(json.dumps(_HERE, ensure_ascii=False))
            self._frames[index] = head, tail
        head, tail = self._frames[index]
        return f"{head}{json.dumps(text, ensure_ascii=False)}{tail}"

    def _usage(self) -> CompletionUsage:
        return self._choices.usage()

    def _event(self, chunk: BaseModel) -> str:
        # Where a stream ends with the usage, OpenAI has a null in every other chunk; otherwise there is no such field.
        return f"data: {to_json(chunk, exclude=None if self._include_usage else {'usage'})}\n\n"


Reply = JsonReply | StreamReply


def to_json(answer: BaseModel, exclude: set[str] | None = None) -> str:
    return answer.model_dump_json(exclude_unset=True, exclude=exclude)


def json_object(value: Mapping[str, Any], status: int = 200) -> JsonReply:
    return JsonReply(status, json.dumps(value))
