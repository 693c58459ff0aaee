"""Sessions of several turns, and what each turn must be answered: computed by the engine alone, without cluster, cache or transfers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.model import CausalModel, load_model
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.engine.prefill import PrefillChunk, PrefillRunner
from dualpath_ray.requests import SamplingParams
from load_tests.replay.trajectory import made_up_tokens

BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Turn:
    """A whole prompt and the tokens that must come after it."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Session:
    """Turns over one growing context: each prompt begins with the prompt and the answer before it."""

    sampling: SamplingParams
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of a session: `first` before the first answer, `append` more before each later one, `generate` in each answer."""

    turns: int = 4
    first: int = 200
    append: int = 50
    generate: int = 32


def make_sessions(model_path: Path, count: int, shape: Shape, seed: int, vocabulary: int) -> list[Session]:
    """`count` sessions, half of them greedy, half sampled with a seed of their own."""
    bare = _BareEngine(load_model(model_path, "cpu", "float32"))
    sessions = []
    for number in range(count):
        sampling = SamplingParams(temperature=0.9, top_p=0.95, seed=seed + number) if number % 2 else SamplingParams()
        tokens: tuple[int, ...] = ()
        turns = []
        for turn in range(shape.turns):
            length = shape.append if turn else shape.first + 7 * number % 64
            tokens += tuple(made_up_tokens(seed * 1_000_003 + number * 101 + turn, length, vocabulary).tolist())
            answer = tuple(bare.complete(list(tokens), shape.generate, sampling))
            turns.append(Turn(tokens, answer))
            tokens += answer
        sessions.append(Session(sampling, tuple(turns)))
    return sessions


class _BareEngine:
    """One prompt at a time, computed from its first token on."""

    def __init__(self, model: CausalModel) -> None:
        self._model, self._prefill = model, PrefillRunner(model)
        self._geometry = model.geometry(BLOCK_TOKENS)

    def complete(self, prompt: list[int], count: int, sampling: SamplingParams) -> list[int]:
        gate = _AllLayers(self._model, len(prompt))
        chunk = PrefillChunk("reference", np.array(prompt, dtype=np.int32), 0, 0, sampling)
        (first,) = self._prefill.run([chunk], gate)
        assert first is not None
        blocks = self._geometry.blocks_for(len(prompt) + count)
        pool = PagedPool(self._geometry, blocks)
        ids = pool.allocate(blocks)
        for index in range(self._geometry.blocks_for(len(prompt))):
            rows = gate.kv[:, index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
            pool.tensor[:, int(ids[index]), : rows.shape[1]] = rows
        runner = DecodeRunner(self._model, pool, 1)
        runner.admit(DecodeSequence("reference", len(prompt), first.token, ids, sampling, FinishRule(count)))
        tokens = [first.token]
        while len(runner):
            tokens += [output.token for output in runner.step()]
        return tokens


class _AllLayers:
    """A layer gate that keeps everything: nothing comes from elsewhere."""

    def __init__(self, model: CausalModel, tokens: int) -> None:
        self.kv = torch.zeros(model.layers, tokens, 2, model.kv_heads, model.head_dim)

    def enter(self, layer: int) -> torch.Tensor:
        return self.kv[layer]

    def leave(self, layer: int) -> None:
        return
