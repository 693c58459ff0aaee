"""Shape of KV-Cache blocks (paper section A.5).

A *Full Block* is the KV of `block_tokens` consecutive tokens in all layers, a byte tensor `[layer, tokens, bytes]`; its slice of
one layer is a *Layer Block* `[1, tokens, bytes]`. Concatenating a block's Layer Blocks in layer order gives the Full Block, so no
layout is ever converted: storage moves Full Blocks, the network moves Layer Blocks, and both are ranges of the same bytes.

One token's bytes in one layer are `[2, kv_heads, head_bytes]`: K, then V, after rotary embedding. A head's bytes are its `head_dim`
elements; of a quantised type (`engine/kv_codec.py`) they are followed by the head's own scale, so a token's bytes never depend on another
token and blocks stay what they are: bytes that are moved, never converted.
"""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED_BYTES = {"int8": 1, "float8_e4m3fn": 1}
SCALE_BYTES = 2  # one float16 for each head of each token's K and V


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """Everything that fixes the meaning of a block's bytes. Two engines exchange blocks only if theirs are equal."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str = "float32"
    block_tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("layers", "kv_heads", "head_dim", "block_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"KVGeometry.{name} must be at least 1, not {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES | QUANTISED_BYTES:
            raise ValueError(f"KVGeometry.dtype must be one of {', '.join(DTYPE_BYTES | QUANTISED_BYTES)}, not {self.dtype!r}")
        if self.quantised and self.head_dim % 2:
            raise ValueError(f"KVGeometry.head_dim must be even for quantised KV, not {self.head_dim}: scales are two bytes, aligned")

    @property
    def quantised(self) -> bool:
        return self.dtype in QUANTISED_BYTES

    @property
    def head_bytes(self) -> int:
        """Bytes of one head of one token's K or V."""
        if self.quantised:
            return self.head_dim * QUANTISED_BYTES[self.dtype] + SCALE_BYTES
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def token_layer_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return 2 * self.kv_heads * self.head_bytes

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return self.layers * self.token_layer_bytes

    @property
    def layer_block_bytes(self) -> int:
        return self.block_tokens * self.token_layer_bytes

    @property
    def full_block_bytes(self) -> int:
        return self.layers * self.layer_block_bytes

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold `tokens` tokens, the last one perhaps partly."""
        return -(-tokens // self.block_tokens)

    def signature(self) -> bytes:
        """Canonical bytes of this geometry, committed to by every block key."""
        fields = ("layers", "kv_heads", "head_dim", "dtype", "block_tokens")
        return ";".join(f"{name}={getattr(self, name)}" for name in fields).encode()
