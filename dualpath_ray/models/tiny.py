"""Tiny models with random weights, in the layout of a Hugging Face model directory, made in well under a second.

They have every structural feature of their families (grouped queries, rotary embedding, Qwen2's biases, Qwen3's head norms), so that
what is exact for them is exact for a real checkpoint. Made with numpy alone: no torch, no transformers, no network.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.cache import build_directory

TinyKind = Literal["llama", "qwen2", "qwen3"]
TINY_KINDS: tuple[TinyKind, ...] = get_args(TinyKind)

PAD, START, END = 0, 1, 2  # ids of the special tokens below
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'Call one as <tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Wide enough that logits are far apart (greedy choices are stable against rounding) and depend on the whole history.
WEIGHT_STD = 0.2


def make_tiny_model(
    kind: TinyKind,
    directory: Path,
    *,
    seed: int = 0,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    vocabulary: int = 512,
    max_context: int = 4096,
) -> Path:
    """Make `directory` unless it exists; return it. Equal arguments give equal bytes.

    Raises ConfigError when the shape is impossible. float32 weights, tied embeddings, ChatML-like chat template.
    """
    if kind not in TINY_KINDS:
        raise ConfigError(f"tiny model kind must be one of {', '.join(TINY_KINDS)}, not {kind!r}")
    if hidden % heads:
        raise ConfigError(f"tiny model hidden size ({hidden}) must be a multiple of heads ({heads})")
    if heads % kv_heads:
        raise ConfigError(f"tiny model heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
    if head_dim % 2:
        raise ConfigError(f"tiny model head_dim must be even for rotary embedding, not {head_dim}")
    if vocabulary < 256 + len(SPECIAL_TOKENS):
        raise ConfigError(f"tiny model vocabulary must hold all bytes and special tokens, at least {256 + len(SPECIAL_TOKENS)}")
    config = {
        "architectures": [{"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[kind]],
        "model_type": kind,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": max_context,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "use_sliding_window": False,
        "bos_token_id": START,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    generation = {"bos_token_id": START, "eos_token_id": END, "pad_token_id": PAD}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[START],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "model_max_length": max_context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }

    def build(scratch: Path) -> None:
        weights = dict(_weights(kind, seed, layers, hidden, heads, kv_heads, head_dim, vocabulary))
        save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "tokenizer.json").write_text(_tokenizer_json(vocabulary), encoding="utf-8")
        for name, content in (("config", config), ("generation_config", generation), ("tokenizer_config", tokens)):
            (scratch / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")

    return build_directory(directory, build)


def _weights(
    kind: TinyKind, seed: int, layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, vocabulary: int
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    random = np.random.Generator(np.random.PCG64(seed))

    def normal(*shape: int) -> npt.NDArray[np.float32]:
        return random.standard_normal(shape, dtype=np.float32) * np.float32(WEIGHT_STD)

    def gain(size: int) -> npt.NDArray[np.float32]:
        return np.float32(1) + normal(size) * np.float32(0.5)

    yield "model.embed_tokens.weight", normal(vocabulary, hidden)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", gain(hidden)
        for name, rows in (("q", heads * head_dim), ("k", kv_heads * head_dim), ("v", kv_heads * head_dim)):
            yield f"{prefix}.self_attn.{name}_proj.weight", normal(rows, hidden)
            if kind == "qwen2":
                yield f"{prefix}.self_attn.{name}_proj.bias", normal(rows)
            if kind == "qwen3" and name != "v":
                yield f"{prefix}.self_attn.{name}_norm.weight", gain(head_dim)
        yield f"{prefix}.self_attn.o_proj.weight", normal(hidden, heads * head_dim)
        yield f"{prefix}.post_attention_layernorm.weight", gain(hidden)
        yield f"{prefix}.mlp.gate_proj.weight", normal(2 * hidden, hidden)
        yield f"{prefix}.mlp.up_proj.weight", normal(2 * hidden, hidden)
        yield f"{prefix}.mlp.down_proj.weight", normal(hidden, 2 * hidden)
    yield "model.norm.weight", gain(hidden)


@functools.cache
def _tokenizer_json(vocabulary: int) -> str:
    """A byte-level BPE tokenizer trained on the package's own sample text; every string survives encode and decode."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = resources.files("dualpath_ray.models").joinpath("tiny_corpus.txt").read_text(encoding="utf-8")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus.splitlines(keepends=True), trainer)
    return str(tokenizer.to_str())
