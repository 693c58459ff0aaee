"""The workload of an experiment: a model whose KV is large and whose compute is small, and agents that read far more than they add."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.models.tiny import make_tiny_model
from load_tests.replay.paper_workload import session_middles
from load_tests.replay.trace_files import read_trajectories
from load_tests.replay.trajectory import Trajectory, Turn

VOCABULARY = 512


@dataclass(frozen=True, slots=True)
class Model:
    """A tiny random llama: many KV heads, so `layers * 2 * kv_heads * head_dim * 4` bytes per token, and little else to compute."""

    layers: int = 4
    kv_heads: int = 16
    head_dim: int = 64
    hidden: int = 64
    block_tokens: int = 32

    def make(self, folder: Path, max_context: int) -> Path:
        name = f"kv-heavy-{self.layers}x{self.kv_heads}x{self.head_dim}-{self.hidden}-{max_context}"
        return make_tiny_model(
            "llama",
            folder / name,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.kv_heads,
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

    What an agent has before (about `context` tokens) is in storage when the clock starts; `turns` turns are measured.
    """

    agents: int = 12
    turns: int = 4
    context: int = 768
    trace: str = "32k"
    trace_file: str = ""
    seed: int = 1

    def sessions(self) -> list[Trajectory]:
        """Each with its stored context as first turn."""
        if not self.trace_file:
            return session_middles(self.agents, self.trace, self.context, self.turns, self.seed)
        result = []
        for session in read_trajectories(Path(self.trace_file), self.agents):
            middle = max(1, (len(session.turns) - self.turns) // 2)
            before = sum(turn.append + turn.generate for turn in session.turns[:middle])
            whole = Trajectory((Turn(before, 1), *session.turns[middle : middle + self.turns]))
            result.append(whole.scaled(self.context / float(np.mean(whole.contexts()[1:]))))
        return result

    @property
    def contexts(self) -> list[int]:
        return [session.turns[0].append for session in self.sessions()]

    @property
    def trajectories(self) -> list[Trajectory]:
        """What is measured: the sessions without their stored contexts."""
        return [Trajectory(session.turns[1:]) for session in self.sessions()]

    @property
    def max_context(self) -> int:
        longest = max(session.total_tokens for session in self.sessions())
        return -(-(longest + 64) // 128) * 128

    def hit_bytes(self, geometry: KVGeometry) -> int:
        """KV bytes to read when every hit is one."""
        return sum(session.hit_tokens(geometry.block_tokens) for session in self.sessions()) * geometry.token_bytes
