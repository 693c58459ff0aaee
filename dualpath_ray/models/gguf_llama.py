"""Turn a GGUF file of the llama architecture into a Hugging Face model directory (float32 safetensors).

Done once per file; afterwards the directory loads like any other checkpoint, without gguf's slow in-memory conversion. Supported are
plain rotary embedding and byte-level BPE tokenizers of the GPT-2 and SmolLM kind; anything else is a ConfigError, never a guess.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from dualpath_ray.errors import ConfigError

CONVERSION = 1  # raise when convert_gguf writes something else, so that older caches are not used

Progress = Callable[[int, int], None]  # (tensors done, tensors in all)

_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of a special token


def convert_gguf(source: Path, directory: Path, progress: Progress = lambda done, total: None) -> None:
    """Write config, generation config, tokenizer and weights of `source` into the existing `directory`.

    Raises ConfigError when the file is no GGUF, or holds an architecture or tokenizer this function does not know.
    """
    try:
        reader = GGUFReader(source)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is not a readable GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") != "llama":
        raise ConfigError(f"{source} holds architecture {fields.get('general.architecture')!r}; only llama GGUF files can be converted")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in tensors)
    tokenizer = _tokenizer(source, fields)

    weights = {}
    for done, tensor in enumerate(tensors.values()):
        progress(done, len(tensors))
        name, value = _weight(source, tensor, config)
        weights[name] = value
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    progress(len(tensors), len(tensors))

    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    names = {key.removesuffix("_id"): tokens[index] for key, index in ids.items()}
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"], **names}
    if template := fields.get("tokenizer.chat_template"):
        special["chat_template"] = template
    for name, content in (("config", config), ("generation_config", ids), ("tokenizer_config", special)):
        (directory / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")


def _config(fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    theta = float(fields.get("llama.rope.freq_base", 10000.0))
    eos = fields["tokenizer.ggml.eos_token_id"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        # Stored as float32: 1e-5 comes back as 9.999999747e-06, and the original configuration has the short decimal.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": fields["llama.context_length"],
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": eos,
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", eos),
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _weight(source: Path, tensor: ReaderTensor, config: dict[str, Any]) -> tuple[str, npt.NDArray[np.float32]]:
    """Name and value as in the Hugging Face checkpoint."""
    shape = tuple(int(size) for size in reversed(tensor.shape))
    value = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32).reshape(shape)
    match tensor.name.split("."):
        case ["blk", layer, kind, "weight"] if kind in _LAYER_NAMES:
            if kind in ("attn_q", "attn_k"):
                heads = config["num_attention_heads"] if kind == "attn_q" else config["num_key_value_heads"]
                value = _split_rotary_pairs(value, heads)
            return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.weight", value
        case [kind, "weight"] if kind in _OTHER_NAMES:
            return f"{_OTHER_NAMES[kind]}.weight", value
    raise ConfigError(f"{source} holds the tensor {tensor.name!r}, which a plain llama model does not have; convert it with its own tools")


def _split_rotary_pairs(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """GGUF interleaves each head's rotary pairs (0, 1), (2, 3), ...; Hugging Face keeps them as two halves."""
    rows, columns = weight.shape
    return np.ascontiguousarray(weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns))


def _tokenizer(source: Path, fields: dict[str, Any]) -> Tokenizer:
    kind, rule = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splitters = {
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "gpt-2": byte_level,
        "default": byte_level,
    }
    if kind != "gpt2" or rule not in splitters:
        raise ConfigError(f"{source} has a {kind!r} tokenizer with rule {rule!r}; only 'gpt2' with {', '.join(splitters)} can be converted")
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = splitters[rule]
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind_id in zip(tokens, types, strict=True) if kind_id == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer
