from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.cache import build_directory
from dualpath_ray.models.tiny import END, TINY_KINDS, TinyKind, make_tiny_model

FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("kind", TINY_KINDS)
def test_transformers_loads_every_tensor_and_greedy_text_depends_on_the_whole_prompt(
    kind: TinyKind, tiny_models: dict[TinyKind, Path]
) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(tiny_models[kind], output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.model_type == kind and model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(tiny_models[kind])
    messages = [{"role": "user", "content": "List the files."}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|im_start|>user\nList the files.<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text, return_tensors="pt").input_ids
    other = prompt.clone()
    other[0, 1] += 1
    first, second = (model.generate(ids, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :].tolist() for ids in (prompt, other))
    assert len(set(first)) > 8, "random weights must not fall into a loop"
    assert first != second
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == END


def test_equal_arguments_give_equal_bytes_and_other_seeds_other_weights(tmp_path: Path) -> None:
    first, again, other = (
        make_tiny_model("qwen3", tmp_path / "a"),
        make_tiny_model("qwen3", tmp_path / "b"),
        make_tiny_model("qwen3", tmp_path / "c", seed=1),
    )
    assert {path.name for path in first.iterdir()} == FILES
    for name in FILES:
        assert (first / name).read_bytes() == (again / name).read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()


def test_shape_follows_the_arguments(tmp_path: Path) -> None:
    path = make_tiny_model("llama", tmp_path / "m", layers=2, hidden=96, heads=6, kv_heads=3, head_dim=32, vocabulary=300, max_context=100)
    config = json.loads((path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_key_value_heads"], config["max_position_embeddings"]) == (2, 3, 100)
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.model.layers[1].self_attn.k_proj.weight.shape == (96, 96)
    assert Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size() == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 100, "heads": 6}, "multiple of heads"),
        ({"kv_heads": 3}, "multiple of kv_heads"),
        ({"head_dim": 31}, "even"),
        ({"vocabulary": 100}, "at least 259"),
        ({"kind": "gpt"}, "llama, qwen2, qwen3"),
    ],
)
def test_impossible_shapes_are_refused(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_tiny_model(**{"kind": "llama", "directory": tmp_path / "m", **arguments})
    assert not list(tmp_path.iterdir())


@given(st.text())
def test_every_text_survives_the_tokenizer(tiny_llama: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def build(scratch: Path) -> None:
        (scratch / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build_directory(tmp_path / "target", build)
    assert not list(tmp_path.iterdir())


def test_concurrent_builders_all_get_one_complete_directory(tmp_path: Path) -> None:
    """All have begun before any ends, so all but one lose the race to put theirs in place."""
    barrier = threading.Barrier(4)
    results: list[Path] = []

    def build(scratch: Path) -> None:
        (scratch / "content").write_text("whole")
        barrier.wait(30)

    threads = [threading.Thread(target=lambda: results.append(build_directory(tmp_path / "target", build))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [tmp_path / "target"] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (tmp_path / "target" / "content").read_text() == "whole"
