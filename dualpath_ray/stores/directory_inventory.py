"""Everything that a directory holds (see inventory.py). A block was last used at its file's modification time: readers see to that."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, StoreError
from dualpath_ray.stores.block_format import BlockHeader, decode_header, peek_header_bytes
from dualpath_ray.stores.commit import store_error
from dualpath_ray.stores.inventory import Entry, Usage
from dualpath_ray.stores.layout import TEMPORARY, DirectoryLayout
from dualpath_ray.transfer.memory import PAGE_BYTES

THREADS = 8
LOCK, USAGE, WRITERS = ".collector", ".usage.json", ".writers"


class DirectoryInventory:
    """An Inventory of the directory `root`, which must exist. Headers are read once and remembered, names and times are
    read each time. Raises ConfigError when the directory cannot be used.
    """

    def __init__(self, root: Path) -> None:
        self._layout = DirectoryLayout(root, create=False)
        self._known: dict[bytes, tuple[bytes, str]] = {}  # by key: parent, model
        self._models: dict[str, str] = {}
        self._damaged: list[Path] = []

    @property
    def name(self) -> str:
        return str(self._layout.root)

    @property
    def damaged(self) -> int:
        return len(self._damaged)

    def entries(self) -> Iterator[Entry]:
        known, self._damaged = self._known, []
        self._known = {}  # refilled with what is still there
        with ThreadPoolExecutor(THREADS, thread_name_prefix="store-inventory") as pool:
            for shard in self._layout.shards():
                named = [(path, key, known.get(key)) for path, key in self._layout.files(shard) if key is not None]
                for entry in pool.map(self._look, named, chunksize=16):
                    if entry is not None:
                        self._known[entry.key] = (entry.parent, entry.model)
                        yield entry

    def _look(self, named: tuple[Path, bytes, tuple[bytes, str] | None]) -> Entry | None:
        path, key, remembered = named
        try:
            status = os.stat(path)
            parent, model = remembered or self._read(path, key)
            return Entry(key, parent, status.st_blocks * 512, status.st_mtime, model)
        except FileNotFoundError:
            return None
        except (BlockCorruptError, OSError):
            self._damaged.append(path)
            return None

    def _read(self, path: Path, key: bytes) -> tuple[bytes, str]:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into the data
            page = os.pread(file.fileno(), PAGE_BYTES, 0)
            header_bytes = peek_header_bytes(page, key)
            if header_bytes > len(page):
                page = os.pread(file.fileno(), header_bytes, 0)
        header = decode_header(page, key)
        if header.key != key:
            raise BlockCorruptError(key, f"block {key.hex()}: the file holds block {header.key.hex()}")
        name = model_name(header)
        return header.parent, self._models.setdefault(name, name)

    def used_since(self, entry: Entry) -> bool:
        try:
            return os.stat(self._layout.path(entry.key)).st_mtime > entry.used_at
        except OSError:
            return False

    def remove(self, entries: Sequence[Entry]) -> int:
        removed = 0
        for entry in entries:
            try:
                os.unlink(self._layout.path(entry.key))
                removed += 1
            except FileNotFoundError:
                continue
            except OSError as error:
                raise store_error(f"removing block {entry.key.hex()} from {self.name}", error) from error
        return removed

    def sweep(self, age_s: float) -> int:
        oldest = self._layout.now() - age_s
        leftovers = [path for shard in self._layout.shards() for path, key in self._layout.files(shard) if key is None]
        swept = 0
        for path in [path for path in leftovers if path.name.endswith(TEMPORARY)] + self._damaged:
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    swept += 1
        return swept

    def content(self, entry: Entry) -> bytes:
        try:
            return self._layout.path(entry.key).read_bytes()
        except FileNotFoundError:
            raise BlockMissingError(entry.key, f"block {entry.key.hex()} is not in {self.name} (any more)") from None
        except OSError as error:
            raise store_error(f"reading block {entry.key.hex()} from {self.name}", error) from error

    def put_aside(self, entry: Entry) -> None:
        try:
            with open(self._layout.path(entry.key), "rb") as file:
                self._layout.quarantine(entry.key, file.fileno())
        except FileNotFoundError:
            return
        except OSError as error:
            raise store_error(f"putting block {entry.key.hex()} aside", error) from error

    @contextlib.contextmanager
    def collecting(self) -> Iterator[bool]:
        """By flock, which the kernel takes back from a dead process. Where a network file system keeps such locks to each host, hosts may
        collect at the same time: blocks are then given up a little early, and nothing else happens.
        """
        try:
            fd = os.open(self._layout.root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise store_error(f"opening the collector's lock in {self.name}", error) from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            except OSError as error:
                raise store_error(f"locking {self.name} for collection", error) from error
            else:
                yield True
        finally:
            os.close(fd)

    def now(self) -> float:
        return self._layout.now()

    def publish(self, usage: Usage) -> None:
        """Also removes what writers have said about earlier publications."""
        self._replace(USAGE, usage.to_json())
        with contextlib.suppress(OSError):
            for path in list(self._notes()):
                if parse_note(path.read_bytes())[0] < usage.number - 1:
                    path.unlink()

    def note_written(self, writer: str, number: int, nbytes: int) -> None:
        with contextlib.suppress(FileExistsError, OSError):
            os.mkdir(self._layout.root / WRITERS)
        self._replace(f"{WRITERS}/{writer}", f"{number} {nbytes}".encode())

    def written_by_others(self, writer: str, number: int) -> int:
        total = 0
        for path in self._notes():
            with contextlib.suppress(FileNotFoundError):
                about, nbytes = parse_note(path.read_bytes())
                total += nbytes if about == number and path.name != writer else 0
        return total

    def _notes(self) -> Iterator[Path]:
        try:
            yield from (path for path in (self._layout.root / WRITERS).iterdir() if not path.name.endswith(TEMPORARY))
        except FileNotFoundError:
            return

    def _replace(self, name: str, content: bytes) -> None:
        draft = self._layout.root / f".{uuid.uuid4().hex}{TEMPORARY}"
        try:
            draft.write_bytes(content)
            os.rename(draft, self._layout.root / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink()
            raise store_error(f"writing {name} in {self.name}", error) from error

    def usage(self) -> Usage | None:
        try:
            return Usage.from_json((self._layout.root / USAGE).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"reading {USAGE} in {self.name} failed: {error.strerror}") from error


def parse_note(text: bytes) -> tuple[int, int]:
    """Publication and bytes of a writer's note; (-1, 0) for what is none."""
    try:
        number, nbytes = text.split()
        return int(number), int(nbytes)
    except ValueError:
        return -1, 0


def model_name(header: BlockHeader) -> str:
    """How entries name the model that a block belongs to."""
    return f"{header.label} [{header.geometry.signature().decode()}]"
