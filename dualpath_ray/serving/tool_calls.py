"""Function calls in generated text, written as `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

This is how the chat templates of Hermes, Qwen 2.5, Qwen 3, SmolLM 3 and others teach models to call (`ChatTemplate.knows_tools`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualpath_ray.grammars import COMPACT, of_lark
from dualpath_ray.serving.chat_template import TOOL_CALL_MARK as OPEN

CLOSE = "</tool_call>"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text."""

    name: str
    arguments: str


class ToolCallParser:
    """Splits a text that arrives in pieces into plain text and calls. What looks like a call and is none stays text.

    White space before, between and after calls belongs to the markup and is dropped.
    """

    def __init__(self) -> None:
        self._held = ""
        self._called = False

    def push(self, text: str, *, last: bool = False) -> list[str | ToolCall]:
        """What is now known to be text or a call; with `last`, everything."""
        self._held += text
        parts: list[str | ToolCall] = []
        while True:
            start = self._held.find(OPEN)
            if start < 0:
                break
            end = self._held.find(CLOSE, start)
            if end < 0 and not last:
                before = self._held[:start].rstrip()
                self._give(parts, before)
                self._held = self._held[len(before) :]
                break
            inner = self._held[start + len(OPEN) : end if end >= 0 else None]
            call = _parsed(inner)
            stop = end + len(CLOSE) if end >= 0 else len(self._held)
            self._give(parts, self._held[:start].rstrip() if call else self._held[:stop])
            if call:
                parts.append(call)
                self._called = True
            self._held = self._held[stop:]
        if last:
            self._give(parts, self._held)
            self._held = ""
        elif OPEN not in self._held:
            keep = _kept(self._held)
            self._give(parts, self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        return parts

    def _give(self, parts: list[str | ToolCall], text: str) -> None:
        if text and not (self._called and text.isspace()):
            parts.append(text)


def call_grammar(functions: Sequence[Mapping[str, Any]], *, several: bool) -> str:
    """The grammar of one call, or with `several` of at least one, of any of `functions` (OpenAI's objects: name, parameters)."""
    start = r'start: call ("\n" call)*' if several else "start: call"
    rules = [start, f'call: "{OPEN}\\n" ({" | ".join(_names(functions))}) "\\n{CLOSE}"']
    for name, function in zip(_names(functions), functions, strict=True):
        schema = {
            "type": "object",
            "properties": {"name": {"const": function["name"]}, "arguments": function.get("parameters") or {"type": "object"}},
            "required": ["name", "arguments"],
            "additionalProperties": False,
            "x-guidance": COMPACT,
        }
        rules.append(f"{name}: %json {json.dumps(schema)}")
    return of_lark("\n".join(rules))


def _names(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"function{index}" for index in range(len(functions))]


def _parsed(text: str) -> ToolCall | None:
    try:
        call = json.loads(text)
        name, arguments = call["name"], call.get("arguments", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(name, str) or not name:
        return None
    return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


def _kept(text: str) -> int:
    """How much of the end may belong to a call that has not begun yet: white space, and the beginning of its mark."""
    mark = max((size for size in range(1, len(OPEN)) if text.endswith(OPEN[:size])), default=0)
    before = text[: len(text) - mark]
    return mark + len(before) - len(before.rstrip())
