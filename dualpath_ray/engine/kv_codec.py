"""How keys and values become the bytes of KV rows, and back.

Plain rows hold them as they are. Quantised rows hold one-byte elements and one float16 scale per head, token and K or V:

    scale = max |x| / largest code, code = round(x / scale)

KV is rounded where it is computed, before anything attends to it: hit or miss, prefill or decode, all see the same rounded values, so
text does not depend on the path here either (architecture.md, invariant 4). Scales of one token's head need no calibration and no
knowledge of other tokens, at the price of 2 bytes per head (3 % at 64 dimensions).

Casts and arithmetic are torch's own kernels; attention reads dequantised rows, a layer at a time.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dualpath_ray.kv.geometry import KVGeometry

_LARGEST_CODE = {"int8": 127.0, "float8_e4m3fn": 448.0}


class KVCodec(Protocol):
    """Heads are `[..., head_dim]` in the model's dtype, rows `[..., *]` with the last dimension that `memory.kv_tensor` gives them."""

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        """Rows of `heads`; perhaps `heads` itself."""
        ...

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        """Heads of `rows`; a view where nothing has to be computed."""
        ...


class PlainCodec:
    """Rows are heads."""

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        return heads

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows


class QuantisedCodec:
    """One-byte codes, then the scale, per head."""

    def __init__(self, geometry: KVGeometry, dtype: torch.dtype) -> None:
        self._dim, self._bytes = geometry.head_dim, geometry.head_bytes
        self._code: torch.dtype = getattr(torch, geometry.dtype)
        self._largest = _LARGEST_CODE[geometry.dtype]
        self._dtype = dtype

    def encode(self, heads: torch.Tensor) -> torch.Tensor:
        exact = heads.float()
        scale = (exact.abs().amax(dim=-1, keepdim=True) / self._largest).half()
        # Divided by the scale as it is stored; where it rounds to nothing, so do the values.
        codes = (exact / scale.float()).nan_to_num_(0.0, 0.0, 0.0).clamp_(-self._largest, self._largest)
        if not self._code.is_floating_point:
            codes.round_()
        rows = heads.new_empty((*heads.shape[:-1], self._bytes), dtype=torch.uint8)
        rows[..., : self._dim] = codes.to(self._code).view(torch.uint8)
        rows[..., self._dim :] = scale.view(torch.uint8)
        return rows

    def decode(self, rows: torch.Tensor) -> torch.Tensor:
        codes = rows[..., : self._dim].view(self._code)
        scale = rows[..., self._dim :].view(torch.float16)
        return codes.to(self._dtype) * scale.to(self._dtype)


def codec_for(geometry: KVGeometry, dtype: torch.dtype) -> KVCodec:
    """The codec between `geometry`'s rows and a model that computes in `dtype`."""
    return QuantisedCodec(geometry, dtype) if geometry.quantised else PlainCodec()
