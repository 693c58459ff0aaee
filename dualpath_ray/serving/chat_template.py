"""A model's chat template: messages in, prompt text out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dualpath_ray.errors import ConfigError, InvalidRequestError

Message = Mapping[str, Any]
TOOL_CALL_MARK = "<tool_call>"


class ChatTemplate:
    """The Jinja template that ships with the model, rendered as transformers renders it but without importing transformers.

    The template runs in Jinja's sandbox and sees plain JSON values only, since models come from third parties.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        """`special_tokens` are variables such as `bos_token`. Raises ConfigError when the template does not parse."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the model's chat template is not valid Jinja: {error}") from error
        self._special_tokens = dict(special_tokens or {})
        # The one way of writing calls that serving/tool_calls.py reads
        self.knows_tools = "tools" in source and TOOL_CALL_MARK in source

    @classmethod
    def from_directory(cls, directory: Path) -> ChatTemplate | None:
        """The template of a Hugging Face model directory (chat_template.jinja, else tokenizer_config.json); None without one."""
        config_path = directory / "tokenizer_config.json"
        jinja_path = directory / "chat_template.jinja"
        try:
            config = json.loads(config_path.read_text(encoding="utf-8")) if config_path.exists() else {}
            source = jinja_path.read_text(encoding="utf-8") if jinja_path.exists() else _default_of(config.get("chat_template"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"the chat template in {directory} cannot be read: {error}") from error
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt that asks the assistant for the next message.

        Raises InvalidRequestError when the template refuses the conversation (roles out of order, a role it does not know, ...).
        """
        try:
            return self._template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequestError(f"the model's chat template refuses these messages: {error}") from error


class _GenerationBlock(jinja2.ext.Extension):
    """Templates may mark the assistant's words with `{% generation %}`, which matters for training only: render the body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _default_of(template: Any) -> str | None:
    """tokenizer_config.json holds one template or a list of named ones."""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template if isinstance(template, str) else None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like; each is written as a string or as an object with `content`."""
    tokens = {name: value["content"] if isinstance(value, dict) else value for name, value in config.items() if name.endswith("_token")}
    return {name: value for name, value in tokens.items() if isinstance(value, str)}


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML, which would put entities into the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
