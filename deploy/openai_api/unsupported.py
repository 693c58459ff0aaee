"""Parameters that would change the answer but are not implemented: refused, never ignored in silence."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deploy.openai_api.errors import ApiError

_NEVER = ("null",)
_OFF = ("null", "false")
_EMPTY = ("null", "[]", "{}", '""')

# Each parameter with the values, as JSON, that ask for nothing, and what to use instead.
NEUTRAL: Mapping[str, tuple[tuple[str, ...], str]] = {
    "best_of": (("null", "1", "1.0"), "use n"),
    "echo": (_OFF, "the client has the prompt"),
    "suffix": (_EMPTY, ""),
    "functions": (_EMPTY, "use tools"),
    "function_call": (("null", '"none"', '"auto"'), "use tool_choice"),
    "guided_json": (_NEVER, "use response_format or structured_outputs"),
    "guided_regex": (_NEVER, "use structured_outputs"),
    "guided_choice": (_NEVER, "use structured_outputs"),
    "guided_grammar": (_NEVER, "use structured_outputs"),
    "use_beam_search": (_OFF, ""),
    "modalities": (("null", '["text"]'), ""),
    "audio": (_NEVER, ""),
    "prompt_embeds": (_NEVER, ""),
    "prompt_logprobs": (_NEVER, ""),
}


def refuse_unsupported(body: Mapping[str, Any]) -> None:
    """Raise ApiError (400, `unsupported_parameter`) for the first parameter of `body` that asks for what is not implemented."""
    for name in body.keys() & NEUTRAL.keys():
        neutral, instead = NEUTRAL[name]
        if json.dumps(body[name]) not in neutral:
            message = f"{name} is not supported; leave it out" + (f", {instead}" if instead else "")
            raise ApiError(400, message, param=name, code="unsupported_parameter")
