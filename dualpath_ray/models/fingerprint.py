"""What identifies a model's weights and numerics, for block keys (architecture.md, invariant 3)."""

from __future__ import annotations

from pathlib import Path

import xxhash

_CHUNK = 16 << 20


def fingerprint(directory: Path, dtype: str) -> str:
    """32 hex digits that change when the configuration, a weight file or the compute `dtype` changes.

    Reads every weight file once (a few GB/s from the page cache). Two copies of a model on two nodes have the same
    fingerprint. A checksum against mix-ups, not a defence against someone who can write the model directory.
    """
    digest = xxhash.xxh3_128(dtype.encode())
    for path in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest.update(f"\n{path.name} {path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
