"""What the service answers, before any transport has touched it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

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
        self._open = choices.count  # choices that have not ended
        self._frames: dict[int, tuple[str, str]] = {}

    async def events(self) -> AsyncGenerator[str, None]:
        """Server-sent events, those that are there at once in one piece. A failure becomes an error event and ends the stream without
        `[DONE]`.
        """
        openings = [self._answer.opening(index) for index in range(self._choices.count)]
        begin = "".join(self._event(opening) for opening in openings if opening is not None)
        try:
            if events := begin + self._events_of(self._first):
                yield events
            async with aclosing(self._choices.parts()) as parts:
                async for part in parts:
                    if events := self._events_of(part):
                        yield events
        except Exception as error:
            failure = api_error(error)
            if self._open:
                yield f"data: {json.dumps(failure.body())}\n\n"

    async def aclose(self) -> None:
        await self._choices.aclose()

    def _events_of(self, part: ChoicePart) -> str:
        """The events of a part, and with the last one those that end the stream."""
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
            self._open -= 1
        if not self._open:
            if self._include_usage:
                events.append(self._event(self._answer.usage(self._choices.usage())))
            events.append("data: [DONE]\n\n")
        return "".join(events)

    def _text_event(self, index: int, text: str) -> str:
        """The event of a piece of text alone. Most of a stream's events are such, and only their text differs: the rest is made once."""
        if index not in self._frames:
            head, tail = self._event(self._answer.piece(index, _HERE)).split(json.dumps(_HERE, ensure_ascii=False))
            self._frames[index] = head, tail
        head, tail = self._frames[index]
        return f"{head}{on_one_line(json.dumps(text, ensure_ascii=False))}{tail}"

    def _event(self, chunk: BaseModel) -> str:
        # Where a stream ends with the usage, OpenAI has a null in every other chunk; otherwise there is no such field.
        return f"data: {to_json(chunk, exclude=None if self._include_usage else {'usage'})}\n\n"


Reply = JsonReply | StreamReply


def to_json(answer: BaseModel, exclude: set[str] | None = None) -> str:
    return on_one_line(answer.model_dump_json(exclude_unset=True, exclude=exclude))


def on_one_line(text: str) -> str:
    """JSON `text` without the three line ends of Unicode that JSON leaves in strings as they are.

    `str.splitlines`, httpx's `iter_lines` and others cut events and result lines in two there.
    """
    return text.replace("\x85", r"\u0085").replace("\u2028", r"\u2028").replace("\u2029", r"\u2029")


def json_object(value: Mapping[str, Any], status: int = 200) -> JsonReply:
    return JsonReply(status, json.dumps(value))
