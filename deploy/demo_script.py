"""The demo's coding agent: what it says and what its tools print. Tool output is this project's own source, so it is real text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from openai.types.chat import ChatCompletionMessageParam

TOOL_CHARACTERS = 1150  # about 350 tokens of source code

SYSTEM = "You are a coding agent working in a git repository. Answer in one or two short sentences."
TASK = (
    "The load scheduler of our serving cluster sometimes leaves a storage NIC idle while another one is saturated. "
    "Find out how reads are divided between the nodes and propose a fix. I will paste what your tools print."
)
STEPS: tuple[tuple[str, str], ...] = (
    ("policies.read_plan", "What does this module decide?"),
    ("policies.water_filling", "What does water filling do here?"),
    ("policies.prefill_placement", "Which engine gets the next request?"),
    ("policies.decode_placement", "When is a decode engine overloaded?"),
    ("policies.batch_quota", "Why is there a quota?"),
    ("policies.indexed_heap", "What is the cost of an update?"),
)


def opening() -> list[ChatCompletionMessageParam]:
    """The conversation before the first turn."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{TASK}\n\n{_tool_output(*STEPS[0])}"}]


def next_message(turn: int) -> ChatCompletionMessageParam:
    """What the user pastes before turn `turn` (1 for the second turn)."""
    return {"role": "user", "content": _tool_output(*STEPS[turn])}


def _tool_output(module: str, question: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is part of this project"
    source = Path(spec.origin).read_text(encoding="utf-8")
    return f"$ cat {module.replace('.', '/')}.py\n{source[:TOOL_CHARACTERS]}\n...\n{question}"
