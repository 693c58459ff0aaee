"""The layer window: all the KV memory that prefill has."""

from __future__ import annotations

import torch

from dualpath_ray.engine.memory import kv_tensor
from dualpath_ray.kv.geometry import KVGeometry


class LayerWindow:
    """KV of `layers_resident` layers of one batch: tensor `[layers_resident, capacity_tokens, 2, kv_heads, *]`, a ring.

    Layer l of a batch uses ring slot `l % layers_resident`; the owner decides when a slot is free again. Each slot is an array of
    `capacity_tokens / block_tokens` Layer Blocks. On the CPU memory is page aligned, so that it can be registered for transfers.
    """

    def __init__(self, geometry: KVGeometry, layers_resident: int, capacity_tokens: int, device: str | torch.device = "cpu") -> None:
        if layers_resident < 1:
            raise ValueError(f"layers_resident must be at least 1, not {layers_resident}")
        if capacity_tokens < 1 or capacity_tokens % geometry.block_tokens:
            raise ValueError(f"capacity_tokens must be a positive multiple of {geometry.block_tokens}, not {capacity_tokens}")
        self.geometry = geometry
        self.layers_resident = layers_resident
        self.capacity_tokens = capacity_tokens
        self.tensor = kv_tensor((layers_resident, capacity_tokens), geometry, device)

    @property
    def data_ptr(self) -> int:
        return self.tensor.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def view(self, ring_slot: int) -> torch.Tensor:
        """`[capacity_tokens, 2, kv_heads, *]` of one ring slot."""
        return self.tensor[ring_slot]
