"""Reading the blocks of one request from a bucket, range of layers by range of layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from dualpath_ray.errors import BlockCorruptError, BlockError
from dualpath_ray.stores.base import BlockBuffer, Bytes
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.counters import Counters
from dualpath_ray.stores.ordered_reader import OrderedReader
from dualpath_ray.stores.ordered_work import OrderedWork


class ReaderHost(Protocol):
    """What a reader needs of its store."""

    format: BlockFormat
    counters: Counters
    reading: OrderedWork
    prefix_layers: int

    def fetch(self, block: BlockBuffer, start: int, stop: int) -> Bytes: ...
    def corrupt(self, block: BlockBuffer, error: BlockError) -> BlockError: ...


class S3Reader(OrderedReader):
    """A BlockReader over blocks whose headers have been checked."""

    def __init__(self, host: ReaderHost, turn: int, blocks: Sequence[BlockBuffer], headers: Sequence[BlockHeader]) -> None:
        super().__init__(host.format.geometry.layers)
        self._host, self._turn = host, turn
        self._blocks, self._headers = blocks, headers

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        self._check_range(first_layer, stop_layer)
        tasks = [functools.partial(self._move_and_verify, first_layer, stop_layer, index) for index in range(len(self._blocks))]
        return self._begin(tasks, functools.partial(self._host.reading.submit, self._turn))

    def _move_and_verify(self, first: int, stop: int, index: int) -> None:
        """One block of a read."""
        host, block = self._host, self._blocks[index]
        size, offset = host.format.geometry.layer_block_bytes, host.format.header_bytes
        low, high = first * size, stop * size
        wanted = max(low, host.prefix_layers * size)  # what lies before it has come with the header
        if wanted < high:
            with host.counters.busy("read_seconds"):
                data = host.fetch(block, offset + wanted, offset + high)
            block.data[wanted:high] = data
        host.counters.add("read_bytes", high - low)
        try:
            host.format.verify(self._headers[index], block.data, first, stop)
        except BlockCorruptError as error:
            raise host.corrupt(block, error) from None
