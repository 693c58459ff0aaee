"""Chat messages as clients send them, and as chat templates read them."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TextPart(BaseModel):
    """One piece of a message's content. Text is the only kind that these models read."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. Fields that are not listed (`name`, `tool_calls`, `reasoning_content`, ...) reach the chat template as they are."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(description="Who said it.")
    content: str | list[TextPart] | None = Field(default=None, description="A string, or text parts, which are joined with newlines.")

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of role {self.role} needs content")
        return self

    def for_template(self) -> dict[str, Any]:
        """Plain values under the names that chat templates use.

        Templates know `system` and not its newer name `developer`, take content as a string, and expect the arguments of earlier tool
        calls as an object where OpenAI has them as JSON text.
        """
        content = "\n".join(part.text for part in self.content) if isinstance(self.content, list) else self.content or ""
        extra = {name: value for name, value in (self.model_extra or {}).items() if value is not None}
        if isinstance(extra.get("tool_calls"), list):
            extra["tool_calls"] = [_with_parsed_arguments(call) for call in extra["tool_calls"]]
        return {"role": "system" if self.role == "developer" else self.role, "content": content, **extra}


def _with_parsed_arguments(call: Any) -> Any:
    try:
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}
    except (TypeError, KeyError, ValueError):
        return call  # no function call, or arguments that are no JSON: the template decides
