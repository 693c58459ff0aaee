"""Layerwise prefill of a batch of chunks (paper section 4): a layer runs when its hit KV is there, and leaves at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from dualpath_ray.engine.attention import CausalAttention
from dualpath_ray.engine.drawing import Draw, draw
from dualpath_ray.engine.kv_codec import KVCodec
from dualpath_ray.engine.logit_rules import LogitRules
from dualpath_ray.engine.model import CausalModel
from dualpath_ray.errors import InvalidRequestError
from dualpath_ray.requests import Drawn, SamplingParams


class LayerGate(Protocol):
    """The owner of the window, asked once per layer, in layer order, in the thread that runs the batch."""

    def enter(self, layer: int) -> torch.Tensor:
        """Block until all hit KV of `layer` lies in memory; return the window's rows for it, `[tokens, 2, kv_heads, *]`.

        Called as late as possible: queries, keys and values of the layer are computed. May raise DualPathError to abort the batch.
        """
        ...

    def leave(self, layer: int) -> None:
        """The layer's new KV is written and its attention has read the rows: they may be pushed on, then reused.

        On CUDA the stream was synchronised before this call, so the memory is coherent for any other device. May raise DualPathError.
        """
        ...


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Consecutive tokens of one sequence to compute, with the KV of the `cached_tokens` before them coming through the gate.

    `first_row` is the row of the window where the sequence's position 0 lies: rows `[first_row, first_row + cached_tokens)` are hit KV,
    the new KV goes right behind. Only a prompt's last chunk has `sampling` and yields a token, none of `forbidden_ids` (FinishRule),
    under `rules` if the sampling is not plain.
    """

    request_id: str
    tokens: npt.NDArray[np.int32]
    cached_tokens: int
    first_row: int
    sampling: SamplingParams | None = None
    forbidden_ids: tuple[int, ...] = ()
    rules: LogitRules | None = None

    @property
    def total_tokens(self) -> int:
        return self.cached_tokens + len(self.tokens)

    @property
    def end_row(self) -> int:
        return self.first_row + self.total_tokens


class PrefillRunner:
    """Runs batches, one at a time. It holds no KV: the gate's rows are the only KV memory it touches."""

    def __init__(self, model: CausalModel) -> None:
        self._model = model
        self._attention = CausalAttention(model.device, model.torch_dtype)

    @torch.inference_mode()
    def run(self, chunks: Sequence[PrefillChunk], gate: LayerGate) -> list[Drawn | None]:
        """Compute all chunks in one pass over the layers; return the first token of each chunk that has `sampling`.

        Raises InvalidRequestError for a chunk the model cannot take, before the gate is asked, and whatever the gate raises. After an
        error the layers that were left are valid and nothing else is; the runner itself can go on with the next batch.
        """
        for chunk in chunks:
            self._check(chunk)
        tokens = torch.from_numpy(np.concatenate([chunk.tokens for chunk in chunks]).astype(np.int64))
        positions = torch.cat([torch.arange(chunk.cached_tokens, chunk.total_tokens) for chunk in chunks])
        ends = np.cumsum([len(chunk.tokens) for chunk in chunks])
        wanted = [index for index, chunk in enumerate(chunks) if chunk.sampling is not None]
        attention = _WindowAttention(self._attention, self._model.kv_codec, chunks, gate)
        logits = self._model.forward(tokens, positions, attention, rows=torch.from_numpy(ends[wanted] - 1))
        first_tokens: list[Drawn | None] = [None] * len(chunks)
        if wanted:
            last = [chunk for chunk in chunks if chunk.sampling is not None]
            rows = [Draw(chunk.sampling, chunk.total_tokens, chunk.forbidden_ids, chunk.rules) for chunk in last if chunk.sampling]
            for index, drawn in zip(wanted, draw(logits, rows), strict=True):
                first_tokens[index] = drawn
        return first_tokens

    def _check(self, chunk: PrefillChunk) -> None:
        model, tokens = self._model, chunk.tokens
        if not len(tokens) or chunk.cached_tokens < 0 or chunk.first_row < 0:
            raise InvalidRequestError(f"request {chunk.request_id}: a chunk needs at least one token to compute and non-negative positions")
        if chunk.total_tokens > model.max_context:
            raise InvalidRequestError(
                f"request {chunk.request_id}: {chunk.total_tokens} tokens exceed the model's context of {model.max_context}"
            )
        if tokens.min() < 0 or tokens.max() >= model.vocab_size:
            raise InvalidRequestError(f"request {chunk.request_id}: token ids must lie in [0, {model.vocab_size})")


class _WindowAttention:
    """AttentionContext of one prefill batch: new KV goes straight into the window's rows, and attention reads them there."""

    def __init__(self, attention: CausalAttention, codec: KVCodec, chunks: Sequence[PrefillChunk], gate: LayerGate) -> None:
        self._attention = attention
        self._codec = codec
        self._chunks = chunks
        self._gate = gate

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        window = self._gate.enter(layer)
        needed = max(chunk.end_row for chunk in self._chunks)
        if needed > window.shape[0]:
            raise ValueError(f"batch needs {needed} window rows, the gate gave {window.shape[0]}")
        out = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        start = 0
        for chunk in self._chunks:
            end = start + len(chunk.tokens)
            rows = window[chunk.first_row : chunk.end_row]
            rows[chunk.cached_tokens :, 0].copy_(self._codec.encode(key[:, start:end].transpose(0, 1)))
            rows[chunk.cached_tokens :, 1].copy_(self._codec.encode(value[:, start:end].transpose(0, 1)))
            self._attention(query[:, start:end], self._codec.decode(rows), scale, out=out[start:end])
            start = end
        if query.is_cuda:
            # The gate's owner lets other devices read and overwrite the rows, which streams know nothing of. Kernels of the next
            # layer are queued while they run, so this costs about one launch per layer.
            torch.cuda.current_stream(query.device).synchronize()
        self._gate.leave(layer)
        return out
