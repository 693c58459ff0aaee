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
        self._stops = StopStrings(stop)
        self._request = request
        self.tokens = 0  # generated so far, an end-of-sequence token included
        self.shown = 0  # tokens of the last delta whose text belongs to the answer, from its first on
        self.finish_reason: FinishReason | None = None

    def push(self, delta: GenerationDelta) -> str:
        """The text that became final with `delta`."""
        text, self.shown = "", 0
        ended = delta.finish_reason == "stop" and bool(set(delta.tokens[-1:]) & set(self._request.stop_token_ids))
        for index, token in enumerate(delta.tokens, start=1):
            if self._stops.found:  # the generator had run ahead of the stop string
                break
            self.tokens += 1
            if not ended or index < len(delta.tokens):  # a tokenizer need not know the end-of-sequence token as special
                self.shown = index
                text += self._checked(self._detokenizer.push(token))
        if delta.finish_reason is not None and not self._stops.found:
            text += self._checked(self._detokenizer.finish()) + self._stops.finish()
            self.finish_reason = delta.finish_reason
        if self._stops.found:
            self.finish_reason = "stop"
        return text

    def _checked(self, text: str) -> str:
        return self._stops.push(text) if self.tokens >= self._request.min_new_tokens else text
