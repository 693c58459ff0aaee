"""Where a directory store keeps its files.

    <root>/<first key byte, hex>/<key, hex>.kv1      a block (256 subdirectories; ".kv1" is format version 1)
    <root>/<first key byte, hex>/.<random>.kv1.tmp   a block on its way; old ones are left behind by crashes and swept
    <root>/.collector                                whoever holds a lock on it makes room for all (directory_inventory.py)
    <root>/.usage.json                               how full the directory was found
    <root>/.writers/<gateway>                        what it has written since
    <root>/quarantine/                               damaged blocks, moved aside for a look; at most QUARANTINE_FILES

Several processes share the directory, on this host and on others, so nothing here assumes to be alone.
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from dualpath_ray.errors import ConfigError, StoreError
from dualpath_ray.kv.keys import KEY_BYTES

SUFFIX = ".kv1"
TEMPORARY = ".tmp"
QUARANTINE = "quarantine"
QUARANTINE_FILES = 64


def fsync_directory(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class DirectoryLayout:
    """Paths below one root, made if need be and `create`. Raises ConfigError when the process may not list, write or read there."""

    def __init__(self, root: Path, create: bool = True) -> None:
        self.root = root
        probe = root / f".{uuid.uuid4().hex}{TEMPORARY}"
        try:
            if create:
                root.mkdir(parents=True, exist_ok=True)
            next(os.scandir(root), None)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"storage directory {root} cannot be used: {error.strerror}. The user running the gateway (uid {os.geteuid()}) needs "
                "read, write and search permission there, on a writable file system; or set another storage path"
            ) from error

    def path(self, key: bytes) -> Path:
        return Path(self.path_name(key))

    def path_name(self, key: bytes) -> str:
        """The same as a string, for those who open many files: making a Path takes longer than to open it."""
        name = key.hex()
        return f"{self.root}/{name[:2]}/{name}{SUFFIX}"

    def temporary(self, key: bytes) -> Path:
        """A new name beside the block's own, so that renaming is atomic."""
        return self.root / key[:1].hex() / f".{uuid.uuid4().hex}{SUFFIX}{TEMPORARY}"

    def make_shard(self, key: bytes) -> None:
        """Create the block's subdirectory, durably. Raises StoreError when the root itself has vanished."""
        try:
            os.mkdir(self.root / key[:1].hex())
        except FileExistsError:
            return
        except FileNotFoundError:
            raise StoreError(f"storage directory {self.root} has vanished; mount or create it again") from None
        fsync_directory(self.root)

    def shards(self) -> list[Path]:
        """Subdirectories that may hold blocks. Raises StoreError when the root cannot be listed."""
        try:
            return sorted(self.root / entry.name for entry in os.scandir(self.root) if len(entry.name) == 2 and entry.is_dir())
        except OSError as error:
            raise StoreError(f"storage directory {self.root} cannot be listed: {error.strerror}; mount or create it again") from error

    def files(self, shard: Path) -> Iterator[tuple[Path, bytes | None]]:
        """Files of a subdirectory with the key that their name claims, or None."""
        try:
            entries = [entry.name for entry in os.scandir(shard)]
        except OSError as error:
            raise StoreError(f"storage directory {shard} cannot be listed: {error.strerror}") from error
        for name in entries:
            yield shard / name, self._key(shard.name, name)

    def _key(self, shard: str, name: str) -> bytes | None:
        stem = name.removesuffix(SUFFIX)
        if stem == name or len(stem) != 2 * KEY_BYTES or not stem.startswith(shard) or stem != stem.lower():
            return None
        try:
            return bytes.fromhex(stem)
        except ValueError:
            return None

    def now(self) -> float:
        """The time by the file system's own clock, which its files' times go by."""
        probe = self.root / f".{uuid.uuid4().hex}{TEMPORARY}"
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        except OSError as error:
            raise StoreError(f"storage directory {self.root} cannot be written: {error.strerror}") from error
        finally:
            probe.unlink(missing_ok=True)

    def quarantine(self, key: bytes, fd: int) -> bool:
        """Move aside the block file that `fd` is open on, or remove it when enough of them are kept. False if it is gone already."""
        path = self.path(key)
        try:
            if not os.path.samestat(os.fstat(fd), os.stat(path)):
                return False  # somebody has put a new file in its place
            aside = self.root / QUARANTINE
            aside.mkdir(exist_ok=True)
            if sum(1 for _ in os.scandir(aside)) < QUARANTINE_FILES:
                os.rename(path, aside / f"{path.name}.{uuid.uuid4().hex[:8]}")
            else:
                os.unlink(path)
        except FileNotFoundError:
            return False
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return True
