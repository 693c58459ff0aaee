"""What a front end must know about the served model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualpath_ray.errors import ConfigError
from dualpath_ray.requests import SamplingParams

OPENAI_DEFAULT = SamplingParams(temperature=1.0)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """The served model, as the cluster describes it. `max_context` counts prompt and generated tokens together.

    `default_sampling` holds where a request names no temperature, top_p or top_k; its seed is not used.
    """

    served_name: str
    model_path: str  # Hugging Face directory with tokenizer.json, readable by the front end
    max_context: int
    eos_token_ids: tuple[int, ...]
    default_sampling: SamplingParams = OPENAI_DEFAULT

    @classmethod
    def from_directory(cls, directory: Path, served_name: str, max_context: int | None = None) -> ModelCard:
        """Read config.json and, where there is one, generation_config.json of a Hugging Face model directory.

        End-of-sequence tokens are those at which transformers' `generate()` stops. Sampling defaults are the model author's
        (generation_config.json), otherwise OpenAI's: temperature 1. Raises ConfigError.
        """
        config = _read_json(directory / "config.json", required=True)
        generation = _read_json(directory / "generation_config.json", required=False)
        trained = config.get("max_position_embeddings")
        if not isinstance(trained, int) or trained < 1:
            raise ConfigError(f"{directory / 'config.json'} has no max_position_embeddings")
        if max_context is not None and not 1 < max_context <= trained:
            raise ConfigError(f"a context of {max_context} tokens is not possible: the model was trained for 2 to {trained}")
        eos = generation.get("eos_token_id", config.get("eos_token_id"))
        sampled = generation.get("do_sample") is not False
        return cls(
            served_name=served_name,
            model_path=str(directory),
            max_context=max_context or trained,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
            default_sampling=SamplingParams(
                temperature=float(generation.get("temperature") or 1.0) if sampled else 0.0,
                top_p=float(generation.get("top_p") or 1.0),
                top_k=int(generation.get("top_k") or 0),
            ),
        )


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if not required:
            return {}
        raise ConfigError(f"{path} is missing: not a Hugging Face model directory") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object")
    return content
