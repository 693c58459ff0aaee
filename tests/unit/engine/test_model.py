from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dualpath_ray.engine.fingerprint import model_fingerprint
from dualpath_ray.engine.model import load_model
from dualpath_ray.errors import ConfigError, OverloadedError
from dualpath_ray.kv.geometry import KVGeometry

from .conftest import SMALL, Pair, make_model


@pytest.fixture
def copy(llama: Pair, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama.path, tmp_path / "copy"))


def edit(path: Path, name: str, **changes: Any) -> None:
    content = json.loads((path / name).read_text())
    (path / name).write_text(json.dumps(content | changes))


def test_facts_of_a_model(pair: Pair) -> None:
    model = pair.model
    assert (model.vocab_size, model.max_context, model.eos_token_ids) == (512, 4096, (2,))
    assert model.geometry(64) == KVGeometry(layers=4, kv_heads=2, head_dim=32, dtype="float32", block_tokens=64)


def test_eos_may_be_a_list_or_come_from_the_config(copy: Path) -> None:
    edit(copy, "generation_config.json", eos_token_id=[2, 1])
    assert load_model(copy).eos_token_ids == (2, 1)
    edit(copy, "generation_config.json", eos_token_id=None)
    assert load_model(copy).eos_token_ids == (2,)


def test_bfloat16_runs(copy: Path) -> None:
    model = load_model(copy, dtype="bfloat16")
    assert model.geometry(16).dtype == "bfloat16"


def test_the_fingerprint_tells_weights_config_and_dtype_apart(llama: Pair, copy: Path) -> None:
    original = llama.model.fingerprint
    assert model_fingerprint(copy, "float32") == original
    assert model_fingerprint(copy, "bfloat16") != original
    edit(copy, "config.json", transformers_version="9.9.9")
    assert model_fingerprint(copy, "float32") == original
    edit(copy, "config.json", rms_norm_eps=1e-6)
    other_config = model_fingerprint(copy, "float32")
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.2.mlp.up_proj.weight"][17, 3] += 1e-3
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert len({original, other_config, model_fingerprint(copy, "float32")}) == 3


def test_sharded_weights_load_and_count(llama: Pair, copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in part}, copy / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(part, shard)
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model = load_model(copy)
    assert model.layers == 4
    assert model.fingerprint != llama.model.fingerprint


def unlink(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda path: edit(path, "config.json", **changes)


def drop_a_weight(path: Path) -> None:
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "spoil, message",
    [
        pytest.param(unlink("config.json"), "no config.json", id="no config"),
        pytest.param(unlink("model.safetensors"), "convert the weights", id="no weights"),
        pytest.param(lambda path: (path / "config.json").write_text("{"), "cannot be loaded", id="broken config"),
        pytest.param(truncate, "cannot be loaded", id="truncated weights"),
        pytest.param(drop_a_weight, "lacks weights", id="missing weight"),
        pytest.param(config(hidden_size=256), "cannot be loaded|wrong shape", id="wrong shape"),
        pytest.param(config(model_type="nonsense"), "cannot be loaded", id="unknown model"),
        pytest.param(config(model_type="bert"), "cannot be loaded|lacks weights|does not", id="not a causal decoder"),
        pytest.param(config(model_type="mistral", sliding_window=64), "sliding", id="sliding window by argument"),
        pytest.param(
            config(model_type="qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2),
            "sliding_attention",
            id="sliding layers",
        ),
        pytest.param(
            config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic rotary", id="dynamic rope"
        ),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(copy: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(copy)
    with pytest.raises(ConfigError, match=message):
        load_model(copy)


@pytest.mark.parametrize(
    "kind, shape, message",
    [
        pytest.param("bloom", {"n_layer": 2, "n_head": 4}, "one plain attention per layer", id="attention of its own"),
        pytest.param("deepseek_v3", {"qk_nope_head_dim": 8, "v_head_dim": 8}, "one plain attention per layer", id="latent attention"),
        pytest.param("mamba", {}, "linear_attention", id="no attention"),
    ],
)
def test_models_without_plain_attention_are_refused(tmp_path: Path, kind: str, shape: dict[str, int], message: str) -> None:
    path = make_model(kind, tmp_path, **SMALL, **shape)
    with pytest.raises(ConfigError, match=message):
        load_model(path)


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a Hugging Face model directory"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("arguments", [{"device": "cuda:77"}, {"device": "gpu"}, {"device": "meta"}, {"dtype": "int8"}])
def test_impossible_devices_and_dtypes_are_refused(llama: Pair, arguments: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"engine (device|dtype)"):
        load_model(llama.path, **arguments)


def test_running_out_of_device_memory_is_overload(llama: Pair) -> None:
    class Exhausted:
        def attend(self, layer: int, query: Any, key: Any, value: Any, scale: Any) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(OverloadedError, match="fewer tokens"):
        llama.model.forward(zero, zero, Exhausted(), rows=zero)
