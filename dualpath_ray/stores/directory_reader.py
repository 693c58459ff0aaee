"""Reading the blocks of one request from a directory store, range of layers by range of layers."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from dualpath_ray.errors import CancelledError, DualPathError, StoreError
from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.file_io import FileIO, PieceError
from dualpath_ray.stores.nixl_files import OpenFiles
from dualpath_ray.stores.pieces import Piece


class ReaderHost(Protocol):
    """What a reader needs of its store."""

    format: BlockFormat
    file_io: FileIO
    counters: Counters
    batch_bytes: int

    def submit_reads(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Queue tasks for the reading threads, in order. Raises OverloadedError (and queues none) or StoreError."""

    def block_failed(self, block: BlockBuffer, fd: int, cause: Exception) -> DualPathError:
        """Count a failure, put a damaged file aside, and say it in the package's words."""

    def reader_closed(self, reader: DirectoryReader) -> None:
        """The reader's files are closed."""


@dataclass(slots=True, eq=False)
class _Read:
    """One call of `read`. Its future counts as running from the start: a cancel() could not keep bytes from landing."""

    first: int
    stop: int
    batches_left: int
    future: Future[None] = field(default_factory=Future)
    error: DualPathError | None = None


class DirectoryReader:
    """A BlockReader over open files whose headers have been checked. After `close` reads not yet begun end with CancelledError."""

    def __init__(self, host: ReaderHost, blocks: Sequence[BlockBuffer], headers: Sequence[BlockHeader], files: OpenFiles) -> None:
        self._host = host
        self._blocks = blocks
        self._headers = headers
        self._files = files
        self._lock = threading.Lock()
        self._reads: deque[_Read] = deque()  # in the order in which they must end
        self._settling = False
        self._closed = False
        self._released = False

    @property
    def files(self) -> int:
        return len(self._files.fds)

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        shape = self._host.format.geometry
        if not 0 <= first_layer < stop_layer <= shape.layers:
            raise ValueError(f"layers [{first_layer}, {stop_layer}) are not within the block's {shape.layers}")
        per_batch = max(1, self._host.batch_bytes // ((stop_layer - first_layer) * shape.layer_block_bytes))
        parts = [range(start, min(start + per_batch, len(self._blocks))) for start in range(0, len(self._blocks), per_batch)]
        read = _Read(first_layer, stop_layer, len(parts))
        read.future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                read.future.set_exception(StoreError("this reader is closed"))
                return read.future
            self._reads.append(read)
        try:
            self._host.submit_reads([lambda part=part: self._run(read, part) for part in parts])  # type: ignore[misc]
        except DualPathError as error:
            read.error = error
            read.batches_left = 0
        self._settle()
        return read.future

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._settle()

    def _run(self, read: _Read, part: range) -> None:
        """One batch, on a reading thread."""
        error: DualPathError | None
        if self._closed:
            error = CancelledError("the read was withdrawn")
        elif read.error is not None:
            error = None
        else:
            try:
                error = self._move_and_verify(read, part)
            except Exception as unexpected:
                error = StoreError(f"reading blocks failed: {unexpected!r}")
        with self._lock:
            read.error = read.error or error
            read.batches_left -= 1
        self._settle()

    def _move_and_verify(self, read: _Read, part: range) -> DualPathError | None:
        host = self._host
        size = host.format.geometry.layer_block_bytes
        low, high = read.first * size, read.stop * size
        fds = self._files.fds
        pieces = [Piece(fds[i], host.format.header_bytes + low, self._blocks[i].data[low:high]) for i in part]
        try:
            with host.counters.busy("read_seconds"):
                host.file_io.move("READ", pieces)
        except PieceError as error:
            bad = part[error.index]
            return host.block_failed(self._blocks[bad], fds[bad], error.cause)
        host.counters.add("read_bytes", (high - low) * len(part))
        start = time.perf_counter()
        try:
            for i in part:
                host.format.verify(self._headers[i], self._blocks[i].data, read.first, read.stop)
        except DualPathError as error:
            return host.block_failed(self._blocks[i], fds[i], error)
        finally:
            host.counters.add("verify_seconds", time.perf_counter() - start)
        return None

    def _settle(self) -> None:
        """End the reads whose turn has come, in order, on one thread at a time and outside the lock."""
        with self._lock:
            if self._settling:
                return
            self._settling = True
        while True:
            with self._lock:
                if not self._reads or self._reads[0].batches_left:
                    self._settling = False
                    release = self._closed and not self._reads and not self._released
                    self._released = self._released or release
                    break
                read = self._reads.popleft()
            if read.error is None:
                read.future.set_result(None)
            else:
                read.future.set_exception(read.error)
        if release:
            self._host.file_io.release(self._files)
            self._host.reader_closed(self)
