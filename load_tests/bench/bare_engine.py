"""The engine's runners in one process: what benchmarks compare the cluster with."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from dualpath_ray.config import Settings
from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.model import load_model
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.engine.prefill import PrefillChunk, PrefillRunner
from dualpath_ray.models.resolve import resolve_model
from dualpath_ray.requests import SamplingParams


class BareEngine:
    """Prefill and decode runners on memory of their own: no queue, no transfer, no storage."""

    def __init__(self, settings: Settings, sequences: int = 1) -> None:
        """With memory for so many `sequences` of the longest."""
        torch.set_num_threads(settings.model.threads or 1)
        self._model = load_model(resolve_model(settings.model.spec), "cpu", settings.model.dtype)
        self._geometry = self._model.geometry(settings.model.block_tokens)
        self._pool = PagedPool(self._geometry, sequences * self._geometry.blocks_for(settings.model.max_context or 2048))
        self._prefill = PrefillRunner(self._model)

    def generate(self, prompt: list[int], count: int) -> tuple[float, float]:
        """(seconds to the first token, seconds in all)."""
        start = time.perf_counter()
        sequence = self._prefilled("bare", prompt, count)
        first = time.perf_counter() - start
        self._decoded([sequence] if count > 1 else [])
        self._pool.release(sequence.blocks)
        return first, time.perf_counter() - start

    def decode(self, prompts: list[list[int]], count: int) -> float:
        """Tokens per second of one batch of all `prompts`, each but its first token, which is not counted."""
        sequences = [self._prefilled(f"bare-{number}", prompt, count) for number, prompt in enumerate(prompts)]
        start = time.perf_counter()
        self._decoded(sequences)
        seconds = time.perf_counter() - start
        for sequence in sequences:
            self._pool.release(sequence.blocks)
        return len(prompts) * (count - 1) / seconds

    def _prefilled(self, name: str, prompt: list[int], count: int) -> DecodeSequence:
        blocks = self._pool.allocate(self._geometry.blocks_for(len(prompt) + count))
        chunk = PrefillChunk(name, np.array(prompt, dtype=np.int32), 0, int(blocks[0]) * self._geometry.block_tokens, SamplingParams())
        (drawn,) = self._prefill.run([chunk], self)
        assert drawn is not None
        return DecodeSequence(name, len(prompt), drawn.token, blocks, SamplingParams(), FinishRule(count))

    def _decoded(self, sequences: list[DecodeSequence]) -> None:
        runner = DecodeRunner(self._model, self._pool, max(1, len(sequences)))
        for sequence in sequences:
            runner.admit(sequence)
        while len(runner):
            runner.step()

    def enter(self, layer: int) -> Any:
        return self._pool.rows(layer)

    def leave(self, layer: int) -> None:
        pass
