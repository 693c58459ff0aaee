"""Counters that several threads add to."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Counters:
    """Named sums since start. `busy(name)` counts seconds during which at least one thread is inside, not the sum over threads."""

    def __init__(self, *names: str) -> None:
        self._lock = threading.Lock()
        self._values: defaultdict[str, float] = defaultdict(float, dict.fromkeys(names, 0.0))
        self._inside: dict[str, tuple[int, float]] = {}

    def add(self, name: str, value: float = 1.0) -> None:
        with self._lock:
            self._values[name] += value

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        with self._lock:
            count, since = self._inside.get(name, (0, 0.0))
            self._inside[name] = (count + 1, since if count else time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                count, since = self._inside[name]
                self._inside[name] = (count - 1, since)
                if count == 1:
                    self._values[name] += time.monotonic() - since

    def snapshot(self) -> dict[str, float]:
        with self._lock:
            now = time.monotonic()
            running = {name: now - since for name, (count, since) in self._inside.items() if count}
            return {name: value + running.get(name, 0.0) for name, value in self._values.items()}
