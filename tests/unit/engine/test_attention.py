from __future__ import annotations

import pytest
import torch

from dualpath_ray.engine.attention import QUERY_TILE, CausalAttention, decode_attention, dualpath_attention, split_rows
from dualpath_ray.errors import ConfigError


def by_definition(query: torch.Tensor, rows: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax attention written out; query [heads, n, d], rows [N, 2, kv_heads, d]; returns [n, heads, d]."""
    heads, new, _ = query.shape
    total, _, kv_heads, _ = rows.shape
    keys, values = rows.double().repeat_interleave(heads // kv_heads, dim=2).unbind(1)
    scores = torch.einsum("hqd,khd->hqk", query.double(), keys) * scale
    visible = torch.arange(total)[None, :] <= torch.arange(total - new, total)[:, None]
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), values).float()


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 4), (4, 1)])
@pytest.mark.parametrize("new, cached", [(1, 0), (5, 0), (1, 40), (5, 40), (QUERY_TILE, 3), (2 * QUERY_TILE + 7, 65)])
def test_causal_attention_is_aligned_to_the_last_row(heads: int, kv_heads: int, new: int, cached: int) -> None:
    torch.manual_seed(0)
    query, rows = torch.randn(heads, new, 16), torch.randn(cached + new, 2, kv_heads, 16)
    out = torch.empty(new, heads, 16)
    CausalAttention(torch.device("cpu"), torch.float32)(query, rows, 0.3, out)
    torch.testing.assert_close(out, by_definition(query, rows, 0.3), atol=1e-5, rtol=1e-5)


def test_the_bias_serves_shorter_sequences_after_longer_ones() -> None:
    torch.manual_seed(0)
    attention = CausalAttention(torch.device("cpu"), torch.float32)
    for new, cached in ((30, 900), (300, 10), (7, 2000), (2, 1)):
        query, rows, out = torch.randn(4, new, 8), torch.randn(cached + new, 2, 2, 8), torch.empty(new, 4, 8)
        attention(query, rows, 0.5, out)
        torch.testing.assert_close(out, by_definition(query, rows, 0.5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads, kv_heads", [(9, 3), (4, 4), (4, 1)])
def test_decode_attention_sees_every_row(heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    query, rows = torch.randn(heads, 16), torch.randn(77, 2, kv_heads, 16)
    out = decode_attention(query.view(1, kv_heads, -1, 16), *split_rows(rows), 0.3).view(heads, 16)
    torch.testing.assert_close(out, by_definition(query[:, None], rows, 0.3)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("argument", ["sliding_window", "softcap", "s_aux"])
def test_features_we_lack_are_refused_not_ignored(argument: str) -> None:
    zero = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ConfigError, match=argument):
        dualpath_attention(torch.nn.Identity(), zero, zero, zero, None, **{argument: 5})


def test_a_model_that_drops_the_context_is_refused() -> None:
    zero = torch.zeros(1, 1, 1, 8)
    with pytest.raises(ConfigError, match="does not pass keyword arguments"):
        dualpath_attention(torch.nn.Identity(), zero, zero, zero, None)
