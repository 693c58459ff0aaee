"""Parameters that would change the answer but are not implemented: refused, never ignored in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deploy.openai_api.errors import ApiError

_NEVER = ("null",)
_OFF = ("null", "false")
_EMPTY = ("null", "[]", "{}", '""')
_ZERO = ("null", "0", "0.0", "-0.0")
_ONE = ("null", "1", "1.0")

# Each parameter with the values, as JSON, that ask for nothing.
NEUTRAL: Mapping[str, tuple[str, ...]] = {
    "n": _ONE,
    "best_of": _ONE,
    "logprobs": _OFF,
    "top_logprobs": _ZERO,
    "echo": _OFF,
    "suffix": _EMPTY,
    "tools": _EMPTY,
    "functions": _EMPTY,
    "tool_choice": ("null", '"none"', '"auto"'),
    "function_call": ("null", '"none"', '"auto"'),
    "response_format": ("null", '{"type": "text"}'),
    "structured_outputs": _NEVER,
    "guided_json": _NEVER,
    "guided_regex": _NEVER,
    "guided_choice": _NEVER,
    "guided_grammar": _NEVER,
    "logit_bias": _EMPTY,
    "frequency_penalty": _ZERO,
    "presence_penalty": _ZERO,
    "repetition_penalty": _ONE,
    "min_p": _ZERO,
    "use_beam_search": _OFF,
    "modalities": ("null", '["text"]'),
    "audio": _NEVER,
    "prompt_embeds": _NEVER,
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise ApiError (400, `unsupported_parameter`) for the first parameter of `body` that asks for what is not implemented."""
    for name in body.keys() & NEUTRAL.keys():
        if json.dumps(body[name]) not in NEUTRAL[name]:
            allowed = ", ".join(NEUTRAL[name][1:])
            hint = f"leave it out or give {allowed}" if allowed else "leave it out"
            raise ApiError(400, f"{name} is not supported yet: {hint}", param=name, code="unsupported_parameter")
