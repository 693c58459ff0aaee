"""Reading the blocks of one request from a bucket, range of layers by range of layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Protocol

from dualpath_ray.stores.base import BlockBuffer
from dualpath_ray.stores.block_format import BlockFormat, BlockHeader
from dualpath_ray.stores.ordered_reader import OrderedReader
from dualpath_ray.stores.ordered_work import OrderedWork


class ReaderHost(Protocol):
    """What a reader needs of its store."""

    format: BlockFormat
    reading: OrderedWork
    prefix_layers: int

    def read_layers(self, block: BlockBuffer, header: BlockHeader, first: int, stop: int) -> None: ...


class S3Reader(OrderedReader):
    """A BlockReader over blocks whose headers have been checked."""

    def __init__(self, host: ReaderHost, turn: int, blocks: Sequence[BlockBuffer], headers: Sequence[BlockHeader]) -> None:
        super().__init__(host.format.geometry.layers)
        self._host, self._turn = host, turn
        self._blocks, self._headers = blocks, headers

    def read(self, first_layer: int, stop_layer: int) -> Future[None]:
        self._check_range(first_layer, stop_layer)
        first = max(first_layer, self._host.prefix_layers)  # what lies before it has come, verified, with the header
        if first >= stop_layer:
            return self._begin([], lambda tasks: None)
        read = self._host.read_layers
        pairs = zip(self._blocks, self._headers, strict=True)
        tasks = [functools.partial(read, block, header, first, stop_layer) for block, header in pairs]
        return self._begin(tasks, functools.partial(self._host.reading.submit, self._turn))
