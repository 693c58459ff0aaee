"""One process's part of the data plane for these tests: an array of blocks, its endpoint, and what has arrived."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np

from dualpath_ray.errors import DualPathError
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.memory import Region, allocate
from dualpath_ray.transfer.messages import Message
from dualpath_ray.transfer.push import Push

WAIT_S = 30.0  # longer than anything here takes, so that a failure is an error and no hang


class Site:
    """`memory` is uint8 `[blocks, block_bytes]`, registered as region "memory"."""

    def __init__(self, name: str, blocks: int = 64, block_bytes: int = 256, **settings: Any) -> None:
        self.memory = allocate(blocks * block_bytes).reshape(blocks, block_bytes)
        region = Region("memory", self.memory.ctypes.data, block_bytes, blocks, blocks * block_bytes)
        self.endpoint = Endpoint(name, (region,), EndpointSettings(**settings))
        self.arrived: queue.Queue[tuple[str, Message, np.ndarray]] = queue.Queue()

    @property
    def name(self) -> str:
        return self.endpoint.agent_name

    def listen(self, *kinds: type) -> None:
        """Keep messages of these kinds, each with a copy of the memory as it was at that moment."""
        for kind in kinds:
            self.endpoint.on(kind, lambda sender, message: self.arrived.put((sender, message, self.memory.copy())))

    def next(self) -> tuple[str, Message, np.ndarray]:
        return self.arrived.get(timeout=WAIT_S)

    def push(self, peer: str, local: Sequence[int], remote: Sequence[int], **fields: Any) -> Future[DualPathError | None]:
        """Push blocks; the future's result is what `on_done` was given. A second call of `on_done` fails the push's test."""
        done: Future[DualPathError | None] = Future()
        blocks = (np.array(local, dtype=np.int32), np.array(remote, dtype=np.int32))
        self.endpoint.push(
            Push(peer, fields.pop("region", "memory"), blocks[0], fields.pop("to", "memory"), blocks[1], done.set_result, **fields)
        )
        return done

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Whatever is asked of the endpoint inside is seen by its thread at once, at the end."""
        entered, leave = threading.Event(), threading.Event()

        def wait() -> None:
            entered.set()
            leave.wait(WAIT_S)

        self.endpoint.call(wait)
        assert entered.wait(WAIT_S)
        try:
            yield
        finally:
            leave.set()

    def settled(self) -> None:
        """Wait until the endpoint's thread has done all that was asked of it before."""
        done: Future[None] = Future()
        self.endpoint.call(lambda: done.set_result(None))
        done.result(WAIT_S)


@contextmanager
def sites(*names: str, connected: bool = True, **settings: Any) -> Iterator[list[Site]]:
    made: list[Site] = []
    try:
        made += [Site(name, **settings) for name in names]
        for site in made if connected else ():
            for other in made:
                if other is not site:
                    site.endpoint.connect(other.endpoint.info)
        yield made
    finally:
        for site in made:
            site.endpoint.close()
