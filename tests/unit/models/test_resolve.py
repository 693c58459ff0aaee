from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dualpath_ray.errors import ConfigError
from dualpath_ray.models.resolve import resolve_model
from tests.unit.models.test_gguf_llama import write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALPATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_tiny_names_are_made_in_the_cache_once(own_cache: Path) -> None:
    path = resolve_model("tiny-qwen2")
    assert path.is_relative_to(own_cache)
    before = (path / "model.safetensors").stat().st_ino
    assert resolve_model("tiny-qwen2") == path
    assert (path / "model.safetensors").stat().st_ino == before


def test_a_directory_is_itself(tiny_llama: Path) -> None:
    assert resolve_model(str(tiny_llama)) == tiny_llama.resolve()


def test_a_gguf_file_is_converted_under_its_digest(tmp_path: Path, tiny_llama: Path) -> None:
    first = resolve_model(str(write_gguf(tmp_path / "a.gguf", tiny_llama)))
    shutil.copy(tmp_path / "a.gguf", tmp_path / "b.gguf")
    assert resolve_model(str(tmp_path / "b.gguf")) == first
    assert (first / "model.safetensors").is_file()


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    (broken / "tokenizer.json").unlink()
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer.json and no safetensors weights"):
        resolve_model(str(broken))


@pytest.mark.parametrize("spec", ["gpt-5", "tiny-", "tiny-gpt", "no/such/place.gguf"])
def test_unknown_names_are_refused_with_the_known_ones(spec: str) -> None:
    with pytest.raises(ConfigError, match=r"neither .* smollm2-135m-instruct, tiny-llama, tiny-qwen2, tiny-qwen3"):
        resolve_model(spec)


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"not a \.gguf file"):
        resolve_model(str(tmp_path / "model.bin"))
