"""An agent's session as a workload: how many tokens each turn appends and generates. Contents do not matter to load and are made up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Turn:
    """`append` new prompt tokens after the context so far, then exactly `generate` tokens, then `pause_s` until the next turn."""

    append: int
    generate: int
    pause_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One agent. The context of a turn is everything appended and generated before it (paper section 1.4: all of it is a hit)."""

    turns: tuple[Turn, ...]

    @property
    def total_tokens(self) -> int:
        return sum(turn.append + turn.generate for turn in self.turns)

    def contexts(self) -> list[int]:
        """Tokens before each turn's append."""
        contexts, before = [], 0
        for turn in self.turns:
            contexts.append(before)
            before += turn.append + turn.generate
        return contexts

    def hit_tokens(self, block_tokens: int) -> int:
        """Tokens that can be read instead of computed, over all turns: whole blocks whose KV exists when the turn begins.

        The last generated token of a turn has no KV yet (it was never an input), so a block that ends with it is not complete.
        """
        return sum(max(0, context - 1) // block_tokens * block_tokens for context in self.contexts())

    def scaled(self, factor: float) -> Trajectory:
        """All lengths times `factor`, at least 1 token each."""
        return Trajectory(
            tuple(replace(t, append=max(1, round(t.append * factor)), generate=max(1, round(t.generate * factor))) for t in self.turns)
        )

    def cut(self, max_tokens: int, max_turns: int | None = None) -> Trajectory:
        """The leading turns that stay within `max_tokens`."""
        kept: list[Turn] = []
        tokens = 0
        for turn in self.turns[:max_turns]:
            tokens += turn.append + turn.generate
            if tokens > max_tokens:
                break
            kept.append(turn)
        return Trajectory(tuple(kept))


@dataclass(frozen=True, slots=True)
class TrajectoryStatistics:
    """Means of a set, as in the paper's table of traces: per-turn figures are means over trajectories of per-trajectory means."""

    trajectories: int
    turns: float
    append: float
    generate: float
    total: float
    context: float


def statistics(trajectories: Iterable[Trajectory]) -> TrajectoryStatistics:
    sets = [trajectory for trajectory in trajectories if trajectory.turns]
    mean = np.mean
    return TrajectoryStatistics(
        len(sets),
        float(mean([len(t.turns) for t in sets])),
        float(mean([mean([turn.append for turn in t.turns]) for t in sets])),
        float(mean([mean([turn.generate for turn in t.turns]) for t in sets])),
        float(mean([t.total_tokens for t in sets])),
        float(mean([mean(t.contexts()) for t in sets])),
    )


def made_up_tokens(seed: int, count: int, vocabulary: int) -> npt.NDArray[np.int32]:
    """Token ids without meaning, away from the special ones at the start of a vocabulary."""
    return np.random.default_rng(seed).integers(16, vocabulary, count, dtype=np.int32)
