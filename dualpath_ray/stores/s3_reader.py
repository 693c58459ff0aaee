"""Reading the blocks of one request from a bucket, range of layers by range of layers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from dualpath_ray.errors import BlockCorruptError, BlockError, CancelledError, DualPathError, StoreError
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.ordered_work import OrderedWork


class ReaderHost(Protocol):
    """What a reader needs of its store."""

    format: BlockFormat
    counters: Counters
    reading: OrderedWork

    def fetch(self, block: BlockBuffer, start: int, stop: int) -> Bytes: ...
    def corrupt(self, block: BlockBuffer, error: BlockError) -> BlockError: ...


@dataclass(slots=True, eq=False)
class _Read:
    """One call of `read`. Its future counts as running from the start: a cancel() could not keep bytes from landing."""

    first: int
    stop: int
    left: int
    future: Future[None] = field(default_factory=Future)
    error: DualPathError | None = None


class S3Reader:
    """A BlockReader over blocks whose headers have been checked. After `close`, reads not yet begun end with CancelledError."""

    def __init__(self, host: ReaderHost, turn: int, blocks: Sequence[BlockBuffer], headers: Sequence[BlockHeader]) -> None:
        self._host, self._turn = host, turn
        self._blocks, self._headers = blocks, headers
        self._lock = threading.Lock()
        self._reads: deque[_Read] = deque()  # in the order in which they must end
        self._settling = False
        self._closed = False

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        if not 0 <= first_layer < stop_layer <= self._host.format.geometry.layers:
            raise ValueError(f"layers [{first_layer}, {stop_layer}) are not within the block's {self._host.format.geometry.layers}")
        read = _Read(first_layer, stop_layer, len(self._blocks))
        read.future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                read.future.set_exception(StoreError("this reader is closed"))
                return read.future
            self._reads.append(read)
        try:
            self._host.reading.submit(self._turn, [lambda i=i: self._run(read, i) for i in range(len(self._blocks))])  # type: ignore[misc]
        except DualPathError as error:
            read.error, read.left = error, 0
        self._settle()
        return read.future

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def _run(self, read: _Read, index: int) -> None:
        """One block of a read, on a reading thread."""
        error: DualPathError | None = None
        if self._closed:
            error = CancelledError("the read was withdrawn")
        elif read.error is None:
            try:
                self._move_and_verify(read, index)
            except DualPathError as raised:
                error = raised
            except Exception as unexpected:
                error = StoreError(f"reading blocks failed: {unexpected!r}")
        with self._lock:
            read.error = read.error or error
            read.left -= 1
        self._settle()

    def _move_and_verify(self, read: _Read, index: int) -> None:
        host, block = self._host, self._blocks[index]
        size, offset = host.format.geometry.layer_block_bytes, host.format.header_bytes
        low, high = read.first * size, read.stop * size
        with host.counters.busy("read_seconds"):
            data = host.fetch(block, offset + low, offset + high)
        block.data[low:high] = data
        host.counters.add("read_bytes", high - low)
        try:
            host.format.verify(self._headers[index], block.data, read.first, read.stop)
        except BlockCorruptError as error:
            raise host.corrupt(block, error) from None

    def _settle(self) -> None:
        """End the reads whose turn has come, in order, on one thread at a time and outside the lock."""
        with self._lock:
            if self._settling:
                return
            self._settling = True
        while True:
            with self._lock:
                if not self._reads or self._reads[0].left:
                    self._settling = False
                    return
                read = self._reads.popleft()
            if read.error is None:
                read.future.set_result(None)
            else:
                read.future.set_exception(read.error)
