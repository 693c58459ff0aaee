"""The one attention function that replaces transformers' own, and the two kernels behind it.

Models call it once per layer with packed queries, keys and values after rotary embedding. It hands them to the `AttentionContext`
that the runner passed into the forward call as a keyword argument; the context decides where keys and values are stored.

KV rows are `[tokens, 2, kv_heads, head_dim]` (one token's bytes as in kv/geometry.py). Both kernels read them as strided views and
leave grouped-query heads unexpanded, so no layer's KV is ever copied.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from dualpath_ray.errors import ConfigError

IMPLEMENTATION = "dualpath"  # the name under which transformers knows our function
CONTEXT_ARGUMENT = "dualpath_context"  # keyword argument of the model's forward call that carries the context
QUERY_TILE = 256

# What some models ask of an attention function and ours does not do; ignoring it would give wrong text.
_UNSUPPORTED = {"sliding_window": "sliding-window attention", "softcap": "logit soft-capping", "s_aux": "attention sinks"}


class AttentionContext(Protocol):
    """Where the keys and values of one forward call live."""

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        """Store the new KV of `layer` and attend. query `[heads, T, head_dim]`, key and value `[kv_heads, T, head_dim]`.

        Returns `[T, heads, head_dim]`. `scale` is None for the usual 1/sqrt(head_dim).
        """
        ...


def dualpath_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention signature; the batch is one packed row. Raises ConfigError where a model needs what we lack."""
    for argument, feature in _UNSUPPORTED.items():
        if kwargs.get(argument) is not None:
            raise ConfigError(f"model uses {feature} ({argument}={kwargs[argument]}), which this engine does not support")
    context: AttentionContext | None = kwargs.get(CONTEXT_ARGUMENT)
    if context is None:
        raise ConfigError(
            f"{type(module).__name__} does not pass keyword arguments on to its attention; this engine does not support the model"
        )
    layer: int = module.layer_idx  # type: ignore[assignment]  # nn.Module types every attribute as a module or tensor
    return context.attend(layer, query[0], key[0], value[0], scaling).unsqueeze(0), None


class CausalAttention:
    """Attention of a run of new tokens on a sequence's rows, aligned bottom-right: the last query sees every row.

    Without history it is the library's causal kernel. With history queries go in tiles of QUERY_TILE, each on the rows up to its own
    end, so that one bias of `[QUERY_TILE, longest sequence]` serves every tile of every chunk, and is kept between forward calls.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._bias = torch.empty(QUERY_TILE, 0, device=device, dtype=dtype)

    def __call__(self, query: torch.Tensor, rows: torch.Tensor, scale: float | None, out: torch.Tensor) -> None:
        """query `[heads, n, head_dim]` on rows `[N >= n, 2, kv_heads, head_dim]` into out `[n, heads, head_dim]`."""
        new, total = query.shape[1], rows.shape[0]
        if new == total:
            out.copy_(_attend(query, rows, scale, is_causal=True).transpose(0, 1))
            return
        for start in range(0, new, QUERY_TILE):
            end = min(start + QUERY_TILE, new)
            visible = total - new + end
            bias = self._lower_right(end - start, visible) if end - start > 1 else None
            out[start:end].copy_(_attend(query[:, start:end], rows[:visible], scale, bias=bias).transpose(0, 1))

    def _lower_right(self, queries: int, rows: int) -> torch.Tensor:
        """`[queries, rows]`, a view: query i sees all but the last `queries - 1 - i` rows."""
        if self._bias.shape[1] < rows:
            columns = max(QUERY_TILE, 1 << (rows - 1).bit_length())
            bias = self._bias.new_zeros(QUERY_TILE, columns)
            bias[:, columns - QUERY_TILE :] = self._bias.new_full((QUERY_TILE, QUERY_TILE), float("-inf")).triu_(1)
            self._bias = bias
        return self._bias[QUERY_TILE - queries :, self._bias.shape[1] - rows :]


def decode_attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float | None) -> torch.Tensor:
    """One token's queries `[1, kv_heads, group, head_dim]` on all of keys and values `[1, kv_heads, N, head_dim]`.

    Returns the shape of `query`. The query heads that share a KV head are treated as its query positions: no mask, no expansion.
    """
    return scaled_dot_product_attention(query, keys, values, scale=scale)


def split_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[1, kv_heads, N, head_dim]` of KV rows `[N, 2, kv_heads, head_dim]`, as views."""
    keys, values = rows.permute(1, 2, 0, 3).unsqueeze(1)
    return keys, values


def _attend(
    query: torch.Tensor, rows: torch.Tensor, scale: float | None, *, bias: torch.Tensor | None = None, is_causal: bool = False
) -> torch.Tensor:
    keys, values = split_rows(rows)
    grouped = query.shape[0] != keys.shape[1]
    return scaled_dot_product_attention(query[None], keys, values, attn_mask=bias, is_causal=is_causal, scale=scale, enable_gqa=grouped)[0]
