"""Decode with continuous batching: every step gives each running sequence one token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dualpath_ray.engine.attention import decode_attention, split_rows
from dualpath_ray.engine.drawing import Draw, draw
from dualpath_ray.engine.finish import FinishRule
from dualpath_ray.engine.kv_codec import KVCodec
from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.engine.pool import BlockIds, PagedPool
from dualpath_ray.errors import DualPathError, InvalidRequestError, OverloadedError
from dualpath_ray.requests import Drawn, FinishReason, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class DecodeSequence:
    """A sequence ready to decode. The KV of positions `[0, prompt_len)` lies in `blocks`, in order; `last_token` is the first
    generated token (already checked against `finish`), whose KV is not there yet. `rules`, if the sampling is not plain, have taken
    `last_token` in.

    `blocks` hold room for `prompt_len + finish.max_new_tokens - 1` tokens and stay the caller's: the runner never frees them.
    """

    request_id: str
    prompt_len: int
    last_token: int
    blocks: BlockIds
    sampling: SamplingParams
    finish: FinishRule
    rules: LogitRules | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One new token. `kv_tokens` tokens of the sequence have their KV in the pool now, so blocks that they fill can be persisted.

    With a `finish_reason` the sequence has left the runner; with an `error` too, because it cannot go on after this token.
    """

    request_id: str
    token: int
    finish_reason: FinishReason | None
    kv_tokens: int
    logprobs: TokenLogprobs | None = None
    error: DualPathError | None = None


class DecodeRunner:
    """The running batch over one pool. Not thread safe: admit, remove and step are called from one thread (or under one lock)."""

    def __init__(self, model: CausalModel, pool: PagedPool, max_batch: int) -> None:
        if pool.geometry != model.geometry(pool.geometry.block_tokens):
            raise ValueError(f"pool geometry {pool.geometry} does not fit the model {model.path}")
        self._model = model
        self._pool = pool
        self._max_batch = max_batch
        self._running: dict[str, _Running] = {}

    def __len__(self) -> int:
        return len(self._running)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._running

    def can_admit(self) -> bool:
        return len(self._running) < self._max_batch

    def admit(self, sequence: DecodeSequence) -> None:
        """Let `sequence` take part from the next step on.

        Raises OverloadedError if the batch is full, InvalidRequestError if the sequence cannot run.
        """
        name, finish = sequence.request_id, sequence.finish
        if not self.can_admit():
            raise OverloadedError(f"request {name}: {len(self._running)} sequences run, the most that decode.max_batch allows")
        if name in self._running:
            raise InvalidRequestError(f"request {name} is decoding already")
        if finish.reason(sequence.last_token, 1) is not None:
            raise InvalidRequestError(f"request {name} has ended with its first token")
        total, limit = sequence.prompt_len + finish.max_new_tokens, self._model.max_context
        if total > limit:
            raise InvalidRequestError(f"request {name}: prompt and continuation of {total} tokens exceed the model's context of {limit}")
        needed = self._pool.geometry.blocks_for(sequence.prompt_len + finish.max_new_tokens - 1)
        if len(sequence.blocks) < needed:
            raise InvalidRequestError(f"request {name}: {len(sequence.blocks)} KV blocks given, {needed} needed")
        self._running[name] = _Running(sequence, self._pool)

    def remove(self, request_id: str) -> bool:
        """Take a sequence out (cancel); its blocks may be released at once. False if it does not run (any more)."""
        return self._running.pop(request_id, None) is not None

    @torch.inference_mode()
    def step(self) -> list[StepOutput]:
        """One token for every running sequence, in order of admission; empty if none runs. When it returns all KV is in memory.

        Raises OverloadedError if device memory does not suffice; no sequence has advanced then.
        """
        batch = list(self._running.values())
        if not batch:
            return []
        tokens = torch.tensor([running.token for running in batch])
        positions = torch.tensor([running.kv_tokens for running in batch])
        logits = self._model.forward(
            tokens, positions, _PoolAttention(self._pool, self._model.kv_codec, batch), rows=torch.arange(len(batch))
        )
        return [self._advance(running, drawn) for running, drawn in zip(batch, draw(logits, [one.draw() for one in batch]), strict=True)]

    def _advance(self, running: _Running, drawn: Drawn) -> StepOutput:
        sequence, token = running.sequence, drawn.token
        running.token = token
        running.generated += 1
        running.kv_tokens += 1
        reason = sequence.finish.reason(token, running.generated)
        error: DualPathError | None = None
        if reason is None and sequence.rules is not None:
            try:
                sequence.rules.advance(token)
            except DualPathError as raised:
                error = raised
        if reason is not None or error is not None:
            del self._running[sequence.request_id]
        return StepOutput(sequence.request_id, token, reason, running.kv_tokens, drawn.logprobs, error)


class _Running:
    """A sequence's state between steps: `token` is its last one, whose KV the next step writes at position `kv_tokens`."""

    __slots__ = ("_blocks", "_pool", "_table", "generated", "kv_tokens", "sequence", "token")

    def __init__(self, sequence: DecodeSequence, pool: PagedPool) -> None:
        self.sequence = sequence
        self.token = sequence.last_token
        self.generated = 1
        self.kv_tokens = sequence.prompt_len
        self._pool = pool
        self._blocks = sequence.blocks.astype(np.int64)
        neighbours = bool(np.all(np.diff(self._blocks) == 1))
        self._table = None if neighbours else torch.from_numpy(self._blocks).to(pool.tensor.device)

    def draw(self) -> Draw:
        """How the next token is drawn."""
        sequence = self.sequence
        return Draw(sequence.sampling, self.kv_tokens + 1, sequence.finish.forbidden(self.generated), sequence.rules)

    def next_row(self) -> int:
        """Row of a layer where the KV of `token` goes."""
        size = self._pool.geometry.block_tokens
        block, offset = divmod(self.kv_tokens, size)
        return int(self._blocks[block]) * size + offset

    def kv(self, codec: KVCodec) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Layer by layer the keys and values `[1, kv_heads, kv_tokens + 1, head_dim]`, `token` included.

        Views, made for all layers at once, if the blocks are neighbours and KV is not quantised; else made one layer at a time.
        """
        length, size = self.kv_tokens + 1, self._pool.geometry.block_tokens
        first, used = int(self._blocks[0]), -(-length // size)
        if self._table is None and not self._pool.geometry.quantised:
            rows = self._pool.tensor[:, first : first + used].flatten(1, 2)[:, :length]
            keys, values = rows.permute(2, 0, 3, 1, 4).unsqueeze(2)
            yield from zip(keys, values, strict=True)
            return
        for layer in self._pool.tensor:
            blocks = layer[first : first + used] if self._table is None else layer.index_select(0, self._table[:used])
            yield split_rows(codec.decode(blocks.flatten(0, 1)[:length]))


class _PoolAttention:
    """AttentionContext of one step; layers come in order, once each (`load_model` made sure).

    One attention call per sequence: on a CPU that is about twice as fast as gathering all of them for one padded call.
    """

    def __init__(self, pool: PagedPool, codec: KVCodec, batch: Sequence[_Running]) -> None:
        self._pool, self._codec = pool, codec
        self._targets = torch.tensor([running.next_row() for running in batch], device=pool.tensor.device)
        self._kv = [running.kv(codec) for running in batch]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        heads, batch, head_dim = query.shape
        new = torch.stack((key.transpose(0, 1), value.transpose(0, 1)), dim=1)
        self._pool.rows(layer).index_copy_(0, self._targets, self._codec.encode(new))
        queries = query.transpose(0, 1).reshape(batch, 1, key.shape[0], -1, head_dim).unbind(0)
        outs = [decode_attention(one, *next(kv), scale) for one, kv in zip(queries, self._kv, strict=True)]
        return torch.cat(outs).view(batch, heads, head_dim)
