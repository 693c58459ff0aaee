"""A block store in a directory: local disk, NFS or a 3FS mount, shared by any number of gateways.

Loads outrank stores: reads and writes have threads and NIXL agents of their own, and before each batch a writer waits, for a
bounded time, until no read is queued or under way.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import os
import queue
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dualpath_ray.errors import BlockCorruptError, BlockMissingError, ConfigError, DualPathError, OverloadedError, StoreError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.stores.base import BlockBuffer, BlockReader, Bytes, StoredBlock
from dualpath_ray.stores.block_format import BlockFormat
from dualpath_ray.stores.budget import Budget
from dualpath_ray.stores.commit import Commit, Committer, store_error
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.directory_inventory import DirectoryInventory
from dualpath_ray.stores.directory_reader import DirectoryReader
from dualpath_ray.stores.file_io import Choice, FileIO, choose
from dualpath_ray.stores.layout import DirectoryLayout
from dualpath_ray.stores.scan import Scan
from dualpath_ray.transfer.memory import PAGE_BYTES, allocate

log = logging.getLogger(__name__)

MAX_READ_BATCH = 64  # blocks
COUNTERS = (
    "read_bytes", "read_seconds", "verify_seconds", "written_bytes", "write_seconds", "written_blocks", "existing_blocks",
    "failed_writes", "missing_blocks", "corrupt_blocks", "quarantined_files", "read_errors", "foreign_files", "damaged_files",
    "swept_files", "removed_blocks", "refused_writes",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DirectorySettings:
    """`io` and `direct` restrict the ways of file I/O that are tried (see file_io.py). The queue bounds count batches of about
    `batch_bytes` for reads, blocks for writes. Bytes in flight are at most threads times `batch_bytes` (or one block, if larger).
    A block is cut into at most `layer_groups` ranges of layers, none below `range_bytes`: each costs processor time of its own.
    With `sync` a write is done when it survives a loss of power, without it when it survives the process.
    `capacity_bytes` bounds what the directory may hold, `use_resolution_s` is how old a noted use may become before the next is noted.
    """

    io: Choice = "auto"
    direct: Literal["auto", "on", "off"] = "auto"
    layer_groups: int = 4
    range_bytes: int = 1 << 20
    read_threads: int = 8
    write_threads: int = 2
    batch_bytes: int = 8 << 20
    sync: bool = True
    max_queued_reads: int = 16_384
    max_queued_writes: int = 4_096
    max_open_files: int = 16_384
    write_yield_s: float = 0.02
    temporary_age_s: float = 3600.0
    capacity_bytes: int | None = None
    use_resolution_s: float = 60.0


@dataclass(slots=True, eq=False)
class _Batch:
    """Blocks to be written in one commit. `done` is called once, when `commit` has been finished."""

    blocks: Sequence[BlockBuffer]
    done: Callable[[list[Exception | None]], None]
    commit: Commit = field(default_factory=lambda: Commit([]))


class DirectoryStore:
    """A BlockStore. Futures it returns cannot be cancelled.

    Raises ConfigError when the directory cannot be used, StoreError when no way of file I/O works there.
    """

    def __init__(self, path: Path, geometry: KVGeometry, fingerprint: str, settings: DirectorySettings | None = None) -> None:
        self.settings = settings or DirectorySettings()
        self.batch_bytes = self.settings.batch_bytes
        self.format = BlockFormat(geometry, fingerprint)
        self.counters = Counters(*COUNTERS)
        self.budget = Budget(self.settings.capacity_bytes)
        self._layout = DirectoryLayout(path)
        range_bytes = -(-self.format.payload_bytes // self.layer_groups())
        self.read_batch = min(MAX_READ_BATCH, max(1, self.batch_bytes // range_bytes))
        most = max(self.batch_bytes, range_bytes) + self.read_batch * self.format.header_bytes
        self.file_io = choose(path, self.settings.io, self.settings.direct, self.settings.read_threads * most)
        self._write_io = FileIO(self.file_io.engine, self.file_io.direct)
        self._write_batch = max(1, self.batch_bytes // self.format.payload_bytes)
        # With NIXL as many threads again, which verify what has been read, or wait with the next read, while as many reads are under way.
        threads = self.settings.read_threads * (1 if self.file_io.engine == "plain" else 2)
        pages = allocate(threads * self.read_batch * self.format.header_bytes)
        self.file_io.register(pages)
        self.header_pages: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        for each in pages.reshape(threads, self.read_batch, self.format.header_bytes):
            self.header_pages.put(each)
        self._committer = Committer(
            self.format, self._layout, self._write_io, self._write_batch, self.settings.write_threads, self.settings.sync
        )
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="store-read")
        self._writers = ThreadPoolExecutor(self.settings.write_threads, thread_name_prefix="store-write")
        self._lock = threading.Lock()
        self._no_reads = threading.Event()
        self._no_reads.set()
        self._queued_reads = self._queued_writes = self._open_files = self._writing = 0
        self._batches: deque[_Batch] = deque()
        self._max_open_files = _allow_open_files(self.settings.max_open_files)
        self._open_readers: set[DirectoryReader] = set()
        self._closed = False
        log.info("block store %s: %s, %d layer groups", path, self.file_io.name, self.layer_groups())

    def register(self, arena: Bytes) -> None:
        self.file_io.register(arena)
        self._write_io.register(arena)

    def layer_groups(self) -> int:
        if self.format.geometry.layer_block_bytes % PAGE_BYTES:
            return 1
        return max(1, min(self.settings.layer_groups, self.format.geometry.layers, self.format.payload_bytes // self.settings.range_bytes))

    def scan(self) -> Iterator[StoredBlock]:
        return Scan(self.format, self._layout, self.counters, self.settings.temporary_age_s).blocks()

    # ---- reading

    def open(self, blocks: Sequence[BlockBuffer]) -> Future[BlockReader]:
        future: Future[BlockReader] = Future()
        future.set_running_or_notify_cancel()
        bound = self._max_open_files
        if len(blocks) > bound:
            future.set_exception(StoreError(f"{len(blocks)} blocks in one read; at most {bound} files may be open (ulimit -n)"))
            return future
        with self._lock:
            fits = self._open_files + len(blocks) <= bound
            if fits:
                self._open_files += len(blocks)
        if not fits:
            future.set_exception(OverloadedError(f"the store has {self._open_files} block files open; at most {bound} may be"))
            return future

        def run() -> None:
            try:
                future.set_result(self._open(blocks))
            except Exception as error:
                with self._lock:
                    self._open_files -= len(blocks)
                future.set_exception(error if isinstance(error, DualPathError) else StoreError(f"opening blocks failed: {error!r}"))

        try:
            self.submit_reads([run])
        except DualPathError as error:
            with self._lock:
                self._open_files -= len(blocks)
            future.set_exception(error)
        return future

    def _open(self, blocks: Sequence[BlockBuffer]) -> DirectoryReader:
        reader = DirectoryReader(self, blocks, self.file_io.adopt(self._open_fds(blocks), self.format.file_bytes))
        with self._lock:
            self._open_readers.add(reader)
        return reader

    def _open_fds(self, blocks: Sequence[BlockBuffer]) -> list[int]:
        fds: list[int] = []
        noted_enough = time.time() - self.settings.use_resolution_s
        try:
            for block in blocks:
                fds.append(self.file_io.open(self._layout.path_name(block.key), os.O_RDONLY))
                if os.fstat(fds[-1]).st_mtime < noted_enough:
                    with contextlib.suppress(OSError):  # a read-only store is still a store
                        os.utime(fds[-1])
        except OSError as error:
            for fd in fds:
                os.close(fd)
            raise self.block_failed(block, -1, error) from error
        return fds

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            with contextlib.suppress(OSError):
                os.utime(self._layout.path(key))

    def wait_idle(self, timeout_s: float) -> bool:
        return self._no_reads.wait(timeout_s)

    def submit_reads(self, tasks: Sequence[Callable[[], None]]) -> None:
        with self._lock:
            if self._closed:
                raise StoreError("the block store is closed")
            if self._queued_reads + len(tasks) > self.settings.max_queued_reads:
                raise OverloadedError(f"the block store's read queue is full ({self._queued_reads} of {self.settings.max_queued_reads})")
            self._queued_reads += len(tasks)
            self._no_reads.clear()
            for task in tasks:
                self._readers.submit(self._run_read, task)

    def _run_read(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception:
            log.exception("a read task of the block store failed")
        finally:
            with self._lock:
                self._queued_reads -= 1
                if not self._queued_reads:
                    self._no_reads.set()

    def block_failed(self, block: BlockBuffer, fd: int, cause: Exception) -> DualPathError:
        """The error to report for a block. Damaged files are put aside, so that the block can be written anew."""
        name = block.key.hex()
        if isinstance(cause, OSError):
            if cause.errno in (errno.ENOENT, errno.ESTALE):
                self.counters.add("missing_blocks")
                return BlockMissingError(block.key, f"block {name} is not in {self._layout.root} (any more)")
            self.counters.add("read_errors")
            return store_error(f"reading block {name} from {self._layout.root}", cause)
        self.counters.add("corrupt_blocks")
        if self._layout.quarantine(block.key, fd):
            self.counters.add("quarantined_files")
        error = cause if isinstance(cause, BlockCorruptError) else BlockCorruptError(block.key, f"block {name}: truncated: {cause}")
        log.warning("%s; its file is put aside", error)
        return error

    def reader_closed(self, reader: DirectoryReader) -> None:
        with self._lock:
            self._open_readers.discard(reader)
            self._open_files -= reader.files

    # ---- writing

    def write(self, blocks: Sequence[BlockBuffer]) -> Future[list[Exception | None]]:
        future: Future[list[Exception | None]] = Future()
        future.set_running_or_notify_cancel()
        per_batch = self._write_batch
        parts = [blocks[start : start + per_batch] for start in range(0, len(blocks), per_batch)]
        outcomes: list[list[Exception | None]] = [[] for _ in parts]
        left = len(parts)
        if not parts:
            future.set_result([])

        def done(number: int, results: list[Exception | None]) -> None:
            nonlocal left
            outcomes[number] = results
            with self._lock:
                self._queued_writes -= len(results)
                left -= 1
                last = not left
            if last:
                future.set_result([outcome for part in outcomes for outcome in part])

        with self._lock:
            if self._closed:
                future.set_exception(StoreError("the block store is closed"))
            elif self._queued_writes + len(blocks) > self.settings.max_queued_writes:
                bound = self.settings.max_queued_writes
                future.set_exception(OverloadedError(f"the block store's write queue is full ({self._queued_writes} blocks of {bound})"))
            elif not self.budget.take(len(blocks) * self.format.file_bytes):
                self.counters.add("refused_writes", len(blocks))
                future.set_exception(StoreError(f"{self._layout.root} holds all of storage.capacity_bytes; older blocks are being removed"))
            else:
                self._queued_writes += len(blocks)
                self._batches.extend(_Batch(part, functools.partial(done, number)) for number, part in enumerate(parts))
                for _ in range(min(len(self._batches), self.settings.write_threads - self._writing)):
                    self._writing += 1
                    self._writers.submit(self._write_batches)
        return future

    def _write_batches(self) -> None:
        """On a writing thread: one batch after the other while there are any, each finished together with the next."""
        before: _Batch | None = None
        while True:
            with self._lock:
                batch = self._batches.popleft() if self._batches else None
                if batch is None and before is None:
                    self._writing -= 1
                    return
            if batch is not None:
                self._no_reads.wait(self.settings.write_yield_s)
            with self.counters.busy("write_seconds"):
                if batch is not None:
                    self._commit(batch, before)
                if before is not None:
                    self._committer.finish(before.commit)
            if before is not None:
                self._account(before)
            before = batch

    def _commit(self, batch: _Batch, before: _Batch | None) -> None:
        try:
            batch.commit = self._committer.commit(batch.blocks, before.commit if before is not None else None)
        except Exception as error:
            log.exception("a commit of the block store failed")
            batch.commit = Commit([StoreError(f"writing blocks failed: {error!r}")] * len(batch.blocks))

    def _account(self, batch: _Batch) -> None:
        outcomes, existing = batch.commit.outcomes, batch.commit.existing
        written = sum(outcome is None and number not in existing for number, outcome in enumerate(outcomes))
        self.budget.give_back((len(outcomes) - written) * self.format.file_bytes)
        self.counters.add("written_blocks", written)
        self.counters.add("written_bytes", written * self.format.payload_bytes)
        self.counters.add("existing_blocks", len(existing))
        self.counters.add("failed_writes", sum(outcome is not None for outcome in outcomes))
        batch.done(outcomes)

    # ---- the rest

    def inventory(self) -> DirectoryInventory:
        return DirectoryInventory(self._layout.root)

    def remove(self, key: bytes) -> None:
        try:
            os.unlink(self._layout.path(key))
            self.counters.add("removed_blocks")
            self.budget.give_back(self.format.file_bytes)
        except FileNotFoundError:
            return
        except OSError as error:
            raise store_error(f"removing block {key.hex()} from {self._layout.root}", error) from error

    def stats(self) -> dict[str, float]:
        values = self.counters.snapshot()
        values["nixl"] = float(self.file_io.engine != "plain")
        values["direct_io"] = float(self.file_io.direct)
        values["redone_transfers"] = float(self.file_io.redone + self._write_io.redone)
        with self._lock:
            values["queued_reads"] = float(self._queued_reads)
            values["queued_writes"] = float(self._queued_writes)
            values["open_files"] = float(self._open_files)
        return values

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._readers.shutdown()
        self._writers.shutdown()
        self._committer.close()
        for reader in list(self._open_readers):
            reader.close()
        self.file_io.close()
        self._write_io.close()


def _allow_open_files(wanted: int) -> int:
    """Raise this process's soft limit towards `wanted` files besides its others; returns how many may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = 512
    if soft < wanted + others and (hard == resource.RLIM_INFINITY or soft < hard):
        target = wanted + others if hard == resource.RLIM_INFINITY else min(hard, wanted + others)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
    allowed = min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - others)
    if allowed < 1:
        raise ConfigError(f"too few open files are allowed; raise the hard limit (ulimit -Hn) from {hard} to at least {wanted + others}")
    return allowed
