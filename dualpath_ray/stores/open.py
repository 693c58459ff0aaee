"""Opens the block store that the configuration names."""

from __future__ import annotations

from pathlib import Path

from dualpath_ray.errors import ConfigError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings

KINDS = ("directory",)


def open_store(
    kind: str,
    path: str | Path,
    geometry: KVGeometry,
    fingerprint: str,
    *,
    directory: DirectorySettings | None = None,
    emulation: EmulationSettings | None = None,
) -> BlockStore:
    """A store of one kind, behind an emulated device if `emulation` is given. Raises ConfigError or StoreError."""
    if kind not in KINDS:
        raise ConfigError(f"storage.kind is {kind!r}; it may be one of: {', '.join(KINDS)}")
    store = DirectoryStore(Path(path).expanduser(), geometry, fingerprint, directory)
    return store if emulation is None else EmulatedStore(store, geometry, emulation)
