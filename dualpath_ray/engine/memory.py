"""KV memory as tensors."""

from __future__ import annotations

import torch

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.transfer.memory import allocate


def kv_tensor(leading: tuple[int, ...], geometry: KVGeometry, device: str | torch.device) -> torch.Tensor:
    """`[*leading, 2, kv_heads, head_dim]` in the geometry's dtype, zeroed. CPU memory is page aligned and lives as long as the tensor."""
    shape = (*leading, 2, geometry.kv_heads, geometry.head_dim)
    dtype: torch.dtype = getattr(torch, geometry.dtype)
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    return torch.from_numpy(allocate(count * dtype.itemsize)).view(dtype).view(shape)
