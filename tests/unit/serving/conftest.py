from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from dualpath_ray.models.resolve import resolve_model
from dualpath_ray.models.tiny import make_tiny_model
from dualpath_ray.serving.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def smollm2_directory() -> Path:
    return resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def byte_level(tiny_directory: Path) -> Tokenizer:
    """Tokens are byte strings, as in Llama 3, Qwen and SmolLM2."""
    return Tokenizer.from_directory(tiny_directory)


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """Tokens are characters, with single bytes for what the vocabulary lacks and spaces as U+2581, as in Llama 2."""
    vocabulary = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["\u2581", *"abcdehlnorstuw", "\u2581th", "ll"]
    core = tokenizers.Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, [("l", "l")], byte_fallback=True, unk_token="<unk>")
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return Tokenizer(core, None)
