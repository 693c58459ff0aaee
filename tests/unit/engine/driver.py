"""Drives the engine as the actors do: hit KV streamed into a small window by another thread, decode over a pool."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dualpath_ray.engine.decode import DecodeRunner, DecodeSequence
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.memory import kv_tensor
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.pool import PagedPool
from dualpath_ray.engine.prefill import PrefillChunk, PrefillRunner
from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.errors import DeadlineExceededError
from dualpath_ray.requests import SamplingParams

WAIT_S = 30.0


@dataclass
class Turn:
    """A prompt under way. `kv[layer]` holds the rows of its first `kv.shape[1]` tokens, as a staging buffer would."""

    name: str
    prompt: list[int]
    kv: torch.Tensor
    sampling: SamplingParams = field(default_factory=SamplingParams)
    forbidden: tuple[int, ...] = ()

    @property
    def cached(self) -> int:
        return int(self.kv.shape[1])


def turn(model: CausalModel, name: str, prompt: list[int], **settings: object) -> Turn:
    return Turn(name, prompt, kv_tensor((model.layers, 1), model.geometry(1), "cpu")[:, :0], **settings)  # type: ignore[arg-type]


def spoil(memory: torch.Tensor) -> None:
    """Make all of it NaN (quantised KV: its scales)."""
    memory.fill_(float("nan") if memory.is_floating_point() else 0xFF)


class StreamingGate:
    """A LayerGate over a ring of few layers, all NaN but for what is owed: rows read early, late or beyond their chunk spoil the text.

    A thread copies each chunk's hit rows into a slot once that slot is free; `leave` takes the new rows out.
    """

    def __init__(self, window: LayerWindow, turns: Sequence[Turn], chunks: Sequence[PrefillChunk]) -> None:
        self.window = window
        self.entered: list[int] = []
        self.left: list[int] = []
        self._turns = turns
        self._chunks = chunks
        layers = window.geometry.layers
        self._new: list[list[torch.Tensor]] = [[] for _ in turns]
        self._arrived = [threading.Event() for _ in range(layers)]
        self._free = threading.Semaphore(window.layers_resident)
        self._loader = threading.Thread(target=self._load, daemon=True)
        spoil(window.tensor)
        self._loader.start()

    def enter(self, layer: int) -> torch.Tensor:
        if not self._arrived[layer].wait(WAIT_S):
            raise DeadlineExceededError(f"layer {layer} never came")
        self.entered.append(layer)
        return self._slot(layer)

    def leave(self, layer: int) -> None:
        self.left.append(layer)
        for new, chunk in zip(self._new, self._chunks, strict=True):
            new.append(self._slot(layer)[chunk.first_row + chunk.cached_tokens : chunk.end_row].clone())
        spoil(self._slot(layer))
        self._free.release()

    def finish(self) -> None:
        """Append the new KV to the turns."""
        self._loader.join(WAIT_S)
        for item, new in zip(self._turns, self._new, strict=True):
            item.kv = torch.cat([item.kv, torch.stack(new)], dim=1)

    def _slot(self, layer: int) -> torch.Tensor:
        return self.window.view(layer % self.window.layers_resident)

    def _load(self) -> None:
        for layer, arrived in enumerate(self._arrived):
            if not self._free.acquire(timeout=WAIT_S):
                return
            for item, chunk in zip(self._turns, self._chunks, strict=True):
                rows = self._slot(layer)[chunk.first_row : chunk.first_row + chunk.cached_tokens]
                np.copyto(rows.numpy(), item.kv[layer].numpy())
            arrived.set()


def make_chunks(turns: Sequence[Turn], budget: int, block_tokens: int) -> list[PrefillChunk]:
    """The next chunk of each turn, at most `budget` tokens each, laid out in the window one after the other from row `block_tokens`."""
    chunks, first_row = [], block_tokens
    for item in turns:
        tokens = item.prompt[item.cached : item.cached + budget]
        last = item.cached + len(tokens) == len(item.prompt)
        array = np.array(tokens, dtype=np.int32)
        chunks.append(PrefillChunk(item.name, array, item.cached, first_row, item.sampling if last else None, item.forbidden))
        first_row += -(-(item.cached + len(tokens)) // block_tokens) * block_tokens
    return chunks


def prefill(
    model: CausalModel, turns: Sequence[Turn], *, budget: int = 1 << 20, block_tokens: int = 16, layers_resident: int = 2
) -> dict[str, int]:
    """Prefill all turns in as many batches of chunks as it takes; returns their first tokens and leaves their KV in them."""
    runner, first_tokens = PrefillRunner(model), {}
    waiting = list(turns)
    while waiting:
        chunks = make_chunks(waiting, budget, block_tokens)
        capacity = -(-chunks[-1].end_row // block_tokens) * block_tokens
        gate = StreamingGate(LayerWindow(model.geometry(block_tokens), layers_resident, capacity), waiting, chunks)
        for item, drawn in zip(waiting, runner.run(chunks, gate), strict=True):
            if drawn is not None:
                first_tokens[item.name] = drawn.token
        gate.finish()
        assert gate.entered == gate.left == list(range(model.layers))
        waiting = [item for item in waiting if item.cached < len(item.prompt)]
    return first_tokens


def put_into_pool(pool: PagedPool, kv: torch.Tensor, blocks: Sequence[int]) -> None:
    """Copy rows `[layers, tokens, 2, kv_heads, head_dim]` to the pool's `blocks`."""
    size = pool.geometry.block_tokens
    for index in range(-(-kv.shape[1] // size)):
        part = kv[:, index * size : (index + 1) * size]
        pool.tensor[:, int(blocks[index]), : part.shape[1]] = part


def join(
    runner: DecodeRunner, pool: PagedPool, item: Turn, first_token: int, finish: FinishRule, blocks: Sequence[int] | None = None
) -> DecodeSequence:
    """Bring a prefilled turn into the decode batch."""
    count = pool.geometry.blocks_for(len(item.prompt) + finish.max_new_tokens - 1)
    ids = pool.allocate(count) if blocks is None else np.array(blocks, dtype=np.int32)
    put_into_pool(pool, item.kv, list(ids))
    sequence = DecodeSequence(item.name, len(item.prompt), first_token, ids, item.sampling, finish)
    runner.admit(sequence)
    return sequence


def random_prompt(seed: int, length: int, vocabulary: int = 512) -> list[int]:
    return [int(token) for token in np.random.Generator(np.random.PCG64(seed)).integers(3, vocabulary, length)]


def complete(
    model: CausalModel, turns: Sequence[Turn], new_tokens: int, *, budget: int = 1 << 20, block_tokens: int = 16
) -> dict[str, list[int]]:
    """Prefill and decode all turns together; returns their continuations and leaves their KV in them."""
    first = prefill(model, turns, budget=budget, block_tokens=block_tokens)
    geometry = model.geometry(block_tokens)
    pool = PagedPool(geometry, sum(geometry.blocks_for(len(item.prompt) + new_tokens) for item in turns))
    spoil(pool.tensor)
    runner = DecodeRunner(model, pool, len(turns))
    held = {item.name: join(runner, pool, item, first[item.name], FinishRule(new_tokens)) for item in turns}
    text = {name: [token] for name, token in first.items()}
    while len(runner):
        for output in runner.step():
            text[output.request_id].append(output.token)
    for item in turns:
        blocks = torch.from_numpy(held[item.name].blocks.astype(np.int64))
        length = len(item.prompt) + new_tokens - 1
        item.kv = pool.tensor[:, blocks].flatten(1, 2)[:, :length].clone()
        pool.release(held[item.name].blocks)
    pool.check_integrity()
    assert pool.free_blocks == pool.blocks
    return text
