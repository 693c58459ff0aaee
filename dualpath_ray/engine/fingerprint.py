"""Identity of a model's numbers: two processes may exchange KV-Cache only if their fingerprints are equal."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import xxhash

from dualpath_ray.errors import ConfigError

# Change whenever this package computes keys or values differently for the same weights (layout changes are KVGeometry's matter).
NUMERICS_VERSION = 1

# Keys of config.json that say how the file was made, not what the model computes. The dtype is hashed as it is *run*.
_IRRELEVANT = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"})


def model_fingerprint(path: Path, dtype: str) -> str:
    """32 hex digits over config.json, every byte of the weight files, `dtype` and NUMERICS_VERSION.

    Weights are hashed whole, since a fine-tuned copy may differ anywhere and a wrong match would silently give wrong text. XXH3
    (128 bit, not cryptographic: the operator chooses the model) takes 0.02-0.1 s per GB that is in the page cache, where loading
    puts it anyway. The device does not count: KV computed by a CPU and by a GPU differ in rounding only.

    Raises ConfigError if the directory holds no readable safetensors checkpoint.
    """
    digest = xxhash.xxh3_128(f"numerics={NUMERICS_VERSION};dtype={dtype};".encode())
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        meaning = {key: value for key, value in config.items() if key not in _IRRELEVANT}
        digest.update(json.dumps(meaning, sort_keys=True).encode())
        for file in weight_files(path):
            digest.update(f";{file.name}:{file.stat().st_size};".encode())
            with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content:
                digest.update(content)
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"model directory {path} cannot be read: {error}") from error
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The checkpoint's safetensors files, sorted by name. Raises ConfigError if there are none."""
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    single = path / "model.safetensors"
    if not single.is_file():
        raise ConfigError(
            f"model directory {path} has no model.safetensors and no model.safetensors.index.json; convert the weights to safetensors"
        )
    return [single]
