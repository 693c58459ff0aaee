"""What readers of all stores have in common: reads of layer ranges that run in parallel and end in the order they were asked for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from dualpath_ray.errors import CancelledError, DualPathError, StoreError

Task = Callable[[], None]


@dataclass(slots=True, eq=False)
class _Read:
    """One call of `read`. Its future counts as running from the start: a cancel() could not keep bytes from landing."""

    left: int
    future: Future[None] = field(default_factory=Future)
    error: DualPathError | None = None


class OrderedReader:
    """The order, the errors and the end of one reader's reads. After `close`, reads not yet begun end with CancelledError."""

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._lock = threading.Lock()
        self._reads: deque[_Read] = deque()  # in the order in which they must end
        self._settling = False
        self._closed = False
        self._ended = False

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._settle()

    def _check_range(self, first_layer: int, stop_layer: int) -> None:
        if not 0 <= first_layer < stop_layer <= self._layers:
            raise ValueError(f"layers [{first_layer}, {stop_layer}) are not within the block's {self._layers}")

    def _begin(self, parts: Sequence[Task], submit: Callable[[list[Task]], None]) -> Future[None]:
        """One read made of `parts`, each of which does its share or raises, on whatever threads `submit` gives them to."""
        read = _Read(len(parts))
        read.future.set_running_or_notify_cancel()
        with self._lock:
            if self._closed:
                read.future.set_exception(StoreError("this reader is closed"))
                return read.future
            self._reads.append(read)
        try:
            submit([lambda part=part: self._run(read, part) for part in parts])  # type: ignore[misc]
        except DualPathError as error:
            read.error, read.left = error, 0
        self._settle()
        return read.future

    def _run(self, read: _Read, part: Task) -> None:
        """One part, on a reading thread."""
        error: DualPathError | None = None
        if self._closed:
            error = CancelledError("the read was withdrawn")
        elif read.error is None:
            try:
                part()
            except DualPathError as raised:
                error = raised
            except Exception as unexpected:
                error = StoreError(f"reading blocks failed: {unexpected!r}")
        with self._lock:
            read.error = read.error or error
            read.left -= 1
        self._settle()

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
                    ended = self._closed and not self._reads and not self._ended
                    self._ended = self._ended or ended
                    break
                read = self._reads.popleft()
            if read.error is None:
                read.future.set_result(None)
            else:
                read.future.set_exception(read.error)
        if ended:
            self._on_end()

    def _on_end(self) -> None:
        """Called once, when the reader is closed and its last read has ended."""
