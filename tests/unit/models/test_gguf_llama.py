from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.gguf_llama import convert_gguf

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, model: Path, *, architecture: str = "llama", rule: str = "gpt-2", extra_tensor: str | None = None) -> Path:
    """The tiny Llama `model` as a float32 GGUF file, as llama.cpp's converter lays it out."""
    config = json.loads((model / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if index in special else 1 for index in range(len(vocabulary))])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_chat_template("template")
    for name, value in load_file(model / "model.safetensors").items():
        for theirs, ours in NAMES.items():
            if f".{theirs}." in name:
                _, _, layer, *_ = name.split(".")
                if ours in ("attn_q", "attn_k"):  # two halves -> interleaved pairs
                    count = heads if ours == "attn_q" else kv_heads
                    value = value.reshape(count, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
                writer.add_tensor(f"blk.{layer}.{ours}.weight", np.ascontiguousarray(value))
        other = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
        if name in other:
            writer.add_tensor(other[name], value)
    if extra_tensor:
        writer.add_tensor(extra_tensor, np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_weights_configuration_and_tokenizer_come_back(tmp_path: Path, tiny_llama: Path) -> None:
    calls: list[tuple[int, int]] = []
    out = tmp_path / "out"
    out.mkdir()
    convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama), out, lambda done, total: calls.append((done, total)))
    expected, weights = load_file(tiny_llama / "model.safetensors"), load_file(out / "model.safetensors")
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(weights[name], value, err_msg=name)
    before, after = (json.loads((path / "config.json").read_text()) for path in (tiny_llama, out))
    assert {key: before[key] for key in after if key in before} == {key: after[key] for key in after if key in before}
    text = "def f(x):\n    return {'é': 12}<|im_end|>\n"
    ours, theirs = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (out, tiny_llama))
    assert ours.encode(text).ids == theirs.encode(text).ids
    special = json.loads((out / "tokenizer_config.json").read_text())
    assert (special["bos_token"], special["eos_token"], special["chat_template"]) == ("<|im_start|>", "<|im_end|>", "template")
    assert calls[-1] == (len(weights), len(weights))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma'; only llama"),
        ({"rule": "llama-bpe"}, "rule 'llama-bpe'"),
        ({"extra_tensor": "rope_freqs.weight"}, "tensor 'rope_freqs.weight'"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, tiny_llama: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        convert_gguf(write_gguf(tmp_path / "m.gguf", tiny_llama, **options), tmp_path)


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"not a model" * 100)
    with pytest.raises(ConfigError, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "m.gguf", tmp_path)
