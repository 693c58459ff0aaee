"""How long a forward pass takes: piecewise linear curves through measured or computed points."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


def interpolate(points: tuple[tuple[float, float], ...], x: float) -> float:
    """Piecewise linear through `points` (ascending x), continued with the last slope."""
    index = min(max(bisect_right(points, (x, float("inf"))), 1), len(points) - 1)
    (x0, y0), (x1, y1) = points[index - 1], points[index]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


@dataclass(frozen=True, slots=True)
class PrefillCurve:
    """Seconds of one forward pass of engines that run in lockstep (data-parallel attention, expert-parallel FFN).

    `points` map computed tokens per engine to seconds, without the cost of looking back at cached tokens, which is `per_pair_s` for each
    (computed, cached) pair of tokens. `shared_share` is the part of the token cost that the group carries together (experts): it follows
    the mean over engines, the rest follows the fullest engine. `attention_token_s` is the part of the token cost that is attention; with
    `per_pair_s` it gives the attention time that the compute quota limits.
    """

    points: tuple[tuple[float, float], ...]
    per_pair_s: float
    shared_share: float
    attention_token_s: float

    def seconds(self, most_tokens: float, mean_tokens: float, most_pairs: float) -> float:
        fullest, mean = interpolate(self.points, most_tokens), interpolate(self.points, mean_tokens)
        return (1 - self.shared_share) * fullest + self.shared_share * mean + self.per_pair_s * most_pairs

    def scaled(self, factor: float) -> PrefillCurve:
        points = tuple((tokens, seconds * factor) for tokens, seconds in self.points)
        return PrefillCurve(points, self.per_pair_s * factor, self.shared_share, self.attention_token_s * factor)


@dataclass(frozen=True, slots=True)
class DecodeCurve:
    """Seconds of one decode step: `points` map requests per engine to seconds at empty context, plus `per_context_token_s` per token."""

    points: tuple[tuple[float, float], ...]
    per_context_token_s: float

    def seconds(self, mean_requests: float, most_context: float) -> float:
        return interpolate(self.points, mean_requests) + self.per_context_token_s * most_context

    def scaled(self, factor: float) -> DecodeCurve:
        return DecodeCurve(tuple((n, seconds * factor) for n, seconds in self.points), self.per_context_token_s * factor)
