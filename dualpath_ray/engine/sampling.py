"""Drawing tokens: a pure function of logits, parameters and position (SamplingParams).

A token is drawn by the Gumbel-max rule: add independent Gumbel noise to the scaled logits and take the largest. The noise of a
candidate comes from a hash of (seed, position, token id) alone, so neither the batch nor the device nor an earlier draw matters, and
rounding differences in the logits change the outcome only where two candidates are within rounding of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dualpath_ray.requests import SamplingParams

_MASK = (1 << 64) - 1
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # constants of SplitMix64


def sample(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    """Draw the token at absolute `position` from logits `[vocab]`."""
    return sample_batch(logits[None], [params], [position])[0]


def sample_batch(logits: torch.Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> list[int]:
    """Draw one token per row of float32 logits `[n, vocab]`; the outcome of a row does not depend on the other rows."""
    tokens = logits.argmax(dim=-1)
    random = [row for row, param in enumerate(params) if param.temperature > 0]
    if random:
        chosen = [params[row] for row in random]
        scores = _truncated(logits[random], chosen)
        scores += _gumbel([_stream(params[row].seed, positions[row]) for row in random], scores)
        tokens[random] = scores.argmax(dim=-1)
    return [int(token) for token in tokens.tolist()]


def forbid(logits: torch.Tensor, ids: Sequence[int]) -> None:
    """Make `ids` impossible to draw from logits `[vocab]`, in place; ids outside the vocabulary cannot be drawn anyway."""
    inside = [token for token in ids if 0 <= token < logits.shape[0]]
    if inside:
        logits[inside] = float("-inf")


def _truncated(logits: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Logits over temperature, -inf outside top-k, then outside top-p, then below min-p; ties at a border stay in."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device).unsqueeze(1)

    vocabulary = logits.shape[-1]
    scores = logits / column([param.temperature for param in params])
    limits = [min(param.top_k, vocabulary) if param.top_k > 0 else vocabulary for param in params]
    if min(limits) < vocabulary:
        widest = max(limit for limit in limits if limit < vocabulary)
        best = scores.topk(widest).values
        for row, limit in enumerate(limits):
            if limit < vocabulary:
                scores[row].masked_fill_(scores[row] < best[row, limit - 1], float("-inf"))
    if any(param.top_p < 1 for param in params):
        ordered = scores.sort(dim=-1, descending=True).values
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        top_p = column([param.top_p if param.top_p < 1 else float("inf") for param in params])
        kept = (before < top_p).sum(dim=-1, keepdim=True).clamp_(min=1)
        scores.masked_fill_(scores < ordered.gather(1, kept - 1), float("-inf"))
    if any(param.min_p > 0 for param in params):
        least = column([math.log(param.min_p) if param.min_p > 0 else float("-inf") for param in params])
        scores.masked_fill_(scores < scores.amax(dim=-1, keepdim=True) + least, float("-inf"))
    return scores


def _gumbel(streams: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise shaped like `[len(streams), vocab]`, float32; entry (i, t) is a function of streams[i] and t."""
    token = torch.arange(1, like.shape[1] + 1, dtype=torch.int64, device=like.device)
    state = torch.tensor([_signed(stream) for stream in streams], dtype=torch.int64, device=like.device).unsqueeze(1) + token * _signed(
        _GAMMA
    )
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        state ^= (state >> shift) & (_MASK >> shift)  # int64 shifts are arithmetic: mask the sign's copies
        state *= _signed(factor)
    state ^= (state >> 31) & (_MASK >> 31)
    # 23 bits and a half: exact in float32 and never 0 or 1.
    uniform = (((state >> 41) & (_MASK >> 41)).float() + 0.5) * 2.0**-23
    return uniform.log_().neg_().log_().neg_()


def _stream(seed: int, position: int) -> int:
    """Start of the noise stream of one (seed, position)."""
    return _mix(_mix(seed & _MASK) + position & _MASK)


def _mix(value: int) -> int:
    """SplitMix64's step on a Python integer."""
    value = value + _GAMMA & _MASK
    value = (value ^ value >> 30) * _MIX_1 & _MASK
    value = (value ^ value >> 27) * _MIX_2 & _MASK
    return value ^ value >> 31


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
