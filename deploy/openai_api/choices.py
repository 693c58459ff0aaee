"""A request's choices while they are generated: text, function calls and log probabilities, in pieces or whole."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from openai.types import CompletionUsage

from deploy.openai_api.answers import Finish, FinishedChoice, TokenFigures, usage_object
from deploy.openai_api.merging import merged
from dualpath_ray.requests import FinishReason, GenerationUsage
from dualpath_ray.serving.completion import TextDelta
from dualpath_ray.serving.tool_calls import ToolCall, ToolCallParser


@dataclass(frozen=True, slots=True)
class ChoicePart:
    """What is new of choice `index`. `calls` are numbered through the choice; `logprobs` is None unless asked for."""

    index: int
    text: str
    calls: tuple[tuple[int, ToolCall], ...] = ()
    reason: Finish | None = None
    logprobs: tuple[TokenFigures, ...] | None = None


class Choices:
    """The completions of one request, `per_prompt` for each of its prompts. To be closed by its owner."""

    def __init__(self, streams: Sequence[AsyncGenerator[TextDelta, None]], per_prompt: int, *, calls: bool, logprobs: bool) -> None:
        """`calls`: function calls are taken out of the text; `logprobs`: they were asked for."""
        self.count = len(streams)
        self._per_prompt, self._logprobs = per_prompt, logprobs
        self._merged = merged(streams)
        self._parsers = [ToolCallParser() if calls else None for _ in streams]
        self._calls = [0] * len(streams)
        self._usages: list[GenerationUsage | None] = [None] * len(streams)

    async def first(self) -> ChoicePart:
        """Raises what the cluster refused a choice with."""
        index, delta = await anext(self._merged)
        return self._part(index, delta)

    async def parts(self) -> AsyncGenerator[ChoicePart, None]:
        """The parts that have not been taken yet."""
        async for index, delta in self._merged:
            yield self._part(index, delta)

    async def finished(self) -> list[FinishedChoice]:
        """All choices, whole."""
        texts: list[list[str]] = [[] for _ in range(self.count)]
        calls: list[list[ToolCall]] = [[] for _ in range(self.count)]
        logprobs: list[list[TokenFigures]] = [[] for _ in range(self.count)]
        reasons: dict[int, Finish] = {}
        async for part in self.parts():
            texts[part.index].append(part.text)
            calls[part.index] += [call for _, call in part.calls]
            logprobs[part.index] += part.logprobs or ()
            if part.reason is not None:
                reasons[part.index] = part.reason
        return [
            FinishedChoice("".join(texts[index]), reasons[index], calls[index], logprobs[index] if self._logprobs else None)
            for index in range(self.count)
        ]

    def usage(self) -> CompletionUsage:
        return usage_object([one for one in self._usages if one is not None], self._per_prompt)

    async def aclose(self) -> None:
        await self._merged.aclose()

    def _part(self, index: int, delta: TextDelta) -> ChoicePart:
        self._usages[index] = delta.usage
        logprobs = delta.logprobs if self._logprobs else None
        parser = self._parsers[index]
        if parser is None:
            return ChoicePart(index, delta.text, (), _finish(delta.finish_reason), logprobs)
        pieces = parser.push(delta.text, last=delta.finish_reason is not None)
        calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
        numbered = tuple(enumerate(calls, start=self._calls[index]))
        self._calls[index] += len(calls)
        reason = _finish(delta.finish_reason)
        if reason == "stop" and self._calls[index]:
            reason = "tool_calls"
        return ChoicePart(index, "".join(piece for piece in pieces if isinstance(piece, str)), numbered, reason, logprobs)


def _finish(reason: FinishReason | None) -> Finish | None:
    return None if reason is None or reason == "cancelled" else reason
