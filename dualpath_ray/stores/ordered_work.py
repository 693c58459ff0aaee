"""Threads that always take the task that is first in order, not the one that was submitted first.

A request's reads are many tasks that are submitted in several rounds (headers, then ranges of layers). Served in order of submission, a
request would queue behind everybody in each round, and all requests of a busy store would finish together, late. In order of
*requests*, the first one finishes first, which is how a storage NIC's queue is meant to be served.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
from collections.abc import Callable, Sequence

from dualpath_ray.errors import OverloadedError, StoreError

log = logging.getLogger(__name__)


class OrderedWork:
    """`threads` threads and one bounded queue. Safe from any thread."""

    def __init__(self, threads: int, max_queued: int, name: str) -> None:
        self._max_queued = max_queued
        self._ready = threading.Condition()
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._closed = False
        self._under_way = 0
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    @property
    def queued(self) -> int:
        return len(self._queue)

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or under way; false when the time was up before."""
        with self._ready:
            return self._ready.wait_for(lambda: not self._queue and not self._under_way, timeout_s)

    def submit(self, order: int, tasks: Sequence[Callable[[], None]]) -> None:
        """Queue tasks that must not raise; smaller `order` first, then first come first served.

        Raises OverloadedError (and queues none of them) when the queue is full, StoreError after `close`.
        """
        with self._ready:
            if self._closed:
                raise StoreError("the block store is closed")
            if len(self._queue) + len(tasks) > self._max_queued:
                raise OverloadedError(f"the block store's queue is full ({len(self._queue)} of {self._max_queued})")
            for task in tasks:
                heapq.heappush(self._queue, (order, next(self._numbers), task))
            self._ready.notify_all()

    def close(self) -> None:
        """End the threads when the queue is empty. Idempotent."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._ready:
                while not self._queue:
                    if self._closed:
                        return
                    self._ready.wait()
                _, _, task = heapq.heappop(self._queue)
                self._under_way += 1
            try:
                task()
            except Exception:
                log.exception("a task of the block store failed")
            finally:
                with self._ready:
                    self._under_way -= 1
                    if not self._under_way and not self._queue:
                        self._ready.notify_all()
