"""Waits for the moment at which some request is doing a given thing, by asking the processes what they do."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from actors.calls import SCHEDULER, ActorCalls
from dualpath_ray.errors import DualPathError

PHASE_TIMEOUT_S = 2.0
ASK_TIMEOUT_S = 1.0


class WatchedCalls(ActorCalls):
    """A client's calls; tells when a route has come from the scheduler, before the decode engine hears of it."""

    def __init__(self, namespace: str) -> None:
        super().__init__(namespace)
        self.assigned = asyncio.Event()

    async def call(self, name: str, method: str, *arguments: Any, timeout_s: float = 30.0) -> Any:
        answer = await super().call(name, method, *arguments, timeout_s=timeout_s)
        if name == SCHEDULER and method == "assign":
            self.assigned.set()
            await asyncio.sleep(0)  # whoever waits for this moment acts first
        return answer


async def reach(calls: WatchedCalls, phase: str, target: str, names: list[str]) -> bool:
    """Return when a request is in `phase`: one that `target` works on if it can tell, else any. False if none came there for a while."""
    deadline = time.monotonic() + PHASE_TIMEOUT_S
    if phase == "assigned":
        calls.assigned.clear()
        try:
            await asyncio.wait_for(calls.assigned.wait(), PHASE_TIMEOUT_S)
        except TimeoutError:
            return False
        return True
    asked = _who_knows(phase, names)
    asked = [name for name in asked if name == target] or asked
    while time.monotonic() < deadline:
        states = await asyncio.gather(*(_ask(calls, name) for name in asked))
        if any(_in_phase(state, phase) for state in states):
            return True
        await asyncio.sleep(0.002)
    return False


def _who_knows(phase: str, names: list[str]) -> list[str]:
    """Actors of gateways, or of decode engines."""
    if phase in ("reading", "persisting"):
        return [name for name in names if not name.startswith(("prefill-", "decode-"))]
    return [name for name in names if name.startswith("decode-")]


async def _ask(calls: ActorCalls, name: str) -> dict[str, Any]:
    actor = name if name.startswith(("prefill-", "decode-")) else f"gateway-{name}"
    try:
        state: dict[str, Any] = await calls.call(actor, "inspect", timeout_s=ASK_TIMEOUT_S)
        return state
    except DualPathError:
        return {}


def _in_phase(state: dict[str, Any], phase: str) -> bool:
    if phase == "reading":
        return bool(state.get("reading_tokens"))
    if phase == "persisting":
        return bool(state.get("persisting_blocks"))
    return bool(state.get("phases", {}).get(phase))
