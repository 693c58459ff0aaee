"""KV memory as tensors."""

from __future__ import annotations

import torch

from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.transfer.memory import allocate


def kv_tensor(leading: tuple[int, ...], geometry: KVGeometry, device: str | torch.device) -> torch.Tensor:
    """KV rows `[*leading, 2, kv_heads, *]`, zeroed: `head_dim` elements of the geometry's dtype; quantised, `head_bytes` uint8.

    CPU memory is page aligned and lives as long as the tensor.
    """
    dtype: torch.dtype = torch.uint8 if geometry.quantised else getattr(torch, geometry.dtype)
    shape = (*leading, 2, geometry.kv_heads, geometry.head_bytes // dtype.itemsize)
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    return torch.from_numpy(allocate(count * dtype.itemsize)).view(dtype).view(shape)
