"""Bytes that passed each NIC in each direction, sampled through a run by a thread that sits in the switches' namespace."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from load_tests.testbed.errors import TestbedError
from load_tests.testbed.network import SWITCH, Network

CLONE_NEWNET = 0x40000000

Totals = dict[str, tuple[int, int]]
"""NIC (`p0-snic`) -> bytes received and sent by the host since the link exists."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Totals at `at` (time.monotonic(), which all namespaces share)."""

    at: float
    totals: Totals = field(default_factory=dict)


def read_totals(text: str) -> Totals:
    """Parse /proc/net/dev of the switches. What a switch port sends is what the host receives."""
    totals: Totals = {}
    for line in text.splitlines()[2:]:
        name, _, figures = line.partition(":")
        name = name.strip()
        if "-" in name and not name.startswith("br-"):
            columns = figures.split()
            totals[name] = (int(columns[8]), int(columns[0]))
    return totals


class NicCounters:
    """Samples while it is entered. `samples` may be read at any time."""

    def __init__(self, network: Network, interval_s: float = 0.25) -> None:
        self.samples: list[Sample] = []
        self._path = f"/var/run/netns/{network.namespace(SWITCH)}"
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="nic-counters", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._failure is not None and kind is None:
            raise TestbedError(f"NIC counters: {self._failure}")

    def _run(self) -> None:
        """Only this thread changes its namespace; it ends with the thread."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                if ctypes.CDLL(None, use_errno=True).setns(fd, CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            finally:
                os.close(fd)
            while not self._stop.is_set():
                with open("/proc/thread-self/net/dev") as file:
                    self.samples.append(Sample(time.monotonic(), read_totals(file.read())))
                self._stop.wait(self._interval_s)
        except Exception as error:
            self._failure = error

    def between(self, start: float, end: float) -> list[Sample]:
        """The samples of a time span, with one before and one after it."""
        inside = [i for i, sample in enumerate(self.samples) if start <= sample.at <= end]
        if not inside:
            return []
        return self.samples[max(0, inside[0] - 1) : inside[-1] + 2]
