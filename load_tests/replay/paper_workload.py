"""Trajectories with the statistics of the paper's agentic traces (section 6.1), scaled down to what a small testbed can carry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from load_tests.replay.trajectory import Trajectory, Turn


@dataclass(frozen=True, slots=True)
class PaperTrace:
    """Means of one trace set of the paper: turns, appended and generated tokens per turn, tokens in all."""

    turns: int
    append: int
    generate: int
    total: int


PAPER_TRACES = {
    "32k": PaperTrace(60, 608, 148, 28_639),
    "48k": PaperTrace(106, 474, 172, 42_607),
    "64k": PaperTrace(157, 429, 176, 55_958),
}
PAPER_CONTEXTS = {"32k": 17_183, "48k": 25_120, "64k": 32_721}  # mean tokens before a turn
FIRST_SHARE = 0.18  # of all tokens: the task description and the first files read
SIGMA = 0.7  # of the lognormal lengths


def paper_trajectories(count: int, trace: str = "32k", scale: float = 1.0, turns: int | None = None, seed: int = 0) -> list[Trajectory]:
    """`count` agents. All lengths are the trace's times `scale`; `turns` replaces its number of turns with the same total.

    Appends are lognormal; the totals are held to the trace's mean so that runs with few agents are alike. No two agents share a prefix.
    """
    source = PAPER_TRACES[trace]
    rounds = turns or source.turns
    total = source.total * scale
    share = source.append / (source.append + source.generate)
    random = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        first = total * FIRST_SHARE
        weights = random.lognormal(-SIGMA * SIGMA / 2, SIGMA, rounds - 1)
        rest = (total - first) * weights / max(weights.sum(), 1e-9)
        appends = [first, *(rest * share)]
        generates = [max(1.0, total * (1 - FIRST_SHARE) * (1 - share) / rounds)] * rounds
        result.append(Trajectory(tuple(Turn(max(1, math.ceil(a)), max(1, round(g))) for a, g in zip(appends, generates, strict=True))))
    return result


def session_middles(
    count: int,
    trace: str = "32k",
    context: int = 1024,
    turns: int = 8,
    seed: int = 0,
    spread: float = 0.0,
    append_scale: float = 1.0,
    generate_scale: float = 1.0,
) -> list[Trajectory]:
    """`count` agents in the middle of their sessions: the first turn appends the `context` so far, `turns` turns of the trace follow.

    `spread` is the sigma of lognormal contexts (0: all alike); appended and generated lengths are further scaled by the last two.

    A session of the paper reads tens of times the tokens it adds; a short one that starts from nothing mostly writes. Beginning in
    the middle keeps the paper's proportion of context to appended and generated tokens, all scaled so that the mean context is `context`.
    """
    source = PAPER_TRACES[trace]
    scale = context / PAPER_CONTEXTS[trace]
    random = np.random.default_rng(seed)
    mean = context - turns / 2 * scale * (source.append + source.generate)
    factors = np.random.default_rng(seed + 1).lognormal(-spread * spread / 2, spread, count)
    generate = max(1, round(source.generate * scale * generate_scale))
    result = []
    for factor in factors / factors.mean():
        lengths = random.lognormal(-SIGMA * SIGMA / 2, SIGMA, turns)
        appends = lengths / lengths.mean() * source.append * scale * append_scale
        result.append(Trajectory((Turn(max(1, round(mean * factor)), 1), *(Turn(max(1, round(append)), generate) for append in appends))))
    return result
