"""Grammars that generated text must match: JSON schemas, regular expressions, Lark grammars (library: llguidance).

A grammar travels with the request as llguidance's own JSON text. The front end checks it before the request is sent; engines compile it
again and follow it token by token.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from dualpath_ray.errors import ConfigError, InvalidRequestError

# Refuses grammars that would take long to compile; llguidance's defaults bound each later step to some ten milliseconds.
LIMITS = LLParserLimits(max_grammar_size=200_000)
COMPACT = {"whitespace_flexible": False}


def of_json_schema(schema: Mapping[str, Any]) -> str:
    """JSON text of `schema`, without whitespace between its tokens: a model cannot get lost in spaces.

    Raises InvalidRequestError for a schema that holds a number of more than 64 bits.
    """
    try:
        return str(LLMatcher.grammar_from_json_schema(dict(schema), overrides=COMPACT))  # type: ignore[arg-type]
    except ValueError as error:
        raise InvalidRequestError(f"the schema cannot be used: {_one_line(str(error))}") from error


def of_regex(pattern: str) -> str:
    return str(LLMatcher.grammar_from_regex(pattern))


def of_lark(text: str) -> str:
    return str(LLMatcher.grammar_from_lark(text))


def of_choices(choices: Iterable[str]) -> str:
    return of_lark("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


class GrammarState:
    """Where a text stands in its grammar. `allowed` says which tokens may come next, end-of-sequence tokens where it may end."""

    def __init__(self, matcher: LLMatcher, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def advance(self, tokens: Sequence[int]) -> None:
        """Raises InvalidRequestError for tokens that do not fit, and for a grammar that has become too complex to follow."""
        if tokens:
            self._matcher.consume_tokens(list(tokens))
            self._check()

    def allowed(self) -> npt.NDArray[np.bool_]:
        """`[vocabulary]`. Raises InvalidRequestError like `advance`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        bits = np.unpackbits(mask, bitorder="little")
        if len(bits) < self._vocabulary:
            bits = np.concatenate([bits, np.zeros(self._vocabulary - len(bits), dtype=np.uint8)])
        return bits[: self._vocabulary].astype(np.bool_)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(f"the grammar cannot be followed: {_one_line(self._matcher.get_error())}")


class Grammars:
    """Compiles grammars for one model's tokens. Thread safe."""

    def __init__(self, model_path: Path, vocabulary: int | None, end_tokens: Sequence[int]) -> None:
        """`vocabulary`: width of the model's logits, default that of the tokenizer; `end_tokens` may end a text. Nothing is read yet."""
        self._path = model_path / "tokenizer.json"
        self._vocabulary = vocabulary
        self._end_tokens = list(end_tokens)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None

    def check(self, grammar: str) -> None:
        """Raise InvalidRequestError unless `grammar` can be compiled."""
        reason = LLMatcher.validate_grammar(grammar, self._loaded(), limits=LIMITS)
        if reason and not reason.startswith("WARNING"):
            raise InvalidRequestError(f"the grammar or schema cannot be used: {_one_line(reason)}")

    def start(self, grammar: str) -> GrammarState:
        """The state before the first token. Raises InvalidRequestError."""
        tokenizer = self._loaded()
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
        state = GrammarState(matcher, self._vocabulary or tokenizer.vocab_size)
        state._check()
        return state

    def _loaded(self) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                if not self._end_tokens:
                    raise InvalidRequestError("this model names no end-of-sequence token, so that text cannot be made to follow a grammar")
                try:
                    self._tokenizer = LLTokenizer(str(self._path), n_vocab=self._vocabulary, eos_token=self._end_tokens)
                except ValueError as error:
                    raise ConfigError(f"{self._path} cannot be used for grammars: {_one_line(str(error))}") from error
            return self._tokenizer


def _one_line(text: str) -> str:
    """The reason alone: what follows it in llguidance's messages shows the generated text."""
    return " ".join(text.partition("<state>")[0].split())[:300]
