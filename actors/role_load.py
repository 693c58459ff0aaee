"""How busy each role is, from pictures of the scheduler's status: what `policies/scaling.py` decides by."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from policies.scaling import RoleLoad
from policies.vocabulary import Role


class LoadWindow:
    """The last pictures since the last change of the cluster.

    Utilisation of prefill engines is the share of time in which they computed; of decode engines the larger share of their KV pool and of
    their batch that is taken (a decode engine computes without a pause from its first request on). The queue time of a role is the mean
    time that requests waited at its engines, plus what the head of the scheduler's queue has waited for lack of this role.
    """

    def __init__(self, looks: int, max_batch: int) -> None:
        self._looks, self._max_batch = looks, max_batch
        self._pictures: deque[Mapping[str, Any]] = deque(maxlen=looks + 1)

    def add(self, status: Mapping[str, Any]) -> None:
        self._pictures.append(status)

    def reset(self) -> None:
        self._pictures.clear()

    @property
    def full(self) -> bool:
        return len(self._pictures) > self._looks

    def load(self, role: Role, nodes: int) -> RoleLoad:
        """The role's load, to be shared by `nodes` nodes. `samples` is the number of intervals looked at."""
        samples = len(self._pictures) - 1
        if samples < 1:
            return RoleLoad(nodes, 0.0, 0.0, 0)
        utilisation = self._busy_share() if role == "prefill" else self._taken_share()
        return RoleLoad(nodes, utilisation, self._engine_queue_s(role) + self._scheduler_queue_s(role), samples)

    def _grown(self, role: Role, figure: str) -> list[float]:
        """By how much a counter of each engine grew over the window; engines that came or were restarted meanwhile are left out."""
        first, last = self._pictures[0]["processes"], self._pictures[-1]["processes"]
        return [
            process["figures"].get(figure, 0.0) - first[name]["figures"].get(figure, 0.0)
            for name, process in last.items()
            if process["role"] == role and not process["draining"] and name in first and first[name]["agent"] == process["agent"]
        ]

    def _busy_share(self) -> float:
        seconds = self._pictures[-1]["time"] - self._pictures[0]["time"]
        busy = self._grown("prefill", "busy_s")
        return min(1.0, sum(busy) / (len(busy) * seconds)) if busy and seconds > 0 else 0.0

    def _taken_share(self) -> float:
        shares = [
            max(
                1.0 - load["free_hbm_tokens"] / load["hbm_capacity_tokens"],
                min(1.0, process["figures"].get("decoding", 0) / self._max_batch),
            )
            for picture in self._pictures
            for process in picture["processes"].values()
            if process["role"] == "decode" and not process["draining"]
            if (load := process["load"]).get("hbm_capacity_tokens")
        ]
        return sum(shares) / len(shares) if shares else 0.0

    def _engine_queue_s(self, role: Role) -> float:
        return sum(self._grown(role, "queue_s")) / max(1.0, sum(self._grown(role, "requests")))

    def _scheduler_queue_s(self, role: Role) -> float:
        waits = [picture["longest_wait_s"] if picture["blocked_on"] == role else 0.0 for picture in self._pictures]
        return sum(waits) / len(waits)
