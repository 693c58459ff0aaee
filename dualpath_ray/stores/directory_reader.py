"""Reading the blocks of one request from a directory store, range of layers by range of layers.

A block's header comes with the first range of its layers: a round of its own would cost a wait of the device for a few pages. Should two
ranges of a block be read at once before its header is known, both bring it, which costs less than to wait for each other.
"""

from __future__ import annotations

import functools
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from dualpath_ray.errors import DualPathError
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.file_io import FileIO, PieceError
from dualpath_ray.stores.nixl_files import OpenFiles
from dualpath_ray.stores.ordered_reader import OrderedReader
from dualpath_ray.stores.pieces import Piece


class ReaderHost(Protocol):
    """What a reader needs of its store. `header_pages` has memory for the headers of `read_batch` blocks for each reading thread."""

    format: BlockFormat
    file_io: FileIO
    counters: Counters
    batch_bytes: int
    read_batch: int
    header_pages: queue.SimpleQueue[Bytes]

    def submit_reads(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Queue tasks for the reading threads, in order. Raises OverloadedError (and queues none) or StoreError."""

    def block_failed(self, block: BlockBuffer, fd: int, cause: Exception) -> DualPathError:
        """Count a failure, put a damaged file aside, and say it in the package's words."""

    def reader_closed(self, reader: DirectoryReader) -> None:
        """The reader's files are closed."""


class DirectoryReader(OrderedReader):
    """A BlockReader over open files."""

    def __init__(self, host: ReaderHost, blocks: Sequence[BlockBuffer], files: OpenFiles) -> None:
        super().__init__(host.format.geometry.layers)
        self._host = host
        self._blocks = blocks
        self._headers: list[BlockHeader | None] = [None] * len(blocks)  # those that are known, and checked
        self._files = files

    @property
    def files(self) -> int:
        return len(self._files.fds)

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        self._check_range(first_layer, stop_layer)
        size = self._host.format.geometry.layer_block_bytes
        per_batch = min(self._host.read_batch, max(1, self._host.batch_bytes // ((stop_layer - first_layer) * size)))
        parts = [range(start, min(start + per_batch, len(self._blocks))) for start in range(0, len(self._blocks), per_batch)]
        low, high = first_layer * size, stop_layer * size
        tasks = [functools.partial(self._move_and_verify, first_layer, stop_layer, low, high, part) for part in parts]
        return self._begin(tasks, self._host.submit_reads)

    def _move_and_verify(self, first: int, stop: int, low: int, high: int, part: range) -> None:
        """One batch: bytes `[low, high)` of its blocks' payloads, which are layers `[first, stop)`, and headers not known yet."""
        host = self._host
        pages = host.header_pages.get()
        try:
            self._move(low, high, part, pages)
        finally:
            host.header_pages.put(pages)
        host.counters.add("read_bytes", (high - low) * len(part))
        start = time.perf_counter()
        try:
            for i in part:
                header = self._headers[i]
                assert header is not None
                host.format.verify(header, self._blocks[i].data, first, stop)
        except DualPathError as error:
            raise host.block_failed(self._blocks[i], self._files.fds[i], error) from error
        finally:
            host.counters.add("verify_seconds", time.perf_counter() - start)

    def _move(self, low: int, high: int, part: range, pages: Bytes) -> None:
        host, fds = self._host, self._files.fds
        unknown = [i for i in part if self._headers[i] is None]
        pieces = [Piece(fds[i], 0, page) for i, page in zip(unknown, pages, strict=False)]
        pieces += [Piece(fds[i], host.format.header_bytes + low, self._blocks[i].data[low:high]) for i in part]
        try:
            with host.counters.busy("read_seconds"):
                host.file_io.move("READ", pieces)
        except PieceError as error:
            bad = [*unknown, *part][error.index]
            raise host.block_failed(self._blocks[bad], fds[bad], error.cause) from error
        for i, page in zip(unknown, pages, strict=False):
            block = self._blocks[i]
            try:
                self._headers[i] = host.format.check(page.tobytes(), os.fstat(fds[i]).st_size, block.key, block.parent)
            except DualPathError as error:
                raise host.block_failed(block, fds[i], error) from None

    def _on_end(self) -> None:
        self._host.file_io.release(self._files)
        self._host.reader_closed(self)
