"""The scheduler: routes for requests, the block index, the load view, and the health of everyone else.

All its state is soft (but for who has registered: `actors.supervisor`). Processes register and push; after a restart it answers reports of
those it does not know with an empty name, whereupon they introduce themselves again, and one gateway sends the index. Decisions are
`policies.core.SchedulerCore`'s.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.calls import ActorCalls
from actors.client_metrics import ClientMetrics
from actors.events import EventLog
from actors.messages import Heard, ModelFacts, Registration, Report, Submission, Welcome, attempt_name
from actors.status import AssignedRequest, WaitingRequest, process_status, request_status
from actors.supervisor import Supervisor
from dualpath_ray.config import Settings
from dualpath_ray.errors import CancelledError, ConfigError, DeadlineExceededError, InvalidRequestError, OverloadedError
from dualpath_ray.kv.index import BlockIndex
from dualpath_ray.kv.residency import Residency
from dualpath_ray.messages import ReadPart, Route
from dualpath_ray.telemetry import logs, tracing
from dualpath_ray.telemetry.metrics import Metrics
from policies.core import SchedulerCore
from policies.errors import Infeasible, PolicyError, QueueFull
from policies.vocabulary import Assignment, EngineLoad, NodeLoad, RequestDemand

log = logging.getLogger(__name__)

TICK_S = 0.1
UNCONFIRMED_S = 15.0  # an assigned request that its decode engine has not heard of for this long was lost with its client


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
        self._residency = Residency()
        self._index_sender = ""  # agent that has sent, or is sending, the whole index
        self._index_complete = False
        self._events = EventLog()
        self._supervisor = Supervisor(self._calls, settings, self._over, self._events.note)
        self._facts: ModelFacts | None = None
        self._waiting: dict[str, WaitingRequest] = {}
        self._assigned: dict[str, AssignedRequest] = {}
        self._metrics = Metrics()
        self._clients = ClientMetrics()
        self._restarts = 0
        self._starting = asyncio.Lock()
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Begin to watch over the others. Idempotent. Returns this incarnation's name."""
        async with self._starting:
            if self._ticker is None:
                await self._supervisor.recall()
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
        known = self._supervisor.current.get(registration.engine_id)
        if not await self._supervisor.admit(registration):
            return Welcome(self._name, os.getpid(), given_up=True)
        if known is None or known.registration.peer.agent != registration.peer.agent:
            self._events.note("joined", registration.engine_id, f"{registration.role or 'gateway'} of node {registration.node_id}")
        if registration.role is None:
            self._residency.drop_node(registration.node_id)  # it tells us all it has
        log.info("%s registered as %s", registration.engine_id, registration.peer.agent)
        agent = registration.peer.agent
        send_index = registration.role is None and not self._index_complete and self._index_sender in ("", agent)
        if send_index:  # also again: the sender may not have heard our answer, or could not read its storage
            self._index_sender = agent
        return Welcome(self._name, os.getpid(), send_index)

    def _over(self, over: Registration) -> None:
        """An incarnation is over: what it served needs a new plan."""
        self._restarts += 1
        self._metrics.restarts.labels(role=over.role or "gateway").inc()
        self._events.note("died", over.engine_id, "its process ended, or its node is lost; another one takes its place")
        self._forget_process(over)
        if over.role is None:  # prefill engines wait for its streams
            for other in self._supervisor.current.values():
                if other.registration.role == "prefill":
                    self._calls.send(other.registration.actor_name, "peer_lost", over.peer.agent)

    def _forget_process(self, over: Registration) -> None:
        """Nothing is accounted to an incarnation any more."""
        if over.role is None:
            self._residency.drop_node(over.node_id)
        lost = self._core.remove_node(over.node_id) if over.role is None else self._core.remove_engine(over.engine_id)
        for attempt in lost:
            self._assigned.pop(attempt, None)
        if over.peer.agent == self._index_sender:
            self._index_sender, self._index_complete = "", False

    async def report(self, report: Report) -> Heard:
        """Take a report."""
        sender = self._supervisor.hear(report)
        if sender is None:
            return Heard("")
        now = time.monotonic()
        if report.removed:
            self._events.note("corrupt", report.engine_id, f"{len(report.removed)} blocks failed their checksum and are not used any more")
        self._index.add(report.added)
        self._index.remove(report.removed)
        self._index_complete |= report.index_complete
        if isinstance(report.load, NodeLoad):
            self._residency.update(sender.node_id, report.came, report.gone)
        for attempt in report.read:
            self._core.reads_done(attempt, sender.node_id)
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
        return Heard(self._name, self._supervisor.report_pause_s)

    # ---- nodes that leave or change their role

    async def drain(self, node_id: str) -> int:
        """Give a node nothing new. What it serves goes on. Returns how many requests that still are; ask again until it is 0."""
        if not self._core.is_draining(node_id):
            self._core.drain_node(node_id)
            self._events.note("draining", node_id, "gets no new requests")
        return self._core.node_requests(node_id)

    async def resume(self, node_id: str) -> None:
        """End `drain`."""
        self._core.resume_node(node_id)
        self._events.note("resumed", node_id, "gets requests again")

    async def leave(self, engine_ids: Sequence[str]) -> None:
        """These processes are about to be ended on purpose; `retire` follows."""
        for engine_id in engine_ids:
            self._supervisor.leaves(engine_id)

    async def retire(self, engine_ids: Sequence[str]) -> None:
        """Forget processes that have been ended on purpose. Unknown ones are ignored."""
        for engine_id in engine_ids:
            retired = self._supervisor.retire(engine_id)
            if retired is not None:
                self._events.note("left", engine_id, f"{retired.role or 'gateway'} of node {retired.node_id}")
                self._forget_process(retired)

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
        with logs.request(submission.request_id), tracing.span("scheduler.assign", submission.trace, epoch=submission.epoch) as span:
            route = await self._assign(submission)
            span.set(
                queued_s=route.queued_s,
                hit_blocks=route.hit_blocks,
                reads=[f"{part.node_id}:{part.blocks}" for part in route.reads],
                prefill_engine=route.prefill_engine,
                decode_engine=route.decode_engine,
            )
            return route

    async def _assign(self, submission: Submission) -> Route:
        facts = await self.describe()
        if submission.epoch:
            self._forget(attempt_name(submission.request_id, submission.epoch - 1))
        if submission.suspect:
            await self._supervisor.suspect(submission.suspect)
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
            resident=self._residency.positions(submission.keys[:hit_blocks]) if self._settings.scheduling.use_resident else {},
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
        waiting = WaitingRequest(submission, stored_blocks, now, asyncio.get_running_loop().create_future())
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

    def _note_assigned(self, assignment: Assignment, waiting: WaitingRequest, now: float) -> None:
        assert self._facts is not None  # or nothing would have been submitted
        size = self._facts.geometry.block_tokens
        self._assigned[assignment.request_id] = AssignedRequest(
            assignment.prefill_engine, assignment.decode_engine, now, waiting.submission.prompt_tokens, assignment.read_plan.blocks * size
        )
        sides = {assignment.prefill_node: "prefill_node", assignment.decode_node: "decode_node"}
        for segment in assignment.read_plan.segments:
            side = sides.get(segment.node_id, "other_nodes")
            self._metrics.hit_tokens.labels(source=segment.source, side=side).inc(segment.blocks * size)
        loaded = assignment.read_plan.blocks
        self._metrics.hit_blocks.labels(decision="load").inc(loaded)
        self._metrics.hit_blocks.labels(decision="recompute").inc(waiting.stored_blocks - loaded)

    def _route(self, assignment: Assignment, waiting: WaitingRequest, now: float) -> Route:
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
            peers={name: self._supervisor.current[name].registration.peer for name in named},
            queued_s=now - waiting.since,
            stored_blocks=waiting.stored_blocks,
        )

    # ---- watching

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                self._core.expire(time.monotonic())
                self._drop_unconfirmed()
                await self._supervisor.look_around()
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
            self._calls.send(self._supervisor.current[move.source].registration.actor_name, "give_back", request_id, int(epoch))

    # ---- figures

    async def status(self) -> dict[str, Any]:
        """A JSON-like picture of the cluster, for `dualpath top`, the status page, scaling, tests and /health."""
        now = time.monotonic()
        return {
            "time": time.time(),
            "scheduler": self._name,
            "pid": os.getpid(),
            "model": self._facts.served_name if self._facts else "",
            "queued": self._core.queued,
            "running": self._core.running,
            "blocked_on": self._core.blocked_on,
            "longest_wait_s": max((now - entry.since for entry in self._waiting.values()), default=0.0),
            "index_blocks": len(self._index),
            "resident_blocks": len(self._residency),
            "restarts": self._restarts,
            "lost": list(self._supervisor.lost),
            "processes": {
                name: process_status(incarnation, self._core.is_draining(incarnation.registration.node_id))
                for name, incarnation in self._supervisor.current.items()
            },
            "requests": request_status(self._waiting, self._assigned, self._facts.geometry.block_tokens if self._facts else 1, now),
            "events": self._events.documents(),
        }

    async def metrics(self) -> str:
        self._metrics.queued_requests.set(self._core.queued)
        self._metrics.index_blocks.set(len(self._index))
        for name, incarnation in self._supervisor.current.items():
            self._metrics.report_age.labels(reporter=name).set(incarnation.silent_s)
        return self._metrics.render()

    async def client_metrics(self, client: str, text: str) -> dict[str, str]:
        """Keep a client's metrics, and tell those of all clients that have spoken lately."""
        self._clients.keep(client, text)
        return self._clients.texts()

    async def publish(self, client: str, text: str) -> int:
        """Keep a client's metrics, and tell how many clients have spoken within the last seconds."""
        self._clients.keep(client, text)
        return self._clients.speaking()

    async def process_id(self) -> int:
        return os.getpid()
