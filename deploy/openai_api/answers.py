"""Generated text as OpenAI's response objects: whole, or as the events of a stream.

The types are the `openai` package's own, so that what is sent is what its clients parse. Streams and whole answers of one kind share
a class with the same verbs for both kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from dualpath_ray.requests import FinishReason, GenerationUsage

Finish = Literal["stop", "length"]


def usage_object(usage: GenerationUsage) -> CompletionUsage:
    """OpenAI's usage, with our extension `dualpath`: what the prompt cost and where its KV-Cache came from.

    `computed_tokens` of the prompt were computed and `prompt_tokens_details.cached_tokens` were not; `read_bytes` of KV came through
    the storage NIC of the prefill and of the decode node; `queue_s`, `read_s` and `prefill_s` are seconds; `attempts` counts
    assignments, more than one after a failure.
    """
    extension = {
        "computed_tokens": usage.computed_tokens,
        "read_bytes": dict(usage.read_bytes),
        "prefill_engine": usage.prefill_engine,
        "decode_engine": usage.decode_engine,
        "attempts": usage.attempts,
        "queue_s": round(usage.queue_s, 6),
        "read_s": round(usage.read_s, 6),
        "prefill_s": round(usage.prefill_s, 6),
    }
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=usage.cached_tokens),
        dualpath=extension,  # type: ignore[call-arg]  # the package's models keep extra fields
    )


class Answer(Protocol):
    """One answer's objects. `whole` is the unstreamed answer; the others are a stream's events in order."""

    def whole(self, text: str, reason: FinishReason, usage: GenerationUsage) -> BaseModel: ...
    def opening(self) -> BaseModel | None: ...
    def piece(self, text: str) -> BaseModel: ...
    def closing(self, reason: FinishReason) -> BaseModel: ...
    def usage(self, usage: GenerationUsage) -> BaseModel: ...


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    id: str
    created: int
    model: str

    def whole(self, text: str, reason: FinishReason, usage: GenerationUsage) -> ChatCompletion:
        message = ChatCompletionMessage(role="assistant", content=text, refusal=None)
        choice = Choice(index=0, message=message, finish_reason=cast(Finish, reason), logprobs=None)
        return ChatCompletion(
            id=self.id, object="chat.completion", created=self.created, model=self.model, choices=[choice], usage=usage_object(usage)
        )

    def opening(self) -> ChatCompletionChunk:
        return self._chunk([ChunkChoice(index=0, delta=ChoiceDelta(role="assistant", content=""), finish_reason=None)])

    def piece(self, text: str) -> ChatCompletionChunk:
        return self._chunk([ChunkChoice(index=0, delta=ChoiceDelta(content=text), finish_reason=None)])

    def closing(self, reason: FinishReason) -> ChatCompletionChunk:
        return self._chunk([ChunkChoice(index=0, delta=ChoiceDelta(), finish_reason=cast(Finish, reason))])

    def usage(self, usage: GenerationUsage) -> ChatCompletionChunk:
        return self._chunk([], usage_object(usage))

    def _chunk(self, choices: list[ChunkChoice], usage: CompletionUsage | None = None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id, object="chat.completion.chunk", created=self.created, model=self.model, choices=choices, usage=usage
        )


@dataclass(frozen=True, slots=True)
class TextAnswer:
    id: str
    created: int
    model: str

    def whole(self, text: str, reason: FinishReason, usage: GenerationUsage) -> Completion:
        return self._completion(text, reason, usage_object(usage))

    def opening(self) -> None:
        return None

    def piece(self, text: str) -> Completion:
        return self._completion(text, None)

    def closing(self, reason: FinishReason) -> Completion:
        return self._completion("", reason)

    def usage(self, usage: GenerationUsage) -> Completion:
        return self._object([], usage_object(usage))

    def _completion(self, text: str, reason: FinishReason | None, usage: CompletionUsage | None = None) -> Completion:
        # In a stream the reason is null until the end, which the package's type for whole answers does not know.
        choice = CompletionChoice.model_construct(index=0, text=text, finish_reason=cast(Finish, reason), logprobs=None)
        return self._object([choice], usage)

    def _object(self, choices: list[CompletionChoice], usage: CompletionUsage | None) -> Completion:
        return Completion(id=self.id, object="text_completion", created=self.created, model=self.model, choices=choices, usage=usage)
