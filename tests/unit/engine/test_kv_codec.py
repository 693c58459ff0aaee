"""Quantised KV: rows of codes and scales, and text that does not depend on where the KV came from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dualpath_ray.engine.kv_codec import codec_for
from dualpath_ray.engine.memory import kv_tensor
from dualpath_ray.engine.model import CausalModel, load_model
from dualpath_ray.errors import ConfigError
from dualpath_ray.kv.geometry import QUANTISED_BYTES, KVGeometry
from dualpath_ray.models.tiny import make_tiny_model
from dualpath_ray.requests import SamplingParams

from .driver import Turn, complete, random_prompt, turn

KINDS = sorted(QUANTISED_BYTES)
# Half a step of the scale for integers, half a unit in the last of three mantissa bits (or of the smallest exponent) for FP8.
STEP = {"int8": 0.5 / 127, "float8_e4m3fn": 1 / 16}
NEW = 12


@pytest.fixture(scope="module", params=KINDS)
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CausalModel:
    path = make_tiny_model("llama", tmp_path_factory.mktemp("quantised") / "llama")
    return load_model(path, kv_dtype=request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_values_come_back_within_a_step_of_their_heads_largest(kind: str, dtype: torch.dtype) -> None:
    geometry = KVGeometry(layers=1, kv_heads=3, head_dim=32, dtype=kind)
    codec = codec_for(geometry, dtype)
    torch.manual_seed(0)
    heads = (torch.randn(50, 2, 3, 32) * torch.logspace(-3, 3, 50)[:, None, None, None]).to(dtype)
    rows = codec.encode(heads)
    assert rows.dtype == torch.uint8 and rows.shape[-1] == geometry.head_bytes == 34
    back = codec.decode(rows)
    assert back.dtype == dtype and back.shape == heads.shape
    error = (back.float() - heads.float()).abs() / heads.float().abs().amax(-1, keepdim=True)
    rounding = 2**-7 if dtype == torch.bfloat16 else 2**-10  # of the scale, and of the product in bfloat16
    assert error.max() <= STEP[kind] + rounding


@pytest.mark.parametrize("kind", KINDS)
def test_zero_tiny_and_huge_heads(kind: str) -> None:
    codec = codec_for(KVGeometry(1, 1, 8, kind), torch.float32)
    heads = torch.tensor([0.0, 1e-30, 1e-6, 1e6])[:, None, None].expand(4, 1, 8)
    back = codec.decode(codec.encode(heads))
    assert back.isfinite().all()
    assert (back[:2] == 0).all()
    assert torch.allclose(back[3], heads[3], rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_own_token_only(kind: str) -> None:
    codec = codec_for(KVGeometry(1, 2, 16, kind), torch.float32)
    heads = torch.randn(9, 2, 2, 16)
    rows = codec.encode(heads)
    for token in range(9):
        assert torch.equal(codec.encode(heads[token : token + 1])[0], rows[token])


def test_geometry_counts_codes_and_scales() -> None:
    plain, small = KVGeometry(2, 4, 64), KVGeometry(2, 4, 64, "int8")
    assert small.token_layer_bytes == 2 * 4 * (64 + 2)
    assert plain.full_block_bytes / small.full_block_bytes == pytest.approx(256 / 66)
    assert kv_tensor((5,), small, "cpu").nbytes == 5 * small.token_layer_bytes
    assert small.signature() != KVGeometry(2, 4, 64, "float8_e4m3fn").signature()
    with pytest.raises(ValueError, match="even"):
        KVGeometry(2, 4, 63, "int8")


def test_text_does_not_depend_on_chunks_or_hits(quantised: CausalModel) -> None:
    """The same rounded KV is attended to whether it was computed in this batch, in an earlier chunk, by decode, or read from storage."""
    prompt = random_prompt(7, 315)
    for sampling in (SamplingParams(), SamplingParams(temperature=0.9, top_p=0.95, seed=5)):
        cold = turn(quantised, "x", prompt, sampling=sampling)
        expected = complete(quantised, [cold], NEW)["x"]
        chunked = turn(quantised, "x", prompt, sampling=sampling)
        other = turn(quantised, "other", random_prompt(8, 40))
        assert complete(quantised, [other, chunked], NEW, budget=64)["x"] == expected
        for cached in (16, 304):
            warm = Turn("x", prompt, cold.kv[:, :cached].clone(), sampling)
            assert complete(quantised, [warm], NEW, budget=100)["x"] == expected
        for cut in (1, 5):
            again = turn(quantised, "x", prompt + expected[:cut], sampling=sampling)
            assert complete(quantised, [again], NEW - cut)["x"] == expected[cut:]


def test_an_unknown_kv_type_is_refused(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "tiny")
    with pytest.raises(ConfigError, match="int8, float8_e4m3fn, not 'float16'"):
        load_model(path, kv_dtype="float16")
