"""A causal language model whose attention and KV-Cache are ours and whose everything else is transformers'."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from dualpath_ray.engine.attention import CONTEXT_ARGUMENT, IMPLEMENTATION, AttentionContext, dualpath_attention
from dualpath_ray.engine.fingerprint import model_fingerprint, weight_files
from dualpath_ray.engine.kv_codec import KVCodec, codec_for
from dualpath_ray.errors import ConfigError, OverloadedError
from dualpath_ray.kv.geometry import DTYPE_BYTES, QUANTISED_BYTES, KVGeometry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class CausalModel:
    """Loaded weights and the facts about them that other parts need. Made by `load_model`; used by one thread at a time."""

    def __init__(self, path: Path, model: PreTrainedModel, dtype: str, kv_dtype: str, eos_token_ids: tuple[int, ...]) -> None:
        config: Any = model.config.get_text_config()
        self.path = path
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.device: torch.device = model.device
        self.torch_dtype: torch.dtype = getattr(torch, dtype)
        self.layers: int = config.num_hidden_layers
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.vocab_size: int = config.vocab_size
        self.max_context: int = config.max_position_embeddings
        self.eos_token_ids = eos_token_ids
        self._model = model

    @functools.cached_property
    def fingerprint(self) -> str:
        """See `fingerprint.model_fingerprint`; computed when first asked for."""
        return model_fingerprint(self.path, self.dtype)

    def geometry(self, block_tokens: int) -> KVGeometry:
        return KVGeometry(self.layers, self.kv_heads, self.head_dim, self.kv_dtype, block_tokens)

    @functools.cached_property
    def kv_codec(self) -> KVCodec:
        """Between this model's keys and values and the rows of its KV memory."""
        return codec_for(self.geometry(1), self.torch_dtype)

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: AttentionContext, rows: torch.Tensor) -> torch.Tensor:
        """Run one packed batch: tokens and positions `[T]` int64; returns float32 logits `[len(rows), vocab]` of those of the T rows.

        What `attention` raises comes out unchanged. Raises OverloadedError if the device's memory does not suffice for the batch.
        """
        try:
            output = self._model(
                input_ids=tokens.to(self.device)[None],
                position_ids=positions.to(self.device)[None],
                use_cache=False,
                logits_to_keep=rows.to(self.device),
                **{CONTEXT_ARGUMENT: attention},
            )
        except torch.OutOfMemoryError as error:
            raise OverloadedError(
                f"out of memory on {self.device} with a batch of {len(tokens)} tokens; allow fewer tokens per batch"
            ) from error
        logits: torch.Tensor = output.logits[0]
        return logits.float()


def load_model(path: Path, device: str = "cpu", dtype: str = "float32", kv_dtype: str | None = None) -> CausalModel:
    """Load a Hugging Face model directory (config.json, safetensors) for inference and check by one token that our attention fits it.

    It computes in `dtype`; its KV is kept as `kv_dtype`: the same type (the default) or a quantised one.
    Raises ConfigError for a directory, device, dtype or model that cannot be served, saying why. Nothing is downloaded and no code
    from the directory is run. Weights stay file-backed where dtype and device allow, so processes of one node share them.
    """
    # Importing transformers takes seconds; only processes that compute pay for it.
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"engine dtype must be one of {', '.join(DTYPE_BYTES)}, not {dtype!r}")
    if kv_dtype not in (None, dtype, *QUANTISED_BYTES):
        raise ConfigError(f"KV of an engine in {dtype} is kept as {', '.join((dtype, *QUANTISED_BYTES))}, not {kv_dtype!r}")
    target = _usable_device(device)
    if not (path / "config.json").is_file():
        raise ConfigError(f"model path {path} is not a Hugging Face model directory: it has no config.json")
    weight_files(path)
    AttentionInterface.register(IMPLEMENTATION, dualpath_attention)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        _refuse_unsupported(path, config.get_text_config())
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation=IMPLEMENTATION,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        model, report = loaded
        causal = CausalModel(path, model.to(target).eval(), dtype, kv_dtype or dtype, _eos_token_ids(model))
    except torch.OutOfMemoryError as error:
        raise ConfigError(f"model {path} in {dtype} does not fit into the memory of {device}") from error
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise ConfigError(f"model {path} cannot be loaded: {error}") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ConfigError(
            f"model {path} lacks weights: {sorted(report['missing_keys'])[:5]}, of wrong shape: {sorted(report['mismatched_keys'])[:5]}"
        )
    _check_attention(causal)
    return causal


def _usable_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"engine device must be cpu, cuda or cuda:N, not {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine device {name!r} is not there: {torch.cuda.device_count()} CUDA devices are visible")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine device must be cpu, cuda or cuda:N, not {name!r}")
    return device


def _refuse_unsupported(path: Path, config: PretrainedConfig) -> None:
    """Features that would make a token's KV depend on more than the tokens before it, or its attention on less."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ConfigError(f"model {path} has layers of type {', '.join(sorted(kinds))}; this engine supports full_attention only")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    if rope in ("dynamic", "longrope"):
        raise ConfigError(
            f"model {path} uses {rope} rotary embedding: keys depend on the longest sequence of a batch, so stored KV is not exact"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    from transformers.utils import logging as untyped

    logging: Any = untyped
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _eos_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    for source in (model.generation_config, model.config.get_text_config()):
        ids: int | list[int] | None = getattr(source, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


class _Probe:
    """Records what a model asks of the attention; for a single token attention is the value itself."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None) -> torch.Tensor:
        self.calls.append((layer, tuple(query.shape), tuple(key.shape), tuple(value.shape)))
        return value.repeat_interleave(query.shape[0] // value.shape[0], dim=0).transpose(0, 1)


def _check_attention(model: CausalModel) -> None:
    """Every layer must reach our function once, in order, with the shapes the KV geometry promises."""
    probe = _Probe()
    zero = torch.zeros(1, dtype=torch.int64)
    model.forward(zero, zero, probe, rows=zero)
    rows = (model.kv_heads, 1, model.head_dim)
    expected = [(layer, (model.heads, 1, model.head_dim), rows, rows) for layer in range(model.layers)]
    if probe.calls != expected:
        seen = probe.calls[0] if probe.calls else "none"
        raise ConfigError(
            f"model {model.path} does not call one plain attention per layer: "
            f"expected {len(expected)} calls like {expected[0]}, saw {len(probe.calls)}, the first {seen}"
        )
