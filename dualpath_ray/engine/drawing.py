"""From the model's logits to the next tokens of a batch, the same way after prefill and in every decode step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.sampling import forbid, sample_batch
from dualpath_ray.requests import Drawn, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Draw:
    """One row: the token at absolute `position` is drawn, none of `forbidden_ids`, under `rules` if the parameters are not plain."""

    sampling: SamplingParams
    position: int
    forbidden_ids: tuple[int, ...] = ()
    rules: LogitRules | None = None


def draw(logits: torch.Tensor, rows: Sequence[Draw]) -> list[Drawn]:
    """Draw one token per row of float32 logits `[len(rows), vocab]`, which are changed. A row does not depend on the others."""
    told = [index for index, row in enumerate(rows) if row.sampling.logprobs is not None]
    logprobs = logits[told].log_softmax(dim=-1) if told else logits  # before anything changes them
    for index, row in enumerate(rows):
        if row.rules is not None:
            row.rules.apply(logits[index])
        forbid(logits[index], row.forbidden_ids)
    tokens = sample_batch(logits, [row.sampling for row in rows], [row.position for row in rows])
    drawn = [Drawn(token) for token in tokens]
    for at, index in enumerate(told):
        drawn[index] = Drawn(tokens[index], _logprobs(logprobs[at], tokens[index], rows[index].sampling.logprobs or 0))
    return drawn


def _logprobs(logprobs: torch.Tensor, token: int, alternatives: int) -> TokenLogprobs:
    best = logprobs.topk(min(alternatives, len(logprobs)))
    top = tuple(zip(map(int, best.indices.tolist()), map(float, best.values.tolist()), strict=True))
    return TokenLogprobs(float(logprobs[token]), top)
