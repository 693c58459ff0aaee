"""Everything that a bucket holds below its prefix (see inventory.py).

    <prefix>/<digest of fingerprint and geometry>/<key, hex>/<parent, hex>   a block (s3.py)
    <prefix>/.uses/<random>              keys that one gateway used lately, 16 bytes each; the object's own time is the time of use
    <prefix>/.collector/lease            whoever made it collects, until it is removed or LEASE_S old
    <prefix>/.collector/uses             what earlier rounds have read from .uses, for blocks that are still there
    <prefix>/.collector/usage            how full the bucket was found
    <prefix>/.collector/writers/<id>     what one gateway has written since

Objects cannot be touched, so uses are written down beside them. All times are the service's own.
"""

from __future__ import annotations

import contextlib
import struct
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, StoreError
from dualpath_ray.kv.keys import KEY_BYTES
from dualpath_ray.stores.block_format import MAX_HEADER_BYTES, decode_header
from dualpath_ray.stores.directory_inventory import model_name, parse_note
from dualpath_ray.stores.inventory import Entry, Usage

LEASE_S = 600.0
USES, COLLECTOR = ".uses", ".collector"
_USE = struct.Struct(f"<{KEY_BYTES}sd")


class BucketInventory:
    """An Inventory of what lies below `prefix` in `bucket`, an obstore store; `client` is the module obstore."""

    def __init__(self, client: Any, bucket: Any, prefix: str, name: str) -> None:
        self._client, self._bucket, self._name = client, bucket, name
        self._root = f"{prefix}/" if prefix else ""
        self._models: dict[str, tuple[str, int]] = {}  # by digest: name, bytes of an object
        self._damaged: list[tuple[str, float]] = []
        self._paths: dict[bytes, str] = {}
        self._read_logs: list[str] = []
        self._uses: dict[bytes, float] = {}
        self._renewed = 0.0

    @property
    def name(self) -> str:
        return self._name

    @property
    def damaged(self) -> int:
        return len(self._damaged)

    def entries(self) -> Iterator[Entry]:
        """Uses written down so far are read first, and kept for `publish` to write into one table."""
        self._damaged, self._paths = [], {}
        self._load_uses()
        for path, size, modified in self._list(self._root):
            parts = path[len(self._root) :].split("/")
            if len(parts) != 3 or parts[0].startswith("."):
                continue
            try:
                key, parent = bytes.fromhex(parts[1]), bytes.fromhex(parts[2])
            except ValueError:
                continue
            model = self._model(parts[0], path, key)
            if model is None or size != model[1] or len(key) != KEY_BYTES or len(parent) != KEY_BYTES:
                self._damaged.append((path, modified))
                continue
            self._paths[key] = path
            yield Entry(key, parent, size, max(modified, self._uses.get(key, 0.0)), model[0])

    def _model(self, digest: str, path: str, key: bytes) -> tuple[str, int] | None:
        """What the blocks below a digest are, learnt from the first sound one."""
        if digest not in self._models:
            try:
                page = bytes(self._get_range(path, 0, MAX_HEADER_BYTES))
                header = decode_header(page, key)
            except (FileNotFoundError, BlockCorruptError):
                return None
            size = int.from_bytes(page[12:16], "little") + header.geometry.full_block_bytes
            self._models[digest] = (model_name(header), size)
        return self._models[digest]

    def used_since(self, entry: Entry) -> bool:
        """Uses become known a minute later at the soonest, so this cannot be told."""
        return False

    def remove(self, entries: Sequence[Entry]) -> int:
        self._renew()
        paths = [self._paths[entry.key] for entry in entries if entry.key in self._paths]
        if paths:
            with self._said(f"removing {len(paths)} blocks"):
                self._client.delete(self._bucket, paths)
        return len(paths)

    def sweep(self, age_s: float) -> int:
        oldest = self.now() - age_s
        paths = [path for path, modified in self._damaged if modified < oldest]
        if paths:
            with self._said("removing damaged objects"):
                self._client.delete(self._bucket, paths)
        return len(paths)

    def content(self, entry: Entry) -> bytes:
        try:
            with self._said(f"reading block {entry.key.hex()}"):
                return bytes(self._client.get(self._bucket, self._paths[entry.key]).bytes())
        except (FileNotFoundError, KeyError):
            raise BlockMissingError(entry.key, f"block {entry.key.hex()} is not in {self.name} (any more)") from None

    def put_aside(self, entry: Entry) -> None:
        self.remove([entry])

    # ---- who collects

    @contextlib.contextmanager
    def collecting(self) -> Iterator[bool]:
        if not self._acquire():
            yield False
            return
        self._renewed = time.monotonic()
        try:
            yield True
        finally:
            with contextlib.suppress(Exception):
                self._client.delete(self._bucket, self._lease)

    @property
    def _lease(self) -> str:
        return f"{self._root}{COLLECTOR}/lease"

    def _acquire(self) -> bool:
        errors = self._client.exceptions
        text = uuid.uuid4().hex.encode()
        with self._said("asking for the collector's lease"):
            with contextlib.suppress(errors.AlreadyExistsError):
                self._client.put(self._bucket, self._lease, text, mode="create", use_multipart=False)
                return True
            try:
                held = self._client.head(self._bucket, self._lease)
                if self.now() - held["last_modified"].timestamp() < LEASE_S:
                    return False
                self._client.put(self._bucket, self._lease, text, mode={"e_tag": held["e_tag"]}, use_multipart=False)
            except (FileNotFoundError, errors.PreconditionError, errors.AlreadyExistsError):
                return False  # somebody was quicker
        return True

    def _renew(self) -> None:
        if self._renewed and time.monotonic() - self._renewed > LEASE_S / 4:
            with self._said("renewing the collector's lease"):
                self._client.put(self._bucket, self._lease, uuid.uuid4().hex.encode(), use_multipart=False)
            self._renewed = time.monotonic()

    def now(self) -> float:
        path = f"{self._root}{COLLECTOR}/clock"
        with self._said("asking for the time"):
            self._client.put(self._bucket, path, b"", use_multipart=False)
            modified = self._client.head(self._bucket, path)["last_modified"]
        return float(modified.timestamp())

    # ---- what is written down

    def publish(self, usage: Usage) -> None:
        """Also puts the uses read by `entries` into the table, and removes their logs."""
        table = b"".join(_USE.pack(key, at) for key, at in self._uses.items() if key in self._paths)
        with self._said("writing the collector's notes"):
            self._client.put(self._bucket, f"{self._root}{COLLECTOR}/uses", table, use_multipart=False)
            if self._read_logs:
                self._client.delete(self._bucket, self._read_logs)
            self._client.put(self._bucket, f"{self._root}{COLLECTOR}/usage", usage.to_json(), use_multipart=False)
            old = [path for path, note in self._notes() if note[0] < usage.number - 1]
            if old:
                self._client.delete(self._bucket, old)
        self._read_logs = []

    def note_written(self, writer: str, number: int, nbytes: int) -> None:
        with self._said("saying what has been written"):
            path = f"{self._root}{COLLECTOR}/writers/{writer}"
            self._client.put(self._bucket, path, f"{number} {nbytes}".encode(), use_multipart=False)

    def written_by_others(self, writer: str, number: int) -> int:
        return sum(nbytes for path, (about, nbytes) in self._notes() if about == number and not path.endswith(f"/{writer}"))

    def _notes(self) -> Iterator[tuple[str, tuple[int, int]]]:
        for path, _, _ in self._list(f"{self._root}{COLLECTOR}/writers/"):
            with contextlib.suppress(FileNotFoundError), self._said("reading the writers' notes"):
                yield path, parse_note(bytes(self._client.get(self._bucket, path).bytes()))

    def usage(self) -> Usage | None:
        try:
            with self._said("reading the collector's notes"):
                return Usage.from_json(bytes(self._client.get(self._bucket, f"{self._root}{COLLECTOR}/usage").bytes()))
        except FileNotFoundError:
            return None

    def note_uses(self, keys: Sequence[bytes]) -> None:
        """Write down that blocks have been used now."""
        with self._said("writing uses down"):
            self._client.put(self._bucket, f"{self._root}{USES}/{uuid.uuid4().hex}", b"".join(keys), use_multipart=False)

    def _load_uses(self) -> None:
        self._uses = {}
        with contextlib.suppress(FileNotFoundError), self._said("reading the collector's notes"):
            table = bytes(self._client.get(self._bucket, f"{self._root}{COLLECTOR}/uses").bytes())
            self._uses = dict(_USE.iter_unpack(table[: len(table) // _USE.size * _USE.size]))
        self._read_logs = []
        for path, _, modified in self._list(f"{self._root}{USES}/"):
            with contextlib.suppress(FileNotFoundError), self._said("reading uses"):
                text = bytes(self._client.get(self._bucket, path).bytes())
                for start in range(0, len(text) - KEY_BYTES + 1, KEY_BYTES):
                    key = text[start : start + KEY_BYTES]
                    self._uses[key] = max(modified, self._uses.get(key, 0.0))
            self._read_logs.append(path)

    def _list(self, prefix: str) -> Iterator[tuple[str, int, float]]:
        with self._said("listing objects"):
            for page in self._client.list(self._bucket, prefix=prefix or None):
                for entry in page:
                    yield entry["path"], entry["size"], entry["last_modified"].timestamp()

    def _get_range(self, path: str, start: int, stop: int) -> Any:
        with self._said(f"reading {path}"):
            return self._client.get_range(self._bucket, path, start=start, end=stop)

    @contextlib.contextmanager
    def _said(self, action: str) -> Iterator[None]:
        """Failures of the service in the package's words; a missing object stays a FileNotFoundError."""
        try:
            yield
        except (FileNotFoundError, StoreError, GeneratorExit):
            raise
        except (self._client.exceptions.PreconditionError, self._client.exceptions.AlreadyExistsError):
            raise
        except Exception as error:
            raise StoreError(f"{action} failed: {self.name}: {str(error).splitlines()[0][:300]}") from error
