"""Nothing may be left over: what every process holds when no request is under way, and what the machine holds of processes that ended."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from actors.client import ClusterClient
from dualpath_ray.errors import DualPathError

IDLE_TIMEOUT_S = 45.0
RSS_GROWTH_BYTES = 128 << 20  # of one process between its first and its last rest: allocators keep some
FD_GROWTH = 64  # connections to peers come and go; a leak per request or per fault is hundreds


@dataclass(slots=True)
class Books:
    """Remembers every process's first rest, so that growth shows."""

    first: dict[int, tuple[int, int]] = field(default_factory=dict)  # pid -> resident bytes, open files
    rss_growth: int = 0
    fd_growth: int = 0
    rests: int = 0

    async def check(self, client: ClusterClient, ended: set[tuple[int, float]]) -> list[str]:
        """The load has paused: wait until all is idle, then say what is left that should not be."""
        self.rests += 1
        try:
            states, processes = await self._at_rest(client)
        except TimeoutError as error:
            return [str(error)]
        leaks: list[str] = []
        for name, state in states.items():
            for free, total, what in (("free_slots", "total_slots", "staging slots"), ("free_tokens", "pool_tokens", "pool tokens")):
                if free in state and state[free] != state[total]:
                    leaks.append(f"{name}: {state[total] - state[free]} {what} are not free")
            if state.get("store", {}).get("open_files"):
                leaks.append(f"{name}: {state['store']['open_files']:.0f} files of the store are open")
            leaks += self._growth(name, processes[name]["pid"])
        leaks += [f"process {pid} should have ended" for pid, created in ended if _runs(pid, created)]
        return leaks

    async def _at_rest(self, client: ClusterClient) -> tuple[dict[str, Any], dict[str, Any]]:
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        reason = ""
        while time.monotonic() < deadline:
            try:
                status, states = await client.status(), await client.inspect()
            except DualPathError as error:
                reason = str(error)
            else:
                busy = [
                    f"{name} ({ {k: v for k, v in state.items() if k != 'store'} })" for name, state in states.items() if not state["idle"]
                ]
                if not busy and not status["running"] and not status["queued"]:
                    return states, status["processes"]
                reason = f"scheduler: {status['running']} running, {status['queued']} queued; not idle: {'; '.join(busy)}"
            await asyncio.sleep(0.1)
        raise TimeoutError(f"not at rest {IDLE_TIMEOUT_S:.0f} s after the last request: {reason}")

    def _growth(self, name: str, pid: int) -> list[str]:
        try:
            process = psutil.Process(pid)
            now = process.memory_info().rss, process.num_fds()
        except psutil.NoSuchProcess:
            return []
        first = self.first.setdefault(pid, now)
        rss, fds = now[0] - first[0], now[1] - first[1]
        self.rss_growth, self.fd_growth = max(self.rss_growth, rss), max(self.fd_growth, fds)
        leaks = []
        if rss > RSS_GROWTH_BYTES:
            leaks.append(f"{name}: resident memory grew by {rss >> 20} MiB")
        if fds > FD_GROWTH:
            leaks.append(f"{name}: {fds} more open file descriptors than before")
        return leaks


def _runs(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
