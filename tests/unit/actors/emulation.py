"""A cluster's processes as the scheduler sees them, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from actors.messages import ModelFacts, Registration, Report, Submission
from actors.scheduler import SchedulerActor
from actors.supervisor import Supervisor
from dualpath_ray.config import Settings
from dualpath_ray.errors import DeadlineExceededError, TransferError
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.transfer.memory import PeerInfo
from policies.vocabulary import EngineLoad, NodeLoad, Role

BLOCK = 16
FACTS = ModelFacts("fingerprint", KVGeometry(2, 1, 8, block_tokens=BLOCK), 4096, "a/model", "model")
PARTS: tuple[tuple[str, str, Role | None], ...] = (
    ("p0", "p0", None),
    ("d0", "d0", None),
    ("prefill-0", "p0", "prefill"),
    ("decode-0", "d0", "decode"),
)


class DirectCalls:
    """Emulates `actors.calls.ActorCalls` inside one process: calls reach the scheduler object itself, and can be lost on either way."""

    def __init__(self) -> None:
        self.scheduler: SchedulerActor | None = None
        self.lose_call: str = ""  # method whose next call does not reach the scheduler
        self.lose_answer: str = ""  # method whose next answer does not come back
        self.sent: list[tuple[str, str, tuple[Any, ...]]] = []
        self.meanwhile: Callable[[], None] | None = None  # done once, while a report of something finished is under way
        self.called: list[tuple[str, tuple[Any, ...]]] = []
        self.pids: dict[str, int | None] = {}  # actor -> its process now, 1 unless set
        self.nodes = frozenset([""])  # Ray nodes that live
        self.remembered: dict[str, bytes] = {}
        self.killed: list[str] = []

    async def call(self, name: str, method: str, *arguments: Any, timeout_s: float = 1.0) -> Any:
        await asyncio.sleep(0)
        if method == "peer_died":
            if self.lose_call == method:
                self.lose_call = ""
                raise TransferError(f"{name} cannot be reached")
            self.sent.append((name, method, arguments))
            return None
        if self.scheduler is None or method == self.lose_call:
            self.lose_call = ""
            raise TransferError("the scheduler cannot be reached")
        self.called.append((method, arguments))
        if self.meanwhile is not None and method == "report" and arguments[0].finished:
            self.meanwhile()
            self.meanwhile = None
        result = await getattr(self.scheduler, method)(*arguments)
        if method == self.lose_answer and (method != "report" or arguments[0].finished):  # not one that was under way before
            self.lose_answer = ""
            raise DeadlineExceededError("no answer")
        return result

    async def process(self, name: str) -> tuple[int, str] | None:
        pid = self.pids.get(name, 1)
        return None if pid is None else (pid, "")

    async def living_nodes(self) -> frozenset[str]:
        return self.nodes

    async def remember(self, key: str, value: bytes) -> None:
        self.remembered[key] = value

    async def forget(self, key: str) -> None:
        self.remembered.pop(key, None)

    async def recall(self) -> list[bytes]:
        return list(self.remembered.values())

    def kill(self, name: str) -> None:
        self.killed.append(name)

    def send(self, name: str, method: str, *arguments: Any) -> None:
        self.sent.append((name, method, arguments))


def make_scheduler(**scheduling: Any) -> tuple[SchedulerActor, DirectCalls]:
    """A scheduler whose messages to others are kept in the second value's `sent`."""
    scheduler = SchedulerActor(Settings.model_validate({"scheduling": scheduling}), "unit-test")
    calls = DirectCalls()
    scheduler._calls = scheduler._supervisor.calls = calls  # type: ignore[assignment]
    return scheduler, calls


async def stop(scheduler: SchedulerActor) -> None:
    if scheduler._ticker is not None:
        scheduler._ticker.cancel()
        await asyncio.gather(scheduler._ticker, return_exceptions=True)


def registration(engine_id: str, node_id: str, role: Role | None, incarnation: int = 1, facts: ModelFacts = FACTS) -> Registration:
    agent = f"{engine_id}-{incarnation}"
    return Registration(engine_id, node_id, role, f"actor-{engine_id}", PeerInfo(engine_id, agent, b"", ()), facts, 1)


def load(engine_id: str, node_id: str, role: Role | None, free_tokens: int = 4096) -> EngineLoad | NodeLoad:
    if role is None:
        return NodeLoad(node_id, 0, 0, 1e9, 1e9, 1000, 1000, reported_at=0.0)
    free = free_tokens if role == "decode" else 0
    return EngineLoad(engine_id, node_id, role, 0, 0, free, reported_at=0.0, hbm_capacity_tokens=free)


def report(engine_id: str, incarnation: int = 1, **fields: Any) -> Report:
    part = next(part for part in PARTS if part[0] == engine_id)
    return Report(engine_id, f"{engine_id}-{incarnation}", load(*part), **fields)


async def bring_up(scheduler: SchedulerActor) -> None:
    for part in PARTS:
        await scheduler.register(registration(*part))
    for engine_id, _, _ in PARTS:
        await scheduler.report(report(engine_id))


def submission(request_id: str = "r", epoch: int = 0, prompt: int = 100, keys: tuple[bytes, ...] = (), **fields: Any) -> Submission:
    return Submission(request_id, epoch, prompt, fields.pop("max_new_tokens", 10), keys, **fields)


async def pass_time(supervisor: Supervisor, seconds: float, heard: frozenset[str] = frozenset()) -> None:
    """Let a supervisor look around when everyone but `heard` has been silent for `seconds` more."""
    for incarnation in [*supervisor.current.values(), *supervisor._past.values()]:
        if incarnation.registration.engine_id not in heard:
            incarnation.heard_at -= seconds
        incarnation.next_check -= seconds
        if incarnation.over_since is not None:
            incarnation.over_since -= seconds
    for vacancy in supervisor._vacant.values():
        vacancy.since -= seconds
    await supervisor.look_around()
    for _ in range(5):
        await asyncio.sleep(0)
