"""From the `storage` section of the configuration to the store, its inventory and its collector's settings."""

from __future__ import annotations

from pathlib import Path

from dualpath_ray.config.storage import StorageSettings
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.store_keeper import KeeperSettings
from dualpath_ray.stores.base import BlockStore
from dualpath_ray.stores.bucket_inventory import BucketInventory
from dualpath_ray.stores.directory import DirectorySettings, DirectoryStore
from dualpath_ray.stores.directory_inventory import DirectoryInventory
from dualpath_ray.stores.emulated import EmulatedStore, EmulationSettings
from dualpath_ray.stores.inventory import Inventory
from dualpath_ray.stores.s3 import S3Settings, S3Store, connect, load_client


def open_store(storage: StorageSettings, geometry: KVGeometry, fingerprint: str) -> BlockStore:
    """The store of one model, behind an emulated device if one is set. Raises ConfigError or StoreError."""
    store: BlockStore
    if storage.kind == "s3":
        store = S3Store(geometry, fingerprint, s3_settings(storage))
    else:
        store = DirectoryStore(
            Path(storage.path).expanduser(),
            geometry,
            fingerprint,
            DirectorySettings(
                io=storage.io,
                direct=storage.direct,
                sync=storage.sync,
                layer_groups=storage.layer_groups,
                read_threads=storage.read_threads,
                write_threads=storage.write_threads,
                temporary_age_s=storage.orphan_age_s,
                capacity_bytes=storage.capacity_bytes,
            ),
        )
    emulation = storage.emulation
    return EmulatedStore(store, geometry, EmulationSettings(**emulation.model_dump())) if emulation.active else store


def open_inventory(storage: StorageSettings) -> Inventory:
    """All that lies in the configured place, whichever models it belongs to. Raises ConfigError."""
    if storage.kind == "s3":
        settings = s3_settings(storage)
        where = f"bucket {settings.bucket} at {settings.endpoint or 'AWS'}"
        return BucketInventory(load_client(), connect(settings), settings.prefix, where)
    return DirectoryInventory(Path(storage.path).expanduser())


def keeper_settings(storage: StorageSettings) -> KeeperSettings:
    return KeeperSettings(storage.capacity_bytes, storage.gc_interval_s, storage.orphan_age_s)


def s3_settings(storage: StorageSettings) -> S3Settings:
    return S3Settings(
        **storage.s3.model_dump(),
        layer_groups=storage.layer_groups,
        read_threads=storage.read_threads,
        write_threads=storage.write_threads,
        capacity_bytes=storage.capacity_bytes,
    )
