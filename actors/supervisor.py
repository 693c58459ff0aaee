"""Who lives, who hangs, who is dead: the scheduler's knowledge of the cluster's processes (docs/faults.md).

Memory that a process may write to is reused only when that process is known to be dead, so a verdict must never be wrong: a process that
cannot be reached may live and write. The verdict is Ray's, plus time:

- A process whose reports have stopped is looked up in Ray's actor table. While the table has the same process there, it may be hung:
  after `cluster.health_timeout_s` it is killed, and the table decides.
- If the table has another process or none, this one is over. Ray says so when the raylet of its node saw it end (then it has ended) or when
  the whole node is lost. A lost node may only be cut off, its processes alive: its raylet ends itself and them when it has not reached the
  head for a while, so the verdict waits for `cluster.node_fence_s`.
- Bytes that it had handed to the network may still arrive: another `transfer.late_write_s`.

Requests need not wait for the verdict: they get a new plan when the process is *over*. What is known is also kept in Ray's key-value store:
an incarnation that dies while there is no scheduler is nobody else's to bury.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from actors.calls import ActorCalls
from actors.events import Kind
from actors.messages import Registration, Report
from dualpath_ray.background import Background
from dualpath_ray.config import Settings
from dualpath_ray.errors import DualPathError

log = logging.getLogger(__name__)

SUSPECT_S = 1.0  # silence after which Ray is asked
MISSED_REPORTS = 5  # the same, in report intervals
REPORT_PAUSE_S = 0.005  # for each process, between two reports of one: a report takes 1 ms, and all of them a fifth of the scheduler's time
RECHECK_S = 0.5


@dataclass(slots=True)
class Incarnation:
    """One process. `over_since`: since when Ray has another one, or none, in its place."""

    registration: Registration
    heard_at: float
    report: Report | None = None  # the last one
    next_check: float = 0.0
    over_since: float | None = None

    @property
    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at


@dataclass(slots=True)
class _Vacancy:
    """A name whose process is over: Ray starts another one."""

    actor_name: str
    since: float


@dataclass(slots=True)
class Supervisor:
    """Used on the scheduler's event loop. `on_over(registration)` is called once for each incarnation that is over.

    `note(kind, who, text)` hears what operators should know.
    """

    calls: ActorCalls
    settings: Settings
    on_over: Callable[[Registration], None]
    note: Callable[[Kind, str, str], None]
    current: dict[str, Incarnation] = field(default_factory=dict)  # by engine id
    _past: dict[str, Incarnation] = field(default_factory=dict)  # over, or known from an earlier scheduler; by agent
    _vacant: dict[str, _Vacancy] = field(default_factory=dict)
    _leaving: set[str] = field(default_factory=set)  # engine ids
    _telling: Background = field(default_factory=lambda: Background("supervisor"))

    # ---- what processes tell

    async def recall(self) -> None:
        """Take over what an earlier scheduler knew."""
        for value in await self.calls.recall():
            registration: Registration = pickle.loads(value)
            agent = registration.peer.agent
            if agent not in self._past and self._current(registration.engine_id, agent) is None:
                self._past[agent] = Incarnation(registration, time.monotonic())

    async def admit(self, registration: Registration) -> bool:
        """Take a process in, in place of an earlier incarnation of it. False if it has been given up and must end."""
        engine_id, agent = registration.engine_id, registration.peer.agent
        earlier = self._past.get(agent)
        if earlier is not None and earlier.over_since is not None:
            return False
        await self.calls.remember(agent, pickle.dumps(registration))
        self._past.pop(agent, None)
        self._vacant.pop(engine_id, None)
        known = self.current.get(engine_id)
        self.current[engine_id] = Incarnation(registration, time.monotonic())
        if known is not None and known.registration.peer.agent != agent:
            self._end(known)
        return True

    def hear(self, report: Report) -> Registration | None:
        """A report has come. Returns who its sender is, if that is known."""
        incarnation = self._current(report.engine_id, report.agent)
        if incarnation is None:
            return None
        incarnation.heard_at, incarnation.next_check, incarnation.report = time.monotonic(), 0.0, report
        return incarnation.registration

    def leaves(self, engine_id: str) -> None:
        """A process is about to be ended on purpose: until it is retired, its silence is no death."""
        self._leaving.add(engine_id)

    def retire(self, engine_id: str) -> Registration | None:
        """A process was ended on purpose; others are told when Ray says that it has ended. Returns who it was, if that is known."""
        self._leaving.discard(engine_id)
        self._vacant.pop(engine_id, None)
        incarnation = self.current.pop(engine_id, None)
        if incarnation is None:
            return None
        self._past[incarnation.registration.peer.agent] = incarnation
        return incarnation.registration

    def _current(self, engine_id: str, agent: str) -> Incarnation | None:
        incarnation = self.current.get(engine_id)
        return incarnation if incarnation is not None and incarnation.registration.peer.agent == agent else None

    def _lives(self, registration: Registration) -> bool:
        """As far as is known."""
        agent = registration.peer.agent
        incarnation = self._current(registration.engine_id, agent) or self._past.get(agent)
        return incarnation is not None and incarnation.over_since is None

    @property
    def report_pause_s(self) -> float:
        """How long a process may wait between two reports; short enough that one that is late is not left out."""
        return min(REPORT_PAUSE_S * len(self.current), self.settings.scheduling.report_timeout_s / 4)

    @property
    def lost(self) -> tuple[str, ...]:
        """Names without a process."""
        return tuple(self._vacant)

    # ---- looking after them

    async def look_around(self) -> None:
        """To be called several times a second."""
        for incarnation in [*self.current.values(), *self._past.values()]:
            if incarnation.over_since is None:
                await self._doubt(incarnation)
        await self._hasten()
        await self._declare([incarnation for incarnation in self._past.values() if incarnation.over_since is not None])

    async def suspect(self, actor_name: str) -> None:
        """Somebody got no answer: look now, however lately it has reported."""
        for incarnation in list(self.current.values()):
            if incarnation.registration.actor_name == actor_name:
                await self._doubt(incarnation, suspect_s=0.0)

    async def _doubt(self, incarnation: Incarnation, suspect_s: float | None = None) -> None:
        """Ask Ray about a process that has fallen silent."""
        if suspect_s is None:
            suspect_s = max(SUSPECT_S, MISSED_REPORTS * max(self.settings.scheduling.report_interval_s, self.report_pause_s))
        registration = incarnation.registration
        if registration.engine_id in self._leaving or incarnation.silent_s < suspect_s or time.monotonic() < incarnation.next_check:
            return
        incarnation.next_check = time.monotonic() + RECHECK_S
        try:
            process = await self.calls.process(registration.actor_name)
        except DualPathError as error:
            log.warning("%s has not reported for %.1f s: %s", registration.engine_id, incarnation.silent_s, error)
            return
        if incarnation.silent_s < suspect_s or incarnation.over_since is not None:
            return  # it was heard from, or replaced, meanwhile
        if process == (registration.pid, registration.ray_node):
            if incarnation.silent_s >= self.settings.cluster.health_timeout_s:
                log.error("%s has not reported for %.1f s: restarting it", registration.engine_id, incarnation.silent_s)
                self.note("hung", registration.engine_id, f"no report for {incarnation.silent_s:.0f} s: its process is ended")
                incarnation.next_check = time.monotonic() + self.settings.cluster.health_timeout_s
                self._kill(registration.actor_name)
            return
        if self.current.get(registration.engine_id) is incarnation:
            del self.current[registration.engine_id]
            self._vacant[registration.engine_id] = _Vacancy(registration.actor_name, time.monotonic())
        self._end(incarnation)

    def _end(self, incarnation: Incarnation) -> None:
        registration = incarnation.registration
        log.warning("%s (%s) is over", registration.engine_id, registration.peer.agent)
        incarnation.over_since = time.monotonic()
        served = registration.peer.agent not in self._past  # who was retired, or comes from an earlier scheduler, serves nothing of ours
        self._past[registration.peer.agent] = incarnation
        if served:
            self.on_over(registration)

    async def _hasten(self) -> None:
        """A replacement that does not come up in the time that a start may take is killed, so that Ray tries again."""
        limit_s = self.settings.cluster.health_timeout_s + self.settings.cluster.start_timeout_s
        for engine_id, vacancy in list(self._vacant.items()):
            if time.monotonic() - vacancy.since > limit_s:
                vacancy.since = time.monotonic()
                log.error("%s has not come back for %.0f s: restarting it", engine_id, limit_s)
                self._kill(vacancy.actor_name)

    def _kill(self, actor_name: str) -> None:
        try:
            self.calls.kill(actor_name)
        except DualPathError as error:
            log.warning("%s cannot be restarted: %s", actor_name, error)

    # ---- verdicts

    async def _declare(self, over: list[Incarnation]) -> None:
        """Tell everyone of those that are certainly dead by now."""
        late_s, fence_s = self.settings.transfer.late_write_s, self.settings.cluster.node_fence_s
        due = [incarnation for incarnation in over if time.monotonic() >= (incarnation.over_since or 0.0) + late_s]
        if not due:
            return
        try:
            living = await self.calls.living_nodes()
        except DualPathError as error:
            log.warning("Ray's nodes cannot be listed: %s", error)
            return
        for incarnation in due:
            registration = incarnation.registration
            on_living_node = registration.ray_node in living
            if on_living_node or time.monotonic() >= (incarnation.over_since or 0.0) + fence_s + late_s:
                del self._past[registration.peer.agent]
                # Also those that have not introduced themselves yet since the scheduler was restarted.
                known = [*self.current.values(), *self._past.values()]
                self._telling.spawn(self._tell(registration, [other.registration for other in known if other.over_since is None]))

    async def _tell(self, dead: Registration, others: Iterable[Registration]) -> None:
        """Everyone that lives hears of it; who came later never knew the dead one."""
        await asyncio.gather(*(self._tell_one(dead.peer.agent, other) for other in others))
        await self.calls.forget(dead.peer.agent)

    async def _tell_one(self, agent: str, other: Registration) -> None:
        while self._lives(other):
            try:
                await self.calls.call(other.actor_name, "peer_died", agent)
                return
            except DualPathError as error:
                log.debug("%s has not heard that %s died: %s", other.engine_id, agent, error)
                await asyncio.sleep(RECHECK_S)
