"""When a continuation ends."""

from __future__ import annotations

from dataclasses import dataclass

from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.requests import FinishReason, GenerationRequest


@dataclass(frozen=True, slots=True)
class FinishRule:
    """At least `min_new_tokens`, at most `max_new_tokens`, and in between until one of `stop_token_ids` is drawn (it is delivered too)."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @classmethod
    def for_request(cls, request: GenerationRequest, max_context: int) -> FinishRule:
        """The request's rule, with `max_new_tokens` cut to what the model's context leaves.

        Raises InvalidRequestError if that is nothing.
        """
        room = max_context - len(request.tokens)
        if room < 1:
            raise InvalidRequestError(
                f"prompt of {len(request.tokens)} tokens leaves no room in the model's context of {max_context} tokens"
            )
        return cls(min(request.max_new_tokens, room), request.min_new_tokens, request.stop_token_ids)

    def forbidden(self, generated: int) -> tuple[int, ...]:
        """Token ids that must not be drawn when `generated` tokens have been generated so far."""
        return self.stop_token_ids if generated < self.min_new_tokens else ()

    def reason(self, token: int, generated: int) -> FinishReason | None:
        """Why `token`, the `generated`-th one, is the last; None if it is not."""
        if token in self.stop_token_ids and generated > self.min_new_tokens:
            return "stop"
        return "length" if generated >= self.max_new_tokens else None
