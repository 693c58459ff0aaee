"""The workload of an experiment: a model whose KV is large and whose compute is small, and agents that read far more than they add."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.models.tiny import make_tiny_model
from load_tests.replay.paper_workload import session_middles
from load_tests.replay.trace_files import read_trajectories
from load_tests.replay.trajectory import Trajectory, Turn

VOCABULARY = 512
AT_ONCE = 32  # agents


@dataclass(frozen=True, slots=True)
class Model:
    """A tiny random llama: many KV heads, so `layers * 2 * kv_heads * head_dim * 4` bytes per token, and little else to compute."""

    layers: int = 4
    kv_heads: int = 16
    head_dim: int = 64
    hidden: int = 64
    heads: int | None = None  # default: as many as KV heads
    block_tokens: int = 32

    def make(self, folder: Path, max_context: int) -> Path:
        heads = self.heads or self.kv_heads
        name = f"kv-heavy-{self.layers}x{self.kv_heads}x{self.head_dim}-{heads}-{self.hidden}-{max_context}"
        return make_tiny_model(
            "llama",
            folder / name,
            layers=self.layers,
            hidden=self.hidden,
            heads=heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocabulary=VOCABULARY,
            max_context=max_context,
        )

    @property
    def geometry(self) -> KVGeometry:
        return KVGeometry(self.layers, self.kv_heads, self.head_dim, "float32", self.block_tokens)


@dataclass(frozen=True, slots=True)
class Workload:
    """`agents` in the middle of sessions with the statistics of the paper's `trace`, or of the sessions in `trace_file`.

    What an agent has before (about `context` tokens, lognormal with sigma `spread`) is in storage when the clock starts; `turns` turns are
    measured, whose appended and generated lengths are the trace's, scaled like the context and then by the factors here. With `stored`
    fewer contexts than agents are stored, and agents take them in turn.
    """

    agents: int = 12
    turns: int = 3
    context: int = 768
    spread: float = 0.0
    append_scale: float = 1.0
    generate_scale: float = 1.0
    stored: int | None = None
    trace: str = "32k"
    trace_file: str = ""
    seed: int = 1

    def sessions(self) -> tuple[Trajectory, ...]:
        """Each with its stored context as first turn."""
        return _sessions(self)

    @property
    def contexts(self) -> list[int]:
        """Lengths of what is stored."""
        return [session.turns[0].append for session in self.sessions()[: self.stored]]

    @property
    def trajectories(self) -> list[Trajectory]:
        """What is measured: the sessions without their stored contexts."""
        return [Trajectory(session.turns[1:]) for session in self.sessions()]

    @property
    def longest(self) -> int:
        """Tokens of the longest session."""
        return max(session.total_tokens for session in self.sessions())

    def blocks(self, block_tokens: int) -> int:
        """Blocks of all agents' whole sessions at once; of the longest ones if there are more than could ever be under way."""
        lengths = sorted((-(-session.total_tokens // block_tokens) for session in self.sessions()), reverse=True)
        return sum(lengths[:AT_ONCE])

    def hit_bytes(self, geometry: KVGeometry) -> int:
        """KV bytes to read when every hit is one."""
        return sum(session.hit_tokens(geometry.block_tokens) for session in self.sessions()) * geometry.token_bytes

    @property
    def turn_count(self) -> int:
        return sum(len(session.turns) - 1 for session in self.sessions())


@functools.cache
def _sessions(workload: Workload) -> tuple[Trajectory, ...]:
    w = workload
    if not w.trace_file:
        drawn = session_middles(w.agents, w.trace, w.context, w.turns, w.seed, w.spread, w.append_scale, w.generate_scale)
        stored = w.stored or w.agents
        first = [drawn[number % stored].turns[0] for number in range(w.agents)]
        return tuple(Trajectory((start, *session.turns[1:])) for start, session in zip(first, drawn, strict=True))
    result = []
    for session in read_trajectories(Path(w.trace_file), w.agents):
        middle = max(1, (len(session.turns) - w.turns) // 2)
        before = sum(turn.append + turn.generate for turn in session.turns[:middle])
        whole = Trajectory((Turn(before, 1), *session.turns[middle : middle + w.turns]))
        result.append(whole.scaled(w.context / float(np.mean(whole.contexts()[1:]))))
    return tuple(result)
