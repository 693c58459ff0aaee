"""The client's side of a cluster: what HTTP replicas, batch jobs and tests hold. Implements `dualpath_ray.requests.Generator`.

A request that fails in a retryable way is tried again, under a new epoch, until its deadline. Sampling depends on seed and position only,
so an attempt that died in mid-stream is continued by one whose prompt ends with what was generated so far: no token is
repeated or lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.calls import SCHEDULER, ActorCalls
from actors.client_metrics import PUBLISH_S
from actors.inbox import Inbox
from actors.messages import ModelFacts, Submission
from actors.request_figures import RequestFigures
from dualpath_ray.errors import BlockError, CancelledError, DeadlineExceededError, DualPathError, StoreError, UnansweredError
from dualpath_ray.kv.keys import block_keys, root_key
from dualpath_ray.messages import DecodeTask, Route
from dualpath_ray.requests import FinishReason, GenerationDelta, GenerationRequest, GenerationUsage
from dualpath_ray.serving.model_card import ModelCard
from dualpath_ray.telemetry import tracing
from dualpath_ray.telemetry.exposition import Exposition, merge
from dualpath_ray.telemetry.metrics import Metrics

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0
METRICS_TIMEOUT_S = 2.0
GRACE_S = 5.0


class ClusterClient:
    """Use from one event loop. Any number of clients may serve one cluster."""

    def __init__(self, namespace: str, calls: ActorCalls | None = None) -> None:
        self._calls = calls or ActorCalls(namespace)
        self._facts: ModelFacts | None = None
        self._metrics = Metrics()
        self._name = f"{socket.gethostname()}-{os.getpid()}"
        self._id = uuid.uuid4().hex
        self._inboxes: dict[str, Inbox] = {}  # by decode engine
        self._publishing: asyncio.Task[None] | None = None
        self.publishing = 1  # clients that do, this one among them, as of late

    @classmethod
    def connect(cls, namespace: str) -> ClusterClient:
        """Attach to the cluster of `namespace`; Ray must be connected. Raises TransferError when there is none."""
        client = cls(namespace)
        client._calls.handle(SCHEDULER)
        return client

    async def facts(self) -> ModelFacts:
        """Model facts, asked for once. Raises OverloadedError while no engine has started."""
        if self._facts is None:
            self._facts = await self._calls.call(SCHEDULER, "describe")
        return self._facts

    async def describe(self) -> ModelCard:
        facts = await self.facts()
        return ModelCard.from_directory(Path(facts.model_path), facts.served_name, facts.max_context)

    async def health(self) -> Mapping[str, Any]:
        """`status` is "ok" while the scheduler answers and both kinds of engine report."""
        try:
            status: dict[str, Any] = await self._calls.call(SCHEDULER, "status", timeout_s=METRICS_TIMEOUT_S)
        except DualPathError as error:
            return {"status": "unavailable", "reason": str(error)}
        roles = {process["role"] for process in status["processes"].values() if process["report_age_s"] < METRICS_TIMEOUT_S}
        missing = sorted({"gateway", "prefill", "decode"} - roles)
        return {"status": "unavailable" if missing else "ok", **({"reason": f"no {', '.join(missing)} reports"} if missing else {})}

    async def status(self) -> dict[str, Any]:
        """The scheduler's picture of the cluster."""
        status: dict[str, Any] = await self._calls.call(SCHEDULER, "status")
        return status

    async def inspect(self) -> dict[str, dict[str, Any]]:
        """State of every process, integrity checked. For tests and diagnosis."""
        status = await self.status()
        names = {name: process["actor"] for name, process in status["processes"].items()}
        states = await asyncio.gather(*(self._calls.call(actor, "inspect") for actor in names.values()))
        return dict(zip(names, states, strict=True))

    async def metrics(self, accept: str = "") -> Exposition:
        """All processes' metrics as one exposition; processes that do not answer are left out. `accept`: see `exposition.merge`."""
        processes = (await self.status())["processes"]
        sources = [("scheduler", "0", SCHEDULER), *((p["role"], name, p["actor"]) for name, p in processes.items())]
        calls = (self._calls.call(actor, "metrics", timeout_s=METRICS_TIMEOUT_S) for _, _, actor in sources)
        texts = await asyncio.gather(*calls, return_exceptions=True)
        parts = [
            ({"service": service, "instance": instance}, text)
            for (service, instance, _), text in zip(sources, texts, strict=True)
            if isinstance(text, str)
        ]
        clients: dict[str, str] = await self._calls.call(SCHEDULER, "client_metrics", self._name, self._metrics.render())
        parts += [({"service": "client", "instance": name}, text) for name, text in clients.items()]
        return merge(parts, accept)

    def publish_metrics(self) -> None:
        """From now on, leave this client's metrics with the scheduler every few seconds, so that any client can show those of all.

        `publishing` says how many clients do so.
        """

        async def publish() -> None:
            while True:
                with contextlib.suppress(DualPathError):  # while there is no scheduler
                    self.publishing = await self._calls.call(SCHEDULER, "publish", self._name, self._metrics.render())
                await asyncio.sleep(PUBLISH_S)

        self._publishing = asyncio.get_running_loop().create_task(publish())

    async def generate(self, request: GenerationRequest, enough: asyncio.Event | None = None) -> AsyncGenerator[GenerationDelta, None]:
        """See `Generator.generate`. Retryable failures are retried until the request's deadline."""
        facts = await self.facts()
        deadline = time.monotonic() + request.timeout
        figures = RequestFigures(self._metrics, request)
        emitted: list[int] = []
        epoch, suspect, use_stored = 0, "", True
        pause_s = FIRST_PAUSE_S
        outcome = "failed"
        try:
            with tracing.span("request", request.trace, **_attributes(request)) as span:
                while True:
                    reason = _ended(request, emitted)
                    if reason is not None:  # only the end mark of an attempt that died was lost
                        outcome = reason
                        yield GenerationDelta((), reason)
                        return
                    attempt = _attempt(request, emitted, deadline, span.carrier())
                    try:
                        async with aclosing(self._attempt(attempt, epoch, facts, suspect, use_stored)) as deltas:
                            async for delta in deltas:
                                emitted += delta.tokens
                                if delta.usage is not None:
                                    delta = replace(delta, usage=_whole(delta.usage, request, emitted, epoch))
                                figures.note(delta, span.trace_id())
                                yield delta
                                if delta.finish_reason is not None:
                                    outcome = delta.finish_reason
                                    return
                        raise DualPathError(f"the stream of request {request.request_id} ended early")
                    except DualPathError as error:
                        span.event("attempt failed", epoch=epoch, reason=str(error))
                        if not error.retryable or time.monotonic() + pause_s > deadline:
                            outcome = _outcome(error)
                            raise
                        suspect = error.process if isinstance(error, UnansweredError) else ""
                        # A damaged block is not found again; but where the store fails as a whole, computing all is the way out.
                        use_stored &= not isinstance(error, StoreError) or isinstance(error, BlockError)
                    self._metrics.retries.inc()
                    epoch += 1
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "stop" if enough is not None and enough.is_set() else "cancelled"
            raise
        finally:
            figures.end(outcome)

    async def _attempt(
        self, request: GenerationRequest, epoch: int, facts: ModelFacts, suspect: str, use_stored: bool
    ) -> AsyncGenerator[GenerationDelta, None]:
        root = root_key(facts.fingerprint, request.block_salt, facts.geometry)
        keys = tuple(block_keys(root, request.tokens, facts.geometry.block_tokens))
        submission = Submission(
            request.request_id,
            epoch,
            len(request.tokens),
            request.max_new_tokens,
            keys if use_stored else (),
            request.tenant,
            request.priority,
            request.timeout,
            suspect,
        )
        decode_engine = ""
        finished = False
        try:
            with tracing.span("schedule", request.trace) as span:
                asked = replace(submission, trace=span.carrier())
                route: Route = await self._calls.call(SCHEDULER, "assign", asked, timeout_s=request.timeout + GRACE_S)
            decode_engine = route.decode_engine
            task = DecodeTask(request, route, keys, root)
            inbox = self._inboxes.setdefault(decode_engine, Inbox(self._calls, decode_engine, self._id))
            async with aclosing(inbox.generate(task, request.timeout + GRACE_S)) as deltas:
                async for delta in deltas:
                    finished = delta.finish_reason is not None
                    yield delta
        finally:
            if not finished:
                self._calls.send(decode_engine or SCHEDULER, "cancel", request.request_id, epoch)

    async def aclose(self) -> None:
        """End `publish_metrics`, and waiting for answers to requests that were given up."""
        if self._publishing is not None:
            self._publishing.cancel()
        await asyncio.gather(*(inbox.aclose() for inbox in self._inboxes.values()))


def _attributes(request: GenerationRequest) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {"request_id": request.request_id, "prompt_tokens": len(request.tokens)}
    if request.session:
        attributes["session"] = request.session
    if request.next_turn_s is not None:
        attributes["next_turn_s"] = request.next_turn_s
    return attributes


def _ended(request: GenerationRequest, emitted: list[int]) -> FinishReason | None:
    """Why nothing is left to generate, if so."""
    if emitted and emitted[-1] in request.stop_token_ids and len(emitted) > request.min_new_tokens:
        return "stop"
    return "length" if len(emitted) >= request.max_new_tokens else None


def _attempt(request: GenerationRequest, emitted: list[int], deadline: float, carrier: dict[str, str]) -> GenerationRequest:
    """What is left of a request after some of its tokens have been delivered."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceededError(f"request {request.request_id} was not finished in time")
    return replace(
        request,
        tokens=(*request.tokens, *emitted),
        max_new_tokens=request.max_new_tokens - len(emitted),
        min_new_tokens=max(0, request.min_new_tokens - len(emitted)),
        timeout=left,
        trace=carrier or request.trace,
        resumed_tokens=request.resumed_tokens + len(emitted),
    )


def _whole(usage: GenerationUsage, request: GenerationRequest, emitted: list[int], epoch: int) -> GenerationUsage:
    """Usage of the last attempt, in terms of the request as the client made it."""
    prompt = len(request.tokens)
    cached = min(usage.cached_tokens, prompt)
    return replace(
        usage,
        prompt_tokens=prompt,
        cached_tokens=cached,
        computed_tokens=prompt - cached,
        completion_tokens=len(emitted),
        attempts=epoch + 1,
    )


def _outcome(error: DualPathError) -> str:
    if isinstance(error, DeadlineExceededError):
        return "timeout"
    if isinstance(error, CancelledError):
        return "cancelled"
    return "overloaded" if error.retryable else "invalid"
