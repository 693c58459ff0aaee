"""From what a user writes as the model (`model.spec`) to a local model directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dualpath_ray.errors import ConfigError
from dualpath_ray.models import gguf_llama, smollm2, tiny
from dualpath_ray.models.cache import build_directory, cache_dir

TINY_VERSION = 2  # raise when make_tiny_model's output changes, so that older caches are not used


def resolve_model(spec: str) -> Path:
    """A Hugging Face model directory for `spec`, made or fetched into the user's cache where needed.

    `spec` is a directory, a `.gguf` file of the llama architecture, `smollm2-135m-instruct`, or `tiny-llama`, `tiny-qwen2`,
    `tiny-qwen3` (random weights). A path that exists wins over a name. Raises ConfigError.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        return _checked(path)
    if path.is_file():
        return _converted(path)
    if spec == smollm2.NAME:
        return smollm2.fetch()
    kind = spec.removeprefix("tiny-")
    if spec.startswith("tiny-") and kind in tiny.TINY_KINDS:
        return tiny.make_tiny_model(kind, cache_dir() / "models" / f"{spec}-v{TINY_VERSION}")
    raise ConfigError(
        f"model {spec!r} is neither an existing directory or .gguf file nor one of {smollm2.NAME}, "
        + ", ".join(f"tiny-{kind}" for kind in tiny.TINY_KINDS)
    )


def _checked(directory: Path) -> Path:
    needed = {"config.json": "config.json", "tokenizer.json": "tokenizer.json", "*.safetensors": "safetensors weights"}
    missing = [what for pattern, what in needed.items() if not any(directory.glob(pattern))]
    if missing:
        raise ConfigError(f"model directory {directory} has no {' and no '.join(missing)}; give a complete Hugging Face model directory")
    return directory.resolve()


def _converted(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise ConfigError(f"model file {path} is not a .gguf file; give that or a model directory")
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"model file {path} cannot be read: {error.strerror}") from error
    target = cache_dir() / "models" / f"gguf-{digest[:32]}-v{gguf_llama.CONVERSION}"
    return build_directory(target, lambda directory: gguf_llama.convert_gguf(path, directory))
