"""Opens the block store that the configuration names."""

from __future__ import annotations

from pathlib import Path

from dualpath_ray.errors import ConfigError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings
from dualpath_ray.stores.s3 import S3Settings, S3Store

KINDS = ("directory", "s3")


def open_store(
    kind: str,
    path: str | Path,
    geometry: KVGeometry,
    fingerprint: str,
    *,
    directory: DirectorySettings | None = None,
    s3: S3Settings | None = None,
    emulation: EmulationSettings | None = None,
) -> BlockStore:
    """A store of one kind, behind an emulated device if `emulation` is given. Raises ConfigError or StoreError."""
    if kind not in KINDS:
        raise ConfigError(f"storage.kind is {kind!r}; it may be one of: {', '.join(KINDS)}")
    store: BlockStore
    if kind == "s3":
        if s3 is None or not s3.bucket:
            raise ConfigError("storage.kind s3 needs storage.s3.bucket")
        store = S3Store(geometry, fingerprint, s3)
    else:
        store = DirectoryStore(Path(path).expanduser(), geometry, fingerprint, directory)
    return store if emulation is None else EmulatedStore(store, geometry, emulation)
