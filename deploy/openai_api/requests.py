"""The bodies of OpenAI's generation requests, with the extensions that engines and load generators share.

Unknown fields are ignored, as clients send many that do not matter here (`store`, `metadata`, `service_tier`, `user`, ...); those that
would change the answer are refused first (`unsupported.py`). Types are strict: `"5"` is not a number.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from deploy.openai_api.messages import ChatMessage

StopString = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0)]
INT64 = 2**63


class StreamOptions(BaseModel):
    """Options of a streamed answer."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = Field(default=None, description="Send one more chunk, without choices, that holds the usage.")


class GenerationFields(BaseModel):
    """What both kinds of request share. A null is the same as a field left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    prompt_field: ClassVar[str]

    model: str = Field(description="Name of the served model, as /v1/models lists it.")
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens to generate; the server has a default.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy. Default: the model's own, otherwise 1.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Draw from the likeliest tokens of this total probability.")
    top_k: int | None = Field(default=None, ge=-1, description="Extension: draw from this many tokens; 0 or -1 for all.")
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Equal seeds give equal answers. Default: random.")
    stop: StopString | list[StopString] | None = Field(default=None, description="The answer ends before any of these strings.")
    min_tokens: int | None = Field(default=None, ge=0, description="Extension: no end of sequence or stop string before this many tokens.")
    ignore_eos: bool | None = Field(default=None, description="Extension: go on at the end of sequence, up to max_tokens.")
    stream: bool | None = Field(default=None, description="Send the answer as server-sent events while it is generated.")
    stream_options: StreamOptions | None = Field(default=None, description="Only with stream.")
    timeout: float | None = Field(default=None, gt=0, description="Extension: seconds after which to give up, up to the server's limit.")
    cache_salt: str | None = Field(
        default=None, min_length=1, max_length=256, description="Extension: share cached prompts only with requests of the same salt."
    )

    def wanted_tokens(self) -> int | None:
        return self.max_tokens


class ChatCompletionRequest(GenerationFields):
    """Body of /v1/chat/completions."""

    prompt_field = "messages"

    messages: list[ChatMessage] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="New name of max_tokens; wins if both are given.")

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(GenerationFields):
    """Body of /v1/completions."""

    prompt_field = "prompt"

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]] = Field(description="One text, or the token ids of one.")
