"""How busy the whole machine was during a run: all hosts of a testbed share it, with whatever else runs."""

from __future__ import annotations

import os
import time
from types import TracebackType
from typing import Any, Self

import psutil


class Machine:
    """Measures while it is entered."""

    def __enter__(self) -> Self:
        self._started, self._before = time.monotonic(), psutil.cpu_times()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._seconds, self._after = time.monotonic() - self._started, psutil.cpu_times()
        self._load = os.getloadavg()[0]

    def figures(self) -> dict[str, Any]:
        """`busy` is the share of all cores that did something; near 1, a run's times say as much about the machine as about the system."""
        idle = sum(getattr(self._after, name, 0.0) - getattr(self._before, name, 0.0) for name in ("idle", "iowait"))
        cores = os.cpu_count() or 1
        return {"cores": cores, "busy": 1 - idle / (self._seconds * cores), "load": self._load, "seconds": self._seconds}
