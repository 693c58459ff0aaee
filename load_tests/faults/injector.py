"""Breaks things, repairs them, and notes when the cluster had them back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import ray
from ray._private import state as ray_state

from actors.calls import SCHEDULER
from actors.client import ClusterClient
from dualpath_ray.errors import DualPathError
from load_tests.faults.faults import Fault, chain
from load_tests.faults.hosts import Hosts
from load_tests.faults.load import Load
from load_tests.faults.throughput import RECOVERED, WINDOW_S
from load_tests.faults.watch import WatchedCalls, reach
from load_tests.testbed.errors import TestbedError

BACK_TIMEOUT_S = 120.0
RECOVERY_TIMEOUT_S = 20.0
FLAPS, FLAP_S = 5, 0.12

Repair = Callable[[], Awaitable[None]]


@dataclass(slots=True)
class Outcome:
    """One fault as it went. Times are time.monotonic(); `restart_s` is from the fault to the new process's registration (of the storage
    server: to a PUT that works), `own_s` the part of it that the new process itself took to come up."""

    fault: Fault
    aimed: bool = True  # a request was seen in the wanted phase
    at: float = 0.0
    repaired: float = 0.0
    restart_s: float | None = None
    own_s: float | None = None
    recovery_s: float | None = None  # of the round: from its last repair until the tokens flow as before
    trouble: list[str] = field(default_factory=list)


class Injector:
    """`hosts` is None on one machine, `address` where no HTTP service runs."""

    def __init__(
        self, calls: WatchedCalls, client: ClusterClient, load: Load, hosts: Hosts | None = None, address: str | None = None
    ) -> None:
        self._calls, self._client, self._load, self._hosts, self._address = calls, client, load, hosts, address
        self._known: dict[str, Any] = {}
        self._gone: set[str] = set()  # processes that are killed in this round
        self._agents: dict[str, str] = {}  # incarnations at its beginning
        self.unexplained: list[str] = []
        self._scheduler = 0
        self.ended: set[tuple[int, float]] = set()  # processes that must be gone: pid and creation time

    async def round(self, faults: tuple[Fault, ...]) -> list[Outcome]:
        """`inject`, then wait until the tokens flow again."""
        outcomes = await self.inject(faults)
        await self._recovered(outcomes)
        return outcomes

    async def inject(self, faults: tuple[Fault, ...]) -> list[Outcome]:
        """Inject chains of them side by side, each fault at its moment; return when all are repaired."""
        status = await self._complete()
        self._known = status["processes"]
        self._scheduler = status["pid"]
        outcomes = [Outcome(fault) for fault in faults]
        pids = {pid for fault in faults if fault.kind == "kill_node" for pid in self._network.pids(fault.target)}
        named = {fault.target for fault in faults if fault.kind in ("kill", "hang_for_good")}
        self._agents = {name: process["agent"] for name, process in self._known.items()}
        self._gone = {name for name, process in self._known.items() if process["pid"] in pids or name in named}
        chains: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            chains.setdefault(chain(outcome.fault), []).append(outcome)
        await asyncio.gather(*(self._in_turn(links) for links in chains.values()))
        return outcomes

    async def _in_turn(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            await self._inject(outcome)

    async def _complete(self) -> dict[str, Any]:
        """The scheduler's picture, when every process that was ever there is in it. Notes restarts that no fault of ours explains."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while True:
            status = await self._status()
            processes = status["processes"]
            if set(processes) >= set(self._known):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{', '.join(set(self._known) - set(processes))} did not come back within {BACK_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.2)
        for name, process in processes.items():
            if name in self._agents and name not in self._gone and self._agents[name] != process["agent"]:
                self.unexplained.append(f"{name} was restarted though nobody killed it")
        return status

    async def _status(self) -> dict[str, Any]:
        """The scheduler's picture, as soon as it gives one."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while True:
            try:
                status: dict[str, Any] = await self._calls.call(SCHEDULER, "status", timeout_s=2.0)
                return status
            except DualPathError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.05)

    async def _inject(self, outcome: Outcome) -> None:
        fault = outcome.fault
        if fault.phase:
            outcome.aimed = await reach(self._calls, fault.phase, fault.target, list(self._known))
        outcome.at = time.monotonic()
        repair = await getattr(self, f"_{fault.kind}")(outcome)
        await asyncio.sleep(fault.hold_s)
        try:
            await repair()
        except (TimeoutError, DualPathError, TestbedError) as error:
            outcome.trouble.append(f"{fault} was not repaired: {error or type(error).__name__}")
        outcome.repaired = time.monotonic()

    async def _recovered(self, outcomes: list[Outcome]) -> None:
        repaired = max(outcome.repaired for outcome in outcomes)
        while True:
            now = time.monotonic()
            seconds = self._load.throughput.recovered_after(repaired, now)
            if seconds is not None:
                break
            if now - repaired > RECOVERY_TIMEOUT_S + WINDOW_S:
                outcomes[-1].trouble.append(f"{RECOVERY_TIMEOUT_S:.0f} s after repair still below {RECOVERED:.0%} of the calm rate")
                break
            await asyncio.sleep(0.1)
        for outcome in outcomes:
            outcome.recovery_s = seconds

    # ---- processes

    async def _kill(self, outcome: Outcome) -> Repair:
        process = self._known[outcome.fault.target]
        self._end(process["pid"])
        return lambda: self._back(outcome, {outcome.fault.target: process["agent"]})

    async def _kill_scheduler(self, outcome: Outcome) -> Repair:
        self._end(self._scheduler)
        return lambda: self._all_back(outcome)

    async def _hang(self, outcome: Outcome) -> Repair:
        """Shorter than cluster.health_timeout_s: nobody ends the process."""
        pid = self._known[outcome.fault.target]["pid"]
        _signal(pid, signal.SIGSTOP)

        async def wake() -> None:
            _signal(pid, signal.SIGCONT)

        return wake

    async def _hang_for_good(self, outcome: Outcome) -> Repair:
        process = self._known[outcome.fault.target]
        self._note_end(process["pid"])
        _signal(process["pid"], signal.SIGSTOP)
        return lambda: self._back(outcome, {outcome.fault.target: process["agent"]})

    async def _kill_http(self, outcome: Outcome) -> Repair:
        for pid in http_replicas():
            self._end(pid)
        return self._http_answers

    def _end(self, pid: int) -> None:
        self._note_end(pid)
        _signal(pid, signal.SIGKILL)

    def _note_end(self, pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.ended.add((pid, psutil.Process(pid).create_time()))

    async def _back(self, outcome: Outcome, before: dict[str, str]) -> None:
        """Wait until every process named in `before` has registered as another incarnation."""
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while True:
            processes = (await self._status())["processes"]
            if all(name in processes and processes[name]["agent"] != agent for name, agent in before.items()):
                if before:
                    outcome.restart_s = time.monotonic() - outcome.at
                    outcome.own_s = max(processes[name]["start_s"] for name in before)
                return
            if time.monotonic() > deadline:
                missing = [name for name, agent in before.items() if processes.get(name, {}).get("agent", agent) == agent]
                raise TimeoutError(f"{', '.join(missing)} did not come back within {BACK_TIMEOUT_S:.0f} s")
            await asyncio.sleep(0.1)

    async def _all_back(self, outcome: Outcome) -> None:
        """Wait until a new scheduler knows all processes but those that are killed in the same round."""
        expected = set(self._known) - self._gone
        deadline = time.monotonic() + BACK_TIMEOUT_S
        while True:
            status = await self._status()
            if status["pid"] != self._scheduler and set(status["processes"]) >= expected:
                outcome.restart_s = time.monotonic() - outcome.at
                return
            if time.monotonic() > deadline:
                raise TimeoutError("the new scheduler does not know all processes")
            await asyncio.sleep(0.1)

    async def _http_answers(self) -> None:
        assert self._address is not None
        deadline = time.monotonic() + BACK_TIMEOUT_S
        async with httpx.AsyncClient(base_url=self._address, timeout=5.0) as http:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await http.get("/v1/models")).status_code == 200:
                        return
                if time.monotonic() > deadline:
                    raise TimeoutError("the HTTP service did not come back")
                await asyncio.sleep(0.2)

    # ---- hosts, links and the store

    @property
    def _network(self) -> Hosts:
        assert self._hosts is not None
        return self._hosts

    async def _kill_node(self, outcome: Outcome) -> Repair:
        host = outcome.fault.target
        pids = set(self._network.pids(host))
        before = {name: process["agent"] for name, process in self._known.items() if process["pid"] in pids}
        for pid in pids:
            self._note_end(pid)
        await asyncio.to_thread(self._network.kill, host)

        async def start_again() -> None:
            await asyncio.to_thread(self._network.start_node, host)
            await self._back(outcome, before)

        return start_again

    async def _kill_store(self, outcome: Outcome) -> Repair:
        await asyncio.to_thread(self._network.kill_store)

        async def start_again() -> None:
            await asyncio.to_thread(self._network.start_store)
            outcome.restart_s = time.monotonic() - outcome.at

        return start_again

    async def _cut(self, outcome: Outcome) -> Repair:
        link = outcome.fault.target
        await asyncio.to_thread(self._network.cut, link)
        return lambda: asyncio.to_thread(self._network.heal, link)

    async def _slow(self, outcome: Outcome) -> Repair:
        link = outcome.fault.target
        await asyncio.to_thread(self._network.slow, link)
        return lambda: asyncio.to_thread(self._network.full_speed, link)

    async def _flap(self, outcome: Outcome) -> Repair:
        link = outcome.fault.target
        for _ in range(FLAPS):
            await asyncio.to_thread(self._network.cut, link)
            await asyncio.sleep(FLAP_S)
            await asyncio.to_thread(self._network.heal, link)
            await asyncio.sleep(FLAP_S)
        return _nothing

    async def _store_errors(self, outcome: Outcome) -> Repair:
        return self._store("errors")

    async def _store_garbage(self, outcome: Outcome) -> Repair:
        return self._store("garbage")

    async def _store_silence(self, outcome: Outcome) -> Repair:
        return self._store("silence")

    def _store(self, mode: str) -> Repair:
        self._network.store_mode(mode)

        async def honest() -> None:
            self._network.store_mode("honest")

        return honest

    async def _vanish(self, outcome: Outcome) -> Repair:
        self._load.vanish()
        return _nothing


async def _nothing() -> None:
    return


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def http_replicas() -> list[int]:
    """Processes of the HTTP application's replicas."""
    assert ray.is_initialized()
    actors: dict[str, Any] = ray_state.actors()  # Ray's public call for this needs the dashboard
    return [a["Pid"] for a in actors.values() if a["State"] == "ALIVE" and "ServeReplica" in a["ActorClassName"] and "Http" in a["Name"]]
