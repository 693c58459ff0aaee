"""Agents to replay: trajectories of turns, each turn appending tokens and generating tokens.

`synthesise` makes trajectory sets with the statistics the paper publishes (its Table 2). Reading of the table: turns and total are means
over trajectories, context is the mean over turns, append and generation are means over trajectories of per-trajectory means (with plain
means over turns the columns contradict each other: 157 x (429 + 176) is not 55,958).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualpath_ray.errors import ConfigError

Turn = tuple[int, int]  # appended tokens, generated tokens


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One agent's session. `delays[i]` is the time between the end of turn i and the arrival of turn i + 1 (empty: no delays).

    `context` tokens are in storage before the first turn.
    """

    turns: tuple[Turn, ...]
    delays: tuple[float, ...] = ()
    context: int = 0


@dataclass(frozen=True, slots=True)
class TraceStatistics:
    """Published means of a trace set; `first_share` is ours, chosen so that the mean context comes out as published."""

    max_tokens: int
    turns: float
    append: float
    generation: float
    total: float
    context: float
    first_share: float


PAPER_SETS = {
    "32K": TraceStatistics(32_768, 60, 608, 148, 28_639, 17_183, 0.255),
    "48K": TraceStatistics(49_152, 106, 474, 172, 42_607, 25_120, 0.261),
    "64K": TraceStatistics(65_536, 157, 429, 176, 55_958, 32_721, 0.255),
}
APPEND_SIGMA = 1.3
GENERATION_SIGMA = 0.9


def paper_set(name: str, count: int = 500, seed: int = 0) -> list[Trajectory]:
    """The synthetic counterpart of one of the paper's trace sets (32K, 48K or 64K)."""
    if name not in PAPER_SETS:
        raise ConfigError(f"mal: must be one of {', '.join(PAPER_SETS)}, not {name!r}")
    return synthesise(PAPER_SETS[name], count, seed)


def synthesise(target: TraceStatistics, count: int, seed: int) -> list[Trajectory]:
    """Trajectories whose means match `target`.

    Tokens per turn are gamma distributed over trajectories. Its shape k follows from the two readings of append: for tokens per turn r,
    mean(r) * mean(1 / r) = turns * (append + generation) / total = k / (k - 1).
    """
    rng = np.random.default_rng(seed)
    per_turn = target.append + target.generation
    ratio = target.turns * per_turn / target.total
    shape = ratio / (ratio - 1)
    ranks = np.arange(1, count + 1) * (count * 1000) // (count + 1)  # expected order statistics: no seed draws a lucky tail
    rates = rng.permutation(np.sort(rng.gamma(shape, per_turn / shape, count * 1000))[ranks])
    turns = np.maximum(4, np.round(target.total / rates)).astype(int)
    slack = 1 - target.total / target.max_tokens
    lengths = np.minimum(target.max_tokens * (1 - slack * rng.gamma(2.0, 0.5, count)).clip(0.3), target.max_tokens)
    lengths = np.minimum(lengths * target.total / lengths.mean(), target.max_tokens)
    generated_share = target.generation / (target.append + target.generation)
    generated = lengths * generated_share * np.exp(0.15 * rng.standard_normal(count) - 0.01)
    return [
        Trajectory(_turns(rng, int(n), float(length), float(gen), target.first_share))
        for n, length, gen in zip(turns, lengths, generated, strict=True)
    ]


def _turns(rng: np.random.Generator, count: int, length: float, generated: float, first_share: float) -> tuple[Turn, ...]:
    """`count` turns that sum to about `length`, with a large first append and heavy-tailed others."""
    weights = rng.lognormal(0.0, GENERATION_SIGMA, count)
    gens = np.maximum(1, np.round(generated * weights / weights.sum())).astype(int)
    appended = max(length - float(gens.sum()), 2.0 * count)
    weights = rng.lognormal(0.0, APPEND_SIGMA, count)
    weights[0] = 0.0
    appends = np.maximum(1, np.round(appended * (1 - first_share) * weights / weights.sum())).astype(int)
    appends[0] = round(appended * first_share)
    return tuple(zip(appends.tolist(), gens.tolist(), strict=True))


def agents(trajectories: Sequence[Trajectory], count: int, seed: int = 0) -> list[Trajectory]:
    """`count` agents: every trajectory in turn; repeats get a random first turn in front, so copies share no prefix (paper section 7)."""
    rng = random.Random(seed)
    result: list[Trajectory] = []
    for i in range(count):
        base = trajectories[i % len(trajectories)]
        if i >= len(trajectories):
            base = Trajectory(((rng.randint(64, 512), 1), *base.turns), (0.0, *base.delays) if base.delays else (), base.context)
        result.append(base)
    return result
