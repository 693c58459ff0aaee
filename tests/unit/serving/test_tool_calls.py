from __future__ import annotations

import json

import pytest

from dualpath_ray.serving.tool_calls import ToolCall, ToolCallParser

CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call>'
PARSED = ToolCall("f", '{"a": "ü"}')


def parsed(text: str, size: int) -> list[str | ToolCall]:
    """Parts of a text cut into pieces of `size`, neighbouring text joined."""
    parser, parts = ToolCallParser(), []
    for start in range(0, len(text), size):
        parts += parser.push(text[start : start + size])
    joined: list[str | ToolCall] = []
    for part in [*parts, *parser.push("", last=True)]:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("just text, a < b \n", ["just text, a < b \n"]),
        (CALL, [PARSED]),
        (f"Let me look.\n\n{CALL}", ["Let me look.", PARSED]),
        (f"{CALL}\n{CALL}\n", [PARSED, PARSED]),
        (f"{CALL} and then", [PARSED, " and then"]),
        ('<tool_call>{"name": "f"}', [ToolCall("f", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', [ToolCall("f", '{"x": 1}')]),
        ("a <tool_call>no json</tool_call> b", ["a <tool_call>no json</tool_call> b"]),
        ("<tool_call>[1]</tool_call>", ["<tool_call>[1]</tool_call>"]),
        ('<tool_call>{"name": 3}', ['<tool_call>{"name": 3}']),
        ("ends with <tool_ca", ["ends with <tool_ca"]),
        ("<tool_call>" + "[" * 100_000, ["<tool_call>" + "[" * 100_000]),
    ],
)
def test_calls_are_taken_out_of_the_text(text: str, expected: list[str | ToolCall], size: int) -> None:
    assert parsed(text, max(size, len(text) // 500)) == expected


def test_text_is_given_out_as_soon_as_it_can_be_no_call() -> None:
    parser = ToolCallParser()
    assert parser.push("one <tool") == ["one"]
    assert parser.push("box") == [" <toolbox"]
    assert json.loads(PARSED.arguments) == {"a": "ü"}
