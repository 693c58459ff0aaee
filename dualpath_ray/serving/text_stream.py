"""Generated tokens to the text a client sees."""

from __future__ import annotations

from collections.abc import Sequence

from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationRequest
from dualpath_ray.serving.detokenizer import Detokenizer
from dualpath_ray.serving.stop_strings import StopStrings
from dualpath_ray.serving.tokenizer import Tokenizer


class TextStream:
    """One request's text: detokenised, cut at stop strings, without the end-of-sequence token.

    `finish_reason` is None until the text is complete. A stop string ends it before the generator does: the caller then closes the
    generator, which cancels the request. Stop strings, like end-of-sequence tokens, count only from `min_new_tokens` on.
    """

    def __init__(self, tokenizer: Tokenizer, request: GenerationRequest, stop: Sequence[str] = ()) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._stop = bool(stop)
        self._stops = StopStrings(stop)
        self._request = request
        self.tokens = 0  # generated so far, an end-of-sequence token included
        self.shown = 0  # tokens of the last delta whose text belongs to the answer, from its first on
        self.finish_reason: FinishReason | None = None

    def push(self, delta: GenerationDelta) -> str:
        """The text that became final with `delta`."""
        ended = delta.finish_reason == "stop" and bool(set(delta.tokens[-1:]) & set(self._request.stop_token_ids))
        # A tokenizer need not know the end-of-sequence token as special
        shown = delta.tokens[:-1] if ended else delta.tokens
        text = self._until_stop(delta.tokens, shown) if self._stop else self._all(delta.tokens, shown)
        if delta.finish_reason is not None and not self._stops.found:
            text += self._checked(self._detokenizer.finish()) + self._stops.finish()
            self.finish_reason = delta.finish_reason
        if self._stops.found:
            self.finish_reason = "stop"
        return text

    def _all(self, tokens: Sequence[int], shown: Sequence[int]) -> str:
        self.tokens += len(tokens)
        self.shown = len(shown)
        return self._detokenizer.push_all(shown)

    def _until_stop(self, tokens: Sequence[int], shown: Sequence[int]) -> str:
        """Token by token, as what comes after a stop string does not count."""
        text, self.shown = "", 0
        for index in range(len(tokens)):
            if self._stops.found:  # the generator had run ahead of the stop string
                break
            self.tokens += 1
            if index < len(shown):
                self.shown = index + 1
                text += self._checked(self._detokenizer.push(shown[index]))
        return text

    def _checked(self, text: str) -> str:
        return self._stops.push(text) if self.tokens >= self._request.min_new_tokens else text
