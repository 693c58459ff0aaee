"""What the simulator must know about a model: KV bytes, weights and forward-pass curves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.curves import DecodeCurve, PrefillCurve


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model. Weights are split into a part that every GPU holds and a part spread over the GPUs of a lockstep group."""

    name: str
    layers: int
    kv_token_bytes: int
    replicated_weight_bytes: float
    expert_weight_bytes: float
    prefill: PrefillCurve
    decode: DecodeCurve
    lockstep: bool = True  # engines of a group run each forward pass together
    collective_token_bytes: float = 0.0  # what one computed token's expert-parallel collectives move through a GPU's compute NIC


def latent_kv_token_bytes(layers: int, index_dim: int, latent_dim: int = 512 + 64) -> int:
    """Bytes per token of multi-head latent attention in bfloat16 with FP8 sparse-attention indexer keys and their scale, all layers."""
    return layers * (2 * latent_dim + index_dim + 4)


def expert_token_bytes(layers: int, experts: int, hidden: int) -> float:
    """Bytes per token that expert parallelism moves: FP8 out (dispatch) and bfloat16 back (combine), per active expert and layer."""
    return 3.0 * layers * experts * hidden


def attention_kv_token_bytes(layers: int, kv_heads: int, head_dim: int, element_bytes: int = 2) -> int:
    """Bytes per token of ordinary (grouped-query) attention, all layers."""
    return layers * 2 * kv_heads * head_dim * element_bytes


# Roofline of one H100, fitted to aiconfigurator's grid for Qwen2.5-32B within about 10 %.
PEAK_FLOPS, FLOPS_SHARE = 989e12, 0.62
MEMORY_BYTES_S, MEMORY_SHARE = 3.35e12, 0.85
LAUNCH_S = 0.02


class MeasuredModel(BaseModel):
    """A model described by what was measured of it, for one engine per GPU without expert parallelism."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str = Field(min_length=1, description="What results call it.")
    layers: int = Field(ge=1, description="Layers.")
    kv_token_bytes: int = Field(ge=1, description="KV bytes per token, all layers.")
    weight_bytes: float = Field(default=0.0, ge=0, description="Weights on each GPU.")
    prefill_s: float = Field(gt=0, description="Seconds of a forward pass, whatever its size.")
    prefill_token_s: float = Field(gt=0, description="Seconds more per computed token.")
    prefill_pair_s: float = Field(default=0.0, ge=0, description="Seconds more per pair of a computed and an earlier token.")
    decode_s: float = Field(gt=0, description="Seconds of a decode step with one request.")
    decode_request_s: float = Field(default=0.0, ge=0, description="Seconds more per further request.")
    decode_token_s: float = Field(default=0.0, ge=0, description="Seconds more per token of context.")

    def spec(self) -> ModelSpec:
        prefill = PrefillCurve(
            ((0.0, self.prefill_s), (1000.0, self.prefill_s + 1000 * self.prefill_token_s)), self.prefill_pair_s, 0.0, self.prefill_token_s
        )
        decode = DecodeCurve(((1.0, self.decode_s), (2.0, self.decode_s + self.decode_request_s)), self.decode_token_s)
        return ModelSpec(self.name, self.layers, self.kv_token_bytes, self.weight_bytes, 0.0, prefill, decode, lockstep=False)


def dense_spec(name: str, config: dict[str, int]) -> ModelSpec:
    """A dense Llama- or Qwen-shaped model in bfloat16, one GPU per engine, from the fields of its `config.json`."""
    try:
        layers, hidden, inner = config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"]
        heads, vocabulary = config["num_attention_heads"], config["vocab_size"]
    except KeyError as missing:
        raise ConfigError(f"model: {name} has no field {missing.args[0]}; only dense Llama or Qwen shapes can be simulated") from None
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads
    linear = layers * (hidden * head_dim * (2 * heads + 2 * kv_heads) + 3 * hidden * inner)
    weights = 2.0 * (linear + 2 * hidden * vocabulary)
    flops, memory = PEAK_FLOPS * FLOPS_SHARE, MEMORY_BYTES_S * MEMORY_SHARE
    kv = attention_kv_token_bytes(layers, kv_heads, head_dim)
    token_s = 2 * linear / flops
    prefill = PrefillCurve(((0.0, LAUNCH_S), (4096.0, LAUNCH_S + 4096 * token_s)), 4 * layers * heads * head_dim / flops, 0.0, 0.0)
    step = weights / memory
    decode = DecodeCurve(((0.0, step), (256.0, step + 256 * token_s)), kv / memory)
    return ModelSpec(name, layers, kv, weights, 0.0, prefill, decode, lockstep=False)


# DeepSeek-V3.2 on 16 H100 (data-parallel attention, expert parallel): step times computed by aiconfigurator 0.12.
# Prefill: computed tokens per engine -> seconds, less the cost of looking back. Decode: requests per engine -> seconds at empty context.
GRID_PREFILL = ((0.0, 0.1444), (64.0, 0.1498), (429.0, 0.1796), (1024.0, 0.2990), (4096.0, 1.0580))
GRID_DECODE = DecodeCurve(((0.0, 0.0233), (1.0, 0.0243), (8.0, 0.0311), (32.0, 0.0373), (64.0, 0.0434), (128.0, 0.0582)), 7.5e-9)
REDUNDANT_EXPERTS = 288 / 256  # DeepSeek's published deployments hold 32 of the 256 experts twice, to balance their load
EXPERT_SHARE = 0.45  # of the token cost, by FLOPs: 46 of 74 + 35 GFLOP per token
ATTENTION_TOKEN_S = 0.065e-3  # the sparse attention's 35 GFLOP per token at the grid's rate

# Fitted, to the paper's Oracle rows only (Figures 7 and 10).
TOKEN_FACTOR_660B = 1.2  # on the grid's time beyond its fixed part
PAIR_S_660B = 3e-9  # the grid says 1.04e-9; the Oracle's time per turn grows faster with the context
STEP_FACTOR_660B = 1.13
FIXED_S_27B, TOKEN_S_27B, PAIR_S_27B = 0.085, 0.065e-3, 0.9e-9
STEP_FACTOR_27B = 0.345

QWEN_32B = {
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "intermediate_size": 27_648,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152_064,
}


def _deepseek_660b() -> ModelSpec:
    fixed = GRID_PREFILL[0][1]
    points = tuple((tokens, fixed + (seconds - fixed) * TOKEN_FACTOR_660B) for tokens, seconds in GRID_PREFILL)
    prefill = PrefillCurve(points, PAIR_S_660B, EXPERT_SHARE, ATTENTION_TOKEN_S * TOKEN_FACTOR_660B)
    kv = latent_kv_token_bytes(layers=61, index_dim=128)
    return ModelSpec(
        "ds-660b",
        61,
        kv,
        17e9,
        654e9 * REDUNDANT_EXPERTS,
        prefill,
        GRID_DECODE.scaled(STEP_FACTOR_660B),
        collective_token_bytes=expert_token_bytes(layers=58, experts=8, hidden=7168),
    )


def _deepseek_27b() -> ModelSpec:
    points = ((0.0, FIXED_S_27B), (4096.0, FIXED_S_27B + 4096 * TOKEN_S_27B))
    prefill = PrefillCurve(points, PAIR_S_27B, EXPERT_SHARE, 0.25 * TOKEN_S_27B)
    kv = latent_kv_token_bytes(layers=30, index_dim=64)
    return ModelSpec(
        "ds-27b",
        30,
        kv,
        3e9,
        24e9 * REDUNDANT_EXPERTS,
        prefill,
        GRID_DECODE.scaled(STEP_FACTOR_27B),
        collective_token_bytes=expert_token_bytes(layers=29, experts=6, hidden=2560),
    )


MODELS: dict[str, Callable[[], ModelSpec]] = {
    "ds-660b": _deepseek_660b,
    "ds-27b": _deepseek_27b,
    "qwen-32b": lambda: dense_spec("qwen-32b", QWEN_32B),
}


def model_spec(name: str | MeasuredModel) -> ModelSpec:
    """A named model, a measured one, or a directory with the `config.json` of a dense model. Raises ConfigError."""
    if isinstance(name, MeasuredModel):
        return name.spec()
    if name in MODELS:
        return MODELS[name]()
    path = Path(name) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model: must be one of {', '.join(sorted(MODELS))} or a directory with a config.json, not {name!r}")
    try:
        return dense_spec(Path(name).name, json.loads(path.read_bytes()))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model: {path} is not the configuration of a model: {error}") from error
