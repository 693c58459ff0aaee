"""What a request makes of the model's logits before a token is drawn: penalties, bias, grammar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from dualpath_ray.grammars import Grammars, GrammarState
from dualpath_ray.requests import SamplingParams


class LogitRules:
    """A pure function of the parameters, the prompt and the tokens generated so far, kept up to date token by token.

    The prefill engine, the decode engine and every later attempt rebuild it from the tokens, and so go on with the very same values.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], vocabulary: int, grammar: GrammarState | None
    ) -> None:
        self._params, self._vocabulary, self._grammar = params, vocabulary, grammar
        self._bias = {token: bias for token, bias in params.logit_bias if 0 <= token < vocabulary}
        self._counts = Counter(generated)
        self._offset: torch.Tensor | None = None  # what is added to each logit
        self._seen: torch.Tensor | None = None  # tokens that the repetition penalty is for
        if self._bias or params.frequency_penalty or params.presence_penalty:
            self._offset = torch.zeros(vocabulary)
            for token in self._bias.keys() | self._counts.keys():
                self._offset[token] = self._offset_of(token)
        if params.repetition_penalty != 1.0:
            self._seen = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen[torch.tensor([*set(prompt), *self._counts], dtype=torch.int64)] = True
        if grammar is not None:
            grammar.advance(generated)
        self._allowed = self._next_allowed()

    @classmethod
    def of(cls, params: SamplingParams, prompt: Sequence[int], generated: Sequence[int], vocabulary: int, grammars: Grammars) -> LogitRules:
        """The rules after `prompt` and `generated`. Raises InvalidRequestError for a grammar that cannot be used or does not fit."""
        return cls(params, prompt, generated, vocabulary, grammars.start(params.grammar) if params.grammar else None)

    def apply(self, logits: torch.Tensor) -> None:
        """Change logits `[vocabulary]` in place."""
        device = logits.device
        if self._seen is not None:
            seen, penalty = self._seen.to(device), self._params.repetition_penalty
            logits.copy_(torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits))
        if self._offset is not None:
            logits += self._offset.to(device)
        if self._allowed is not None:
            logits.masked_fill_(~self._allowed.to(device), float("-inf"))

    def advance(self, token: int) -> None:
        """`token` has been drawn. Raises InvalidRequestError when the grammar has become too complex to follow."""
        self._counts[token] += 1
        if self._offset is not None:
            self._offset[token] = self._offset_of(token)
        if self._seen is not None:
            self._seen[token] = True
        if self._grammar is not None:
            self._grammar.advance([token])
            self._allowed = self._next_allowed()

    def _offset_of(self, token: int) -> float:
        count, params = self._counts[token], self._params
        return self._bias.get(token, 0.0) - count * params.frequency_penalty - (count > 0) * params.presence_penalty

    def _next_allowed(self) -> torch.Tensor | None:
        return None if self._grammar is None else torch.from_numpy(self._grammar.allowed())
