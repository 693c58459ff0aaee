from __future__ import annotations

import pytest
import torch

from dualpath_ray.engine.window import LayerWindow
from dualpath_ray.kv.geometry import KVGeometry

GEOMETRY = KVGeometry(layers=3, kv_heads=2, head_dim=4, dtype="bfloat16", block_tokens=8)


def test_slots_are_arrays_of_layer_blocks() -> None:
    window = LayerWindow(GEOMETRY, 2, 40)
    assert window.tensor.dtype == torch.bfloat16
    assert window.data_ptr % 4096 == 0
    assert window.nbytes == 2 * 5 * GEOMETRY.layer_block_bytes
    assert window.view(1).shape == (40, 2, 2, 4)
    assert window.view(1).data_ptr() == window.data_ptr + 5 * GEOMETRY.layer_block_bytes


@pytest.mark.parametrize("layers, tokens", [(0, 8), (1, 0), (1, 12)])
def test_impossible_sizes_are_refused(layers: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        LayerWindow(GEOMETRY, layers, tokens)
