"""The shape of a model from its config.json, for processes that move KV but never load weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dualpath_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelShape:
    path: Path
    layers: int
    kv_heads: int
    head_dim: int
    max_context: int


def read_shape(directory: str | Path) -> ModelShape:
    """Raises ConfigError when config.json is missing or says too little."""
    path = Path(directory)
    try:
        config = json.loads((path / "config.json").read_text())
        heads = config["num_attention_heads"]
        return ModelShape(
            path,
            config["num_hidden_layers"],
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["max_position_embeddings"],
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path / 'config.json'} cannot be read: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path / 'config.json'} does not say {error}: not a causal language model's configuration") from error
