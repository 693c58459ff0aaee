from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.requests import SamplingParams
from dualpath_ray.serving.model_card import ModelCard


def write(directory: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_reads_the_tiny_model(tiny_directory: Path) -> None:
    card = ModelCard.from_directory(tiny_directory, "tiny")
    assert (card.served_name, card.max_context, card.eos_token_ids) == ("tiny", 4096, (2,))
    assert card.default_sampling == SamplingParams(temperature=1.0)
    assert ModelCard.from_directory(tiny_directory, "tiny", 100).max_context == 100


@pytest.mark.parametrize(
    ("generation", "eos", "sampling"),
    [
        ({"eos_token_id": [7, 8], "temperature": 0.6, "top_p": 0.9, "top_k": 20}, (7, 8), SamplingParams(0.6, 0.9, 20)),
        ({"do_sample": False}, (3,), SamplingParams(0.0)),
        (None, (3,), SamplingParams(1.0)),
    ],
)
def test_generation_config_decides(
    tmp_path: Path, generation: dict[str, Any] | None, eos: tuple[int, ...], sampling: SamplingParams
) -> None:
    card = ModelCard.from_directory(write(tmp_path, {"max_position_embeddings": 10, "eos_token_id": 3}, generation), "m")
    assert (card.eos_token_ids, card.default_sampling) == (eos, sampling)


@pytest.mark.parametrize(("config", "context"), [({}, None), ({"max_position_embeddings": 10}, 11), ({"max_position_embeddings": 10}, 1)])
def test_impossible_contexts_are_configuration_errors(tmp_path: Path, config: dict[str, Any], context: int | None) -> None:
    with pytest.raises(ConfigError):
        ModelCard.from_directory(write(tmp_path, config), "m", context)


def test_missing_or_broken_files_are_configuration_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing"):
        ModelCard.from_directory(tmp_path, "m")
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelCard.from_directory(tmp_path, "m")
