"""Tiny models, loaded once per test run, each with transformers' own copy as the reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from dualpath_ray.engine.model import CausalModel, load_model
from dualpath_ray.models.tiny import TINY_KINDS, TinyKind, make_tiny_model


@dataclass(frozen=True)
class Pair:
    """Our model and transformers' own, of the same weights."""

    path: Path
    model: CausalModel
    reference: Any

    def generate(self, prompt: list[int], new_tokens: int) -> list[int]:
        """Greedy continuation by transformers' `generate()` with its own cache and attention."""
        out = self.reference.generate(
            torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cache=True
        )
        return [int(token) for token in out[0, len(prompt) :]]


def make_pair(kind: TinyKind, directory: Path) -> Pair:
    return load_pair(make_tiny_model(kind, directory / kind))


def load_pair(path: Path) -> Pair:
    from transformers import AutoModelForCausalLM

    return Pair(path, load_model(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def make_model(kind: str, directory: Path, **config: Any) -> Path:
    """A random model of any family that transformers knows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(directory / kind)
    return directory / kind


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", params=TINY_KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))
