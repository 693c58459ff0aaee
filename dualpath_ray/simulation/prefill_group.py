"""Prefill engines that run forward passes in lockstep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice

from dualpath_ray.simulation.curves import PrefillCurve
from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.link import Link
from dualpath_ray.simulation.round_state import RoundState
from policies.batch_quota import AttentionTimeModel, plan_batch

MOST_IN_BATCH = 64


@dataclass(slots=True)
class PrefillEngine:
    """One GPU. `free_tokens` is KV room in HBM; it limits only engines that hold whole requests (no layerwise prefill)."""

    engine_id: str
    node_id: str
    cnic_out: Link
    free_tokens: float
    inbox: deque[RoundState] = field(default_factory=deque)
    ready: deque[RoundState] = field(default_factory=deque)
    batch: list[RoundState] = field(default_factory=list)


class PrefillGroup:
    """A lockstep group. At each boundary between forward passes it hands over what is complete, fetches assigned requests (their reads
    start now) and forms the next batch of requests whose reads are complete: a request is computed at the earliest one pass after it
    was fetched, as in an engine that prepares the next batch while the current one runs.

    `idle` holds the groups that wait to be woken. `layerwise_copy_s` is the time a request's KV keeps the compute NIC busy beside the pass.
    KV gets what collectives (the model class, `collective_token_s` per computed token) leave of it.
    """

    def __init__(
        self,
        engines: Sequence[PrefillEngine],
        curve: PrefillCurve,
        quota_s: float,
        batch_tokens: int,
        block_tokens: int,
        layerwise_copy_s: Callable[[RoundState, int], float] | None,
        collective_token_s: float,
        loop: EventLoop,
        place: Callable[[], None],
        read: Callable[[RoundState, PrefillEngine], None],
        complete: Callable[[RoundState, PrefillEngine], None],
        idle: dict[PrefillGroup, None],
    ) -> None:
        self.engines = engines
        self.passes = 0
        self.busy_s = 0.0
        self.full_s = 0.0  # time in passes that had to leave requests behind whose reads were complete
        self.running = False
        self._woken = False
        self._curve = curve
        self._time_model = AttentionTimeModel(curve.per_pair_s, curve.attention_token_s)
        self._quota_s = quota_s
        self._batch_tokens = batch_tokens
        self._block_tokens = block_tokens
        self._copy_s = layerwise_copy_s
        self._collective_token_s = collective_token_s
        self._loop = loop
        self._place = place
        self._read = read
        self._complete = complete
        self._idle = idle

    def wake(self) -> None:
        """There is something to fetch or to compute; an idle group reaches its boundary now."""
        if not self.running and not self._woken:
            self._woken = True
            self._idle.pop(self, None)
            self._loop.at(self._loop.now, self._boundary)

    def _boundary(self, _: None) -> None:
        self._woken = False
        self.running = True  # placing below must not wake this group again
        for engine in self.engines:
            if engine.batch:
                self._end_batch(engine)
        self._place()
        for engine in self.engines:
            if engine.inbox:
                self._fetch(engine)
        seconds = self._start_batches()
        self.running = seconds > 0
        if self.running:
            self.passes += 1
            self.busy_s += seconds
            if any(engine.ready for engine in self.engines):
                self.full_s += seconds
            self._loop.at(self._loop.now + seconds, self._boundary)
        else:
            self._idle[self] = None

    def _end_batch(self, engine: PrefillEngine) -> None:
        for state in reversed(engine.batch):
            state.cached += state.chunk
            state.new -= state.chunk
            if state.new:
                engine.ready.appendleft(state)
        for state in engine.batch:
            if not state.new:
                self._complete(state, engine)
        engine.batch = []

    def _fetch(self, engine: PrefillEngine) -> None:
        """Take assigned requests in order while HBM has room; their reads start."""
        inbox = engine.inbox
        while inbox and engine.free_tokens >= inbox[0].prompt:
            state = inbox.popleft()
            engine.free_tokens -= state.prompt
            state.granted = self._loop.now
            self._read(state, engine)

    def _start_batches(self) -> float:
        """Form one batch per engine; returns the time of the forward pass, 0 if there is nothing to compute."""
        most_tokens = total_tokens = 0
        most_pairs = most_copy = 0.0
        for engine in self.engines:
            ready = engine.ready
            if not ready:
                continue
            waiting = ((state.cached, state.new) for state in islice(ready, MOST_IN_BATCH))
            chunks = plan_batch(waiting, self._time_model, self._quota_s, self._batch_tokens, self._block_tokens)
            pairs = copy = 0.0
            for chunk in chunks:
                state = ready.popleft()
                state.chunk = chunk
                engine.batch.append(state)
                pairs += chunk * (state.cached + chunk / 2)
                if self._copy_s is not None:
                    copy += self._copy_s(state, chunk)
            tokens = sum(chunks)
            total_tokens += tokens
            most_tokens = max(most_tokens, tokens)
            most_pairs = max(most_pairs, pairs)
            most_copy = max(most_copy, copy)
        if not total_tokens:
            return 0.0
        collectives = self._collective_token_s * most_tokens if most_copy else 0.0
        return max(self._curve.seconds(most_tokens, total_tokens / len(self.engines), most_pairs), collectives + most_copy)
