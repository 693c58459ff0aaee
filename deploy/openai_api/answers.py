"""Generated text as OpenAI's response objects: whole, or as the events of a stream.

The types are the `openai` package's own, so that what is sent is what its clients parse. Streams and whole answers of one kind share
a class with the same verbs for both kinds.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta, ChoiceDeltaToolCall, ChoiceDeltaToolCallFunction
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import ChatCompletionMessageFunctionToolCall, Function
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from dualpath_ray.requests import GenerationUsage, TokenLogprobs
from dualpath_ray.serving.tokenizer import Tokenizer
from dualpath_ray.serving.tool_calls import ToolCall

Finish = Literal["stop", "length", "tool_calls"]
TokenFigures = tuple[int, TokenLogprobs]


@dataclass(slots=True)
class FinishedChoice:
    """One of a request's answers. `logprobs` is None unless asked for."""

    text: str
    reason: Finish
    calls: Sequence[ToolCall] = ()
    logprobs: Sequence[TokenFigures] | None = None


def usage_object(usages: Sequence[GenerationUsage], per_prompt: int = 1) -> CompletionUsage:
    """OpenAI's usage of all choices (`per_prompt` successive ones share a prompt, which counts once), with our extension `dualpath`.

    `computed_tokens` of the prompts were computed and `prompt_tokens_details.cached_tokens` were not; `read_bytes` of KV came through
    the storage NIC of the prefill and of the decode node; `queue_s`, `read_s` and `prefill_s` are seconds, of the slowest choice;
    `attempts` counts assignments, more than one per choice after a failure; the engines are those of the first choice.
    """
    first = usages[0]
    read_bytes: Counter[str] = Counter()
    for one in usages:
        read_bytes.update(one.read_bytes)
    extension = {
        "computed_tokens": sum(one.computed_tokens for one in usages),
        "read_bytes": dict(read_bytes),
        "prefill_engine": first.prefill_engine,
        "decode_engine": first.decode_engine,
        "attempts": sum(one.attempts for one in usages),
        "queue_s": round(max(one.queue_s for one in usages), 6),
        "read_s": round(max(one.read_s for one in usages), 6),
        "prefill_s": round(max(one.prefill_s for one in usages), 6),
    }
    prompt_tokens = sum(one.prompt_tokens for one in usages[::per_prompt])
    completion_tokens = sum(one.completion_tokens for one in usages)
    return CompletionUsage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(one.cached_tokens for one in usages[::per_prompt])),
        dualpath=extension,  # type: ignore[call-arg]  # the package's models keep extra fields
    )


class Answer(Protocol):
    """One reply's objects. `whole` is the unstreamed reply; the others are a stream's events, `index` being the choice they belong to."""

    def whole(self, choices: Sequence[FinishedChoice], usage: CompletionUsage) -> BaseModel: ...
    def opening(self, index: int) -> BaseModel | None: ...
    def piece(self, index: int, text: str, logprobs: Sequence[TokenFigures] | None = None) -> BaseModel: ...
    def call(self, index: int, position: int, call: ToolCall) -> BaseModel: ...
    def closing(self, index: int, reason: Finish) -> BaseModel: ...
    def usage(self, usage: CompletionUsage) -> BaseModel: ...


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    id: str
    created: int
    model: str
    tokenizer: Tokenizer

    def whole(self, choices: Sequence[FinishedChoice], usage: CompletionUsage) -> ChatCompletion:
        return ChatCompletion(
            id=self.id,
            object="chat.completion",
            created=self.created,
            model=self.model,
            choices=[self._choice(index, choice) for index, choice in enumerate(choices)],
            usage=usage,
        )

    def opening(self, index: int) -> ChatCompletionChunk:
        return self._chunk([ChunkChoice(index=index, delta=ChoiceDelta(role="assistant", content=""), finish_reason=None)])

    def piece(self, index: int, text: str, logprobs: Sequence[TokenFigures] | None = None) -> ChatCompletionChunk:
        choice = ChunkChoice(index=index, delta=ChoiceDelta(content=text), finish_reason=None)
        if logprobs is not None:
            choice.logprobs = ChunkLogprobs(content=[self._figures(*one) for one in logprobs], refusal=None)
        return self._chunk([choice])

    def call(self, index: int, position: int, call: ToolCall) -> ChatCompletionChunk:
        function = ChoiceDeltaToolCallFunction(name=call.name, arguments=call.arguments)
        delta = ChoiceDelta(tool_calls=[ChoiceDeltaToolCall(index=position, id=_call_id(), type="function", function=function)])
        return self._chunk([ChunkChoice(index=index, delta=delta, finish_reason=None)])

    def closing(self, index: int, reason: Finish) -> ChatCompletionChunk:
        return self._chunk([ChunkChoice(index=index, delta=ChoiceDelta(), finish_reason=reason)])

    def usage(self, usage: CompletionUsage) -> ChatCompletionChunk:
        return self._chunk([], usage)

    def _choice(self, index: int, choice: FinishedChoice) -> Choice:
        message = ChatCompletionMessage(role="assistant", content=choice.text or (None if choice.calls else ""), refusal=None)
        if choice.calls:
            message.tool_calls = [
                ChatCompletionMessageFunctionToolCall(
                    id=_call_id(), type="function", function=Function(name=call.name, arguments=call.arguments)
                )
                for call in choice.calls
            ]
        told = choice.logprobs
        logprobs = None if told is None else ChoiceLogprobs(content=[self._figures(*one) for one in told], refusal=None)
        return Choice(index=index, message=message, finish_reason=choice.reason, logprobs=logprobs)

    def _figures(self, token: int, figures: TokenLogprobs) -> ChatCompletionTokenLogprob:
        top = [TopLogprob(logprob=value, **self._named(other)) for other, value in figures.top]
        return ChatCompletionTokenLogprob(logprob=figures.logprob, top_logprobs=top, **self._named(token))

    def _named(self, token: int) -> dict[str, Any]:
        data = self.tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data)}

    def _chunk(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices, usage=usage
        )


@dataclass(frozen=True, slots=True)
class TextAnswer:
    id: str
    created: int
    model: str
    tokenizer: Tokenizer
    offsets: Counter[int] = field(default_factory=Counter)  # characters of each choice whose tokens have been told

    def whole(self, choices: Sequence[FinishedChoice], usage: CompletionUsage) -> Completion:
        return self._object(
            [self._choice(index, choice.text, choice.reason, choice.logprobs) for index, choice in enumerate(choices)], usage
        )

    def opening(self, index: int) -> None:
        return None

    def piece(self, index: int, text: str, logprobs: Sequence[TokenFigures] | None = None) -> Completion:
        return self._object([self._choice(index, text, None, logprobs)], None)

    def call(self, index: int, position: int, call: ToolCall) -> Completion:
        raise NotImplementedError("only chat has tools")

    def closing(self, index: int, reason: Finish) -> Completion:
        return self._object([self._choice(index, "", reason, None)], None)

    def usage(self, usage: CompletionUsage) -> Completion:
        return self._object([], usage)

    def _choice(self, index: int, text: str, reason: Finish | None, logprobs: Sequence[TokenFigures] | None) -> CompletionChoice:
        told = None if logprobs is None else self._logprobs(index, logprobs)
        if reason is None:  # null until a stream's end, which the package's type for whole answers does not know
            return CompletionChoice.model_construct(index=index, text=text, finish_reason=cast(Any, None), logprobs=told)
        return CompletionChoice(index=index, text=text, finish_reason=cast(Any, reason), logprobs=told)

    def _logprobs(self, index: int, logprobs: Sequence[TokenFigures]) -> Logprobs:
        told = Logprobs(text_offset=[], token_logprobs=[], tokens=[], top_logprobs=[])
        assert told.text_offset is not None and told.token_logprobs is not None
        assert told.tokens is not None and told.top_logprobs is not None
        for token, figures in logprobs:
            name = self._named(token)
            told.tokens.append(name)
            told.text_offset.append(self.offsets[index])
            told.token_logprobs.append(figures.logprob)
            told.top_logprobs.append({self._named(other): value for other, value in figures.top})
            self.offsets[index] += len(name)
        return told

    def _named(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _object(self, choices: list[CompletionChoice], usage: CompletionUsage | None) -> Completion:
        return Completion(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices, usage=usage)


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
