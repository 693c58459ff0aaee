"""Text to token ids and back for one model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from dualpath_ray.errors import ConfigError, InvalidRequestError
from dualpath_ray.serving.chat_template import TOOL_CALL_MARK, ChatTemplate, Message

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Below this many characters encoding takes about a millisecond, less than it is worth to change threads.
INLINE_CHARACTERS = 8192


class Tokenizer:
    """The model's tokenizer.json (run by the `tokenizers` library) and its chat template."""

    def __init__(self, core: tokenizers.Tokenizer, template: ChatTemplate | None) -> None:
        core.no_truncation()  # a tokenizer.json may carry its training settings
        core.no_padding()
        self._core = core
        self._template = template
        self._bytes: LLTokenizer | None = None
        self.vocabulary = core.get_vocab_size(with_added_tokens=True)
        self.special_tokens = frozenset(index for index, token in core.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer:
        """Read tokenizer.json and the chat template of a Hugging Face model directory. Raises ConfigError."""
        path = directory / "tokenizer.json"
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{path} cannot be read as a tokenizer: {error}") from error
        return cls(core, ChatTemplate.from_directory(directory))

    def encode(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        """Token ids of `text`; `special_tokens` adds those the model expects around a bare text (its BOS, if it has one)."""
        return tuple(self._core.encode(text, add_special_tokens=special_tokens).ids)

    async def encode_text(self, text: str, *, special_tokens: bool = True) -> tuple[int, ...]:
        """`encode` of a bare prompt; long ones are encoded in a thread, so that they do not hold up other requests' streams."""
        return await self._encode(text, special_tokens=special_tokens)

    async def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[int, ...]:
        """Token ids of the prompt that asks for the assistant's next message. The template itself writes the BOS.

        Raises InvalidRequestError when the template refuses the messages, or there is none, or it knows no tools.
        """
        if self._template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions")
        if tools and not self._template.knows_tools:
            raise InvalidRequestError(f"this model's chat template knows no tools whose calls are written as {TOOL_CALL_MARK}JSON")
        return await self._encode(self._template.render(messages, tools), special_tokens=False)

    async def _encode(self, text: str, *, special_tokens: bool) -> tuple[int, ...]:
        if len(text) <= INLINE_CHARACTERS:
            return self.encode(text, special_tokens=special_tokens)
        return await asyncio.to_thread(self.encode, text, special_tokens=special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` stands for, which need not be whole characters; of a special token its name."""
        if self._bytes is None:
            # Only this library tells the bytes of one token for every kind of tokenizer
            from llguidance import LLTokenizer

            self._bytes = LLTokenizer(self._core.to_str())
        return bytes(self._bytes.decode_bytes([token]))

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of `tokens` without special tokens; bytes that are not UTF-8 become U+FFFD."""
        return str(self._core.decode(list(tokens), skip_special_tokens=True))
