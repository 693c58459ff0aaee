"""The scheduler: routes for requests, the block index, the load view, and the health of everyone else.

All its state is soft. Processes register and push; after a restart it answers reports of those it does not know with an empty
name, whereupon they introduce themselves again, and one gateway sends the index. Decisions are `policies.core.SchedulerCore`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from actors.calls import ActorCalls
from actors.events import EventLog
from actors.messages import ModelFacts, Registration, Report, Submission, Welcome
from dualpath_ray.config import Settings
from dualpath_ray.errors import CancelledError, ConfigError, DeadlineExceededError, DualPathError, InvalidRequestError, OverloadedError
from dualpath_ray.kv.index import BlockIndex
from dualpath_ray.messages import ReadPart, Route
from dualpath_ray.telemetry import logs, tracing
from dualpath_ray.telemetry.metrics import Metrics
from policies.core import SchedulerCore
from policies.errors import Infeasible, PolicyError, QueueFull
from policies.vocabulary import Assignment, EngineLoad, RequestDemand

log = logging.getLogger(__name__)

TICK_S = 0.1
RECHECK_S = 1.0
REQUESTS_SHOWN = 100
UNCONFIRMED_S = 15.0  # an assigned request that its decode engine has not heard of for this long was lost with its client


@dataclass(slots=True)
class _Process:
    registration: Registration
    reported_at: float
    report: Report | None = None  # the last one
    next_check: float = 0.0  # when to look again after a missing report was looked into


@dataclass(slots=True)
class _Waiting:
    submission: Submission
    stored_blocks: int  # that the prompt begins with
    since: float
    route: asyncio.Future[Route]


@dataclass(slots=True)
class _Assigned:
    prefill_engine: str
    decode_engine: str
    since: float
    prompt_tokens: int
    hit_tokens: int
    confirmed: bool = False
    prefilled: bool = False


def attempt_name(request_id: str, epoch: int) -> str:
    """How an attempt of a request is called in reports and in the decision core, so that attempts are never mixed up."""
    return f"{request_id}/{epoch}"


class SchedulerActor:
    """One per cluster, under the name `actors.calls.SCHEDULER`."""

    def __init__(self, settings: Settings, namespace: str) -> None:
        logs.setup(settings.telemetry, "scheduler", "0")
        tracing.setup(settings.telemetry, "scheduler", "0")
        self._settings = settings
        self._name = uuid.uuid4().hex[:12]
        self._calls = ActorCalls(namespace)
        self._core = SchedulerCore(settings.scheduling)
        self._index = BlockIndex()
        self._index_sender = ""  # agent that has sent, or is sending, the whole index
        self._index_complete = False
        self._processes: dict[str, _Process] = {}
        self._facts: ModelFacts | None = None
        self._waiting: dict[str, _Waiting] = {}
        self._assigned: dict[str, _Assigned] = {}
        self._metrics = Metrics()
        self._events = EventLog()
        self._restarts = 0
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begin to watch over the others. Idempotent. Returns this incarnation's name."""
        if self._ticker is None:
            self._ticker = asyncio.get_running_loop().create_task(self._tick())
        return self._name

    # ---- processes

    async def register(self, registration: Registration) -> Welcome:
        """Take a process in, in place of an earlier incarnation of it, which is dead then. Raises ConfigError if its model is another."""
        await self.start()
        if self._facts is None:
            self._facts = registration.facts
        elif self._facts != registration.facts:
            raise ConfigError(
                f"{registration.engine_id} serves another model or KV geometry than the rest of the cluster: {registration.facts}"
            )
        known = self._processes.get(registration.engine_id)
        if known is not None and known.registration.peer.agent != registration.peer.agent:
            self._bury(known.registration)
        self._processes[registration.engine_id] = _Process(registration, time.monotonic())
        if known is None or known.registration.peer.agent != registration.peer.agent:
            self._events.note("joined", registration.engine_id, f"{registration.role or 'gateway'} of node {registration.node_id}")
        log.info("%s registered as %s", registration.engine_id, registration.peer.agent)
        agent = registration.peer.agent
        send_index = registration.role is None and not self._index_complete and self._index_sender in ("", agent)
        if send_index:  # also again: the sender may not have heard our answer, or could not read its storage
            self._index_sender = agent
        return Welcome(self._name, send_index)

    def _bury(self, dead: Registration) -> None:
        """An incarnation is known to be dead: nobody needs to wait for it, and what it served needs a new plan."""
        self._restarts += 1
        role = dead.role or "gateway"
        self._metrics.restarts.labels(role=role).inc()
        self._events.note("died", dead.engine_id, "its process ended; another one has taken its place")
        log.warning("%s (%s) has died", dead.engine_id, dead.peer.agent)
        self._forget_process(dead)

    def _forget_process(self, dead: Registration) -> None:
        """Nothing of an incarnation is left: what it served needs a new plan, and nobody needs to wait for it."""
        lost = self._core.remove_node(dead.node_id) if dead.role is None else self._core.remove_engine(dead.engine_id)
        for attempt in lost:
            self._assigned.pop(attempt, None)
        if dead.peer.agent == self._index_sender:
            self._index_sender, self._index_complete = "", False
        for process in self._processes.values():
            if process.registration.engine_id != dead.engine_id:
                self._calls.send(process.registration.actor_name, "peer_died", dead.peer.agent)

    async def report(self, report: Report) -> str:
        """Take a report. Returns this scheduler's name, or nothing if the sender must register first."""
        process = self._processes.get(report.engine_id)
        if process is None or process.registration.peer.agent != report.agent:
            return ""
        now = time.monotonic()
        process.reported_at, process.next_check, process.report = now, 0.0, report
        if report.removed:
            self._events.note("corrupt", report.engine_id, f"{len(report.removed)} blocks failed their checksum and are not used any more")
        self._index.add(report.added)
        self._index.remove(report.removed)
        self._index_complete |= report.index_complete
        for attempt in report.read:
            self._core.reads_done(attempt, process.registration.node_id)
        for attempt in report.prefilled:
            self._core.prefill_done(attempt)
            if attempt in self._assigned:
                self._assigned[attempt].prefilled = True
        for attempt in report.finished:
            self._core.finish(attempt)
            self._assigned.pop(attempt, None)
        if isinstance(report.load, EngineLoad):
            self._core.update_engine(replace(report.load, reported_at=now))  # clocks of hosts differ: a report counts from its arrival
            for attempt in report.active:
                if attempt in self._assigned:
                    self._assigned[attempt].confirmed = True
        else:
            self._core.update_node(replace(report.load, reported_at=now))
        self._decide()
        return self._name

    # ---- nodes that leave or change their role

    async def drain(self, node_id: str) -> None:
        """Give a node nothing new. What it serves goes on; `node_requests` says when that has ended."""
        self._core.drain_node(node_id)
        self._events.note("draining", node_id, "gets no new requests")

    async def resume(self, node_id: str) -> None:
        """End `drain`."""
        self._core.resume_node(node_id)
        self._events.note("resumed", node_id, "gets requests again")

    async def node_requests(self, node_id: str) -> int:
        """Requests that a node serves or takes part in."""
        return self._core.node_requests(node_id)

    async def retire(self, engine_ids: Sequence[str]) -> None:
        """Forget processes that have been ended on purpose. Unknown ones are ignored."""
        for engine_id in engine_ids:
            process = self._processes.pop(engine_id, None)
            if process is not None:
                self._events.note("left", engine_id, f"{process.registration.role or 'gateway'} of node {process.registration.node_id}")
                self._forget_process(process.registration)

    async def note(self, who: str, text: str) -> None:
        """Keep a sentence about scaling for the status."""
        self._events.note("scaling", who, text)

    # ---- requests

    async def describe(self) -> ModelFacts:
        """The served model. Raises OverloadedError while no engine has registered yet."""
        if self._facts is None:
            raise OverloadedError("no engine has started yet; try again in a moment")
        return self._facts

    async def assign(self, submission: Submission) -> Route:
        """A route for one attempt of a request, as soon as engines can take it. An earlier attempt is forgotten.

        Raises OverloadedError when the queue is full, InvalidRequestError when no engine can ever hold the request,
        DeadlineExceededError when none could in time.
        """
        facts = await self.describe()
        if submission.epoch:
            self._forget(attempt_name(submission.request_id, submission.epoch - 1))
        size = facts.geometry.block_tokens
        stored_blocks = self._index.longest_match(submission.keys)
        hit_blocks = min(stored_blocks, (submission.prompt_tokens - 1) // size)
        name = attempt_name(submission.request_id, submission.epoch)
        now = time.monotonic()
        demand = RequestDemand(
            request_id=name,
            prompt_tokens=submission.prompt_tokens,
            hit_blocks=hit_blocks,
            block_tokens=size,
            max_new_tokens=submission.max_new_tokens,
            arrived_at=now,
            deadline=now + submission.timeout_s,
            priority=submission.priority,
            tenant=submission.tenant,
            block_bytes=facts.geometry.full_block_bytes,
        )
        try:
            self._core.submit(demand)
        except QueueFull as error:
            self._metrics.decisions.labels(outcome="refused").inc()
            raise OverloadedError(str(error)) from None
        except Infeasible as error:
            self._metrics.decisions.labels(outcome="refused").inc()
            raise InvalidRequestError(str(error)) from None
        except PolicyError as error:
            raise InvalidRequestError(f"request id {submission.request_id!r} is in use: {error}") from None
        waiting = _Waiting(submission, stored_blocks, now, asyncio.get_running_loop().create_future())
        self._waiting[name] = waiting
        self._decide()
        if not waiting.route.done():
            self._metrics.decisions.labels(outcome="queued").inc()
        try:
            return await asyncio.wait_for(waiting.route, submission.timeout_s)
        except TimeoutError:
            raise DeadlineExceededError(
                f"no engines were free for request {submission.request_id} within {submission.timeout_s:.1f} s"
            ) from None
        except asyncio.CancelledError:
            raise CancelledError(f"request {submission.request_id} was cancelled while it waited for engines") from None
        finally:
            if self._waiting.pop(name, None) is not None:
                self._core.cancel(name)

    async def cancel(self, request_id: str, epoch: int) -> None:
        """The client gave up an attempt. What a decode engine already serves is cancelled there, not here."""
        waiting = self._waiting.get(attempt_name(request_id, epoch))
        if waiting is not None:
            waiting.route.cancel()

    def _forget(self, name: str) -> None:
        if name in self._waiting:
            self._waiting[name].route.cancel()
        self._core.cancel(name)
        self._assigned.pop(name, None)

    def _decide(self) -> None:
        start = time.perf_counter()
        assignments = self._core.decide(time.monotonic())
        if not assignments:
            return
        seconds = (time.perf_counter() - start) / len(assignments)
        for assignment in assignments:
            self._metrics.decision_seconds.observe(seconds)
            waiting = self._waiting.pop(assignment.request_id, None)
            if waiting is None or waiting.route.done():
                self._core.finish(assignment.request_id)
                continue
            self._metrics.decisions.labels(outcome="assigned").inc()
            now = time.monotonic()
            self._note_assigned(assignment, waiting, now)
            waiting.route.set_result(self._route(assignment, waiting, now))

    def _note_assigned(self, assignment: Assignment, waiting: _Waiting, now: float) -> None:
        assert self._facts is not None  # or nothing would have been submitted
        size = self._facts.geometry.block_tokens
        self._assigned[assignment.request_id] = _Assigned(
            assignment.prefill_engine, assignment.decode_engine, now, waiting.submission.prompt_tokens, assignment.read_plan.blocks * size
        )
        sides = {assignment.prefill_node: "prefill_node", assignment.decode_node: "decode_node"}
        for segment in assignment.read_plan.segments:
            side = sides.get(segment.node_id, "other_nodes")
            self._metrics.hit_tokens.labels(source=segment.source, side=side).inc(segment.blocks * size)
        loaded = assignment.read_plan.blocks
        self._metrics.hit_blocks.labels(decision="load").inc(loaded)
        self._metrics.hit_blocks.labels(decision="recompute").inc(waiting.stored_blocks - loaded)

    def _route(self, assignment: Assignment, waiting: _Waiting, now: float) -> Route:
        reads = tuple(ReadPart(segment.node_id, segment.first_block, segment.blocks) for segment in assignment.read_plan.segments)
        named = {assignment.prefill_engine, assignment.decode_engine, assignment.prefill_node, assignment.decode_node}
        named |= {part.node_id for part in reads}
        self._metrics.queue.observe(now - waiting.since)
        return Route(
            request_id=waiting.submission.request_id,
            epoch=waiting.submission.epoch,
            prefill_engine=assignment.prefill_engine,
            decode_engine=assignment.decode_engine,
            prefill_node=assignment.prefill_node,
            decode_node=assignment.decode_node,
            hit_blocks=assignment.read_plan.blocks,
            reads=reads,
            peers={name: self._processes[name].registration.peer for name in named},
            queued_s=now - waiting.since,
        )

    # ---- watching

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._core.expire(time.monotonic())
                self._drop_unconfirmed()
                await self._check_health()
                self._rebalance()
                self._decide()
            except Exception:
                log.exception("scheduler: housekeeping failed")

    def _drop_unconfirmed(self) -> None:
        oldest = time.monotonic() - UNCONFIRMED_S
        for name in [name for name, entry in self._assigned.items() if not entry.confirmed and entry.since < oldest]:
            self._events.note("lost", name, "its client went away between assignment and start")
            log.warning("request %s was assigned, but its decode engine never heard of it", name)
            self._forget(name)

    def _rebalance(self) -> None:
        """Ask engines that fell behind for what they have not begun. What they give back fails in a retryable way, so its client
        asks for another route.
        """
        if not self._settings.scheduling.rebalance:
            return
        for move in self._core.moves():
            request_id, _, epoch = move.request_id.rpartition("/")
            log.info("request %s is asked back from %s; %s would take it now", move.request_id, move.source, move.target)
            self._calls.send(self._processes[move.source].registration.actor_name, "give_back", request_id, int(epoch))

    async def _check_health(self) -> None:
        """Ray restarts an actor whose process ended, but never notices a hung one: its reports stop, so we end it.

        Only the incarnation that fell silent is ended. Another one that Ray has started in its place is left in peace while it loads its
        model, unless that takes longer than a start may.
        """
        cluster, now = self._settings.cluster, time.monotonic()
        for process in self._processes.values():
            name, silent = process.registration.actor_name, now - process.reported_at
            if silent < cluster.health_timeout_s or now < process.next_check:
                continue
            process.next_check = now + RECHECK_S
            try:
                replaced = self._calls.process_id(name) != process.registration.pid
                if replaced and silent < cluster.health_timeout_s + cluster.start_timeout_s:
                    continue
                self._events.note("hung", process.registration.engine_id, f"no report for {silent:.0f} s: its process is ended")
                log.error("%s has not reported for %.1f s: restarting it", process.registration.engine_id, silent)
                process.next_check = now + cluster.start_timeout_s
                self._calls.kill(name)
            except DualPathError as error:
                log.warning("%s has not reported for %.1f s: %s", process.registration.engine_id, silent, error)

    # ---- figures

    async def status(self) -> dict[str, Any]:
        """A JSON-like picture of the cluster, for `dualpath top`, the status page, scaling, tests and /health."""
        now = time.monotonic()
        return {
            "time": time.time(),
            "scheduler": self._name,
            "model": self._facts.served_name if self._facts else "",
            "queued": self._core.queued,
            "running": self._core.running,
            "blocked_on": self._core.blocked_on,
            "longest_wait_s": max((now - entry.since for entry in self._waiting.values()), default=0.0),
            "index_blocks": len(self._index),
            "restarts": self._restarts,
            "processes": {name: self._process_status(process, now) for name, process in self._processes.items()},
            "requests": self._request_status(now),
            "events": self._events.documents(),
        }

    def _process_status(self, process: _Process, now: float) -> dict[str, Any]:
        registration, report = process.registration, process.report
        return {
            "role": registration.role or "gateway",
            "node": registration.node_id,
            "draining": self._core.is_draining(registration.node_id),
            "agent": registration.peer.agent,
            "actor": registration.actor_name,
            "pid": registration.pid,
            "report_age_s": now - process.reported_at,
            "load": asdict(report.load) if report else {},
            "figures": dict(report.figures) if report else {},
        }

    def _request_status(self, now: float) -> list[dict[str, Any]]:
        """The oldest unfinished requests."""
        size = self._facts.geometry.block_tokens if self._facts else 1
        queued = [
            {
                "id": name,
                "phase": "queued",
                "age_s": now - entry.since,
                "prompt_tokens": entry.submission.prompt_tokens,
                "hit_tokens": entry.stored_blocks * size,
            }
            for name, entry in islice(self._waiting.items(), REQUESTS_SHOWN)
        ]
        assigned = [
            {
                "id": name,
                "phase": "decode" if entry.prefilled else "prefill",
                "age_s": now - entry.since,
                "prompt_tokens": entry.prompt_tokens,
                "hit_tokens": entry.hit_tokens,
                "prefill_engine": entry.prefill_engine,
                "decode_engine": entry.decode_engine,
            }
            for name, entry in islice(self._assigned.items(), REQUESTS_SHOWN)
        ]
        return (assigned + queued)[:REQUESTS_SHOWN]

    async def metrics(self) -> str:
        self._metrics.queued_requests.set(self._core.queued)
        self._metrics.index_blocks.set(len(self._index))
        now = time.monotonic()
        for name, process in self._processes.items():
            self._metrics.report_age.labels(reporter=name).set(now - process.reported_at)
        return self._metrics.render()

    async def process_id(self) -> int:
        return os.getpid()
