"""Calls between actors: found by name, bounded in time, with errors in the package's own types.

Ray never gives up on a hung actor and spends its own retries within seconds of a node's death, so every call here has a deadline and
none is retried by Ray; who owns the request decides on another attempt.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray
from ray._private import state
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError, TaskCancelledError
from ray.experimental import internal_kv

from dualpath_ray.errors import CancelledError, DualPathError, TransferError, UnansweredError
from dualpath_ray.messages import Delivery, LeaseGrant, LeaseRequest, LoadOutcome, PersistBlock, PrefillOutcome, PrefillTask

SCHEDULER = "scheduler"
CALL_TIMEOUT_S = 30.0
HEAD_TIMEOUT_S = 10.0
GRACE_S = 5.0  # a call that has a deadline of its own gets this much longer to report it


def gateway_name(node_id: str) -> str:
    return f"gateway-{node_id}"


class ActorCalls:
    """Named actors of one namespace. Handles are looked up once; a restarted actor keeps its handle."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self._handles: dict[str, ActorHandle[Any]] = {}

    def handle(self, name: str) -> ActorHandle[Any]:
        """Raises TransferError when there is no such actor (now), UnansweredError when Ray's head cannot be asked."""
        if name not in self._handles:
            try:
                self._handles[name] = ray.get_actor(name, namespace=self.namespace)
            except ValueError:
                raise TransferError(f"there is no actor {name!r} in namespace {self.namespace!r}") from None
            except RayError as error:
                raise self.translate(name, error) from error
        return self._handles[name]

    async def call(self, name: str, method: str, *arguments: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call a method and wait for its result. Raises DualPathError."""
        reference = getattr(self.handle(name), method).remote(*arguments)
        try:
            return await asyncio.wait_for(reference, timeout_s)
        except TimeoutError:
            raise UnansweredError(f"{name}.{method} did not answer within {timeout_s:.1f} s", name) from None
        except RayError as error:
            raise self.translate(name, error) from error

    async def stream(self, name: str, method: str, *arguments: Any, timeout_s: float) -> AsyncGenerator[Any, None]:
        """Items of a streaming method. Raises DualPathError, also if nothing comes for `timeout_s`."""
        references = getattr(self.handle(name), method).options(num_returns="streaming").remote(*arguments)
        try:
            while True:
                try:
                    async with asyncio.timeout(timeout_s):
                        item = await (await anext(references))
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise UnansweredError(f"{name}.{method} sent nothing for {timeout_s:.1f} s", name) from None
                yield item
        except RayError as error:
            raise self.translate(name, error) from error

    def send(self, name: str, method: str, *arguments: Any) -> None:
        """Call a method without waiting; a missing actor is ignored."""
        try:
            getattr(self.handle(name), method).remote(*arguments)
        except TransferError:
            return

    async def process(self, name: str) -> tuple[int, str] | None:
        """Process and Ray node of an actor's current incarnation, as far as Ray knows; None while there is none. Raises DualPathError."""
        try:
            actor_id = self.handle(name)._actor_id.hex()
        except TransferError:
            return None
        facts = await _ask_ray(state.actors, actor_id)  # Ray's public call for this needs the dashboard
        return (int(facts["Pid"]), str(facts["Address"]["NodeID"])) if facts.get("State") == "ALIVE" else None

    async def living_nodes(self) -> frozenset[str]:
        """Ray nodes (hex ids) that Ray holds for alive. Raises DualPathError."""
        nodes: list[dict[str, Any]] = await _ask_ray(ray.nodes)
        return frozenset(node["NodeID"] for node in nodes if node["Alive"])

    async def remember(self, key: str, value: bytes) -> None:
        """Keep a value in Ray's head, beyond the life of any actor."""
        await _ask_ray(internal_kv._internal_kv_put, f"{self._folder}{key}", value)

    async def forget(self, key: str) -> None:
        await _ask_ray(internal_kv._internal_kv_del, f"{self._folder}{key}")

    async def recall(self) -> list[bytes]:
        """All values that are remembered in this namespace."""
        keys: list[bytes] = await _ask_ray(internal_kv._internal_kv_list, self._folder)
        return [value for key in keys if (value := await _ask_ray(internal_kv._internal_kv_get, key)) is not None]

    @property
    def _folder(self) -> str:
        return _folder(self.namespace)

    def kill(self, name: str) -> None:
        """End an actor's process; Ray starts another one. It gives a process that does not react 5 s before it uses SIGKILL."""
        ray.kill(self.handle(name), no_restart=False)

    def translate(self, name: str, error: RayError) -> DualPathError:
        """The package's error for what Ray raised."""
        if isinstance(error, RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, DualPathError) else DualPathError(f"{name} failed: {cause or error}")
        if isinstance(error, TaskCancelledError):
            return CancelledError(f"the call to {name} was cancelled")
        if isinstance(error, ActorDiedError):
            self._handles.pop(name, None)
        if isinstance(error, ActorDiedError | ActorUnavailableError):
            return UnansweredError(f"actor {name} died or cannot be reached", name)
        return UnansweredError(f"call to {name} failed: {error}", name)


def _folder(namespace: str) -> str:
    return f"dualpath/{namespace}/"


def forget_all(namespace: str) -> None:
    """Drop everything that was remembered in a namespace. Ray must be connected."""
    internal_kv._internal_kv_del(_folder(namespace), del_by_prefix=True)


async def _ask_ray(function: Callable[..., Any], *arguments: Any) -> Any:
    """Ask Ray's head, in a thread: it may be slow to answer. Raises UnansweredError."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(function, *arguments), HEAD_TIMEOUT_S)
    except TimeoutError:
        raise UnansweredError(f"Ray's head did not answer within {HEAD_TIMEOUT_S:.0f} s") from None
    except Exception as error:  # of several kinds, none of them documented
        raise UnansweredError(f"Ray's head cannot be asked: {error}") from error


class GatewayProxy:
    """A gateway actor as `dualpath_ray.decode_calls.GatewayCalls`."""

    def __init__(self, calls: ActorCalls, node_id: str) -> None:
        self._calls, self._name = calls, gateway_name(node_id)

    async def lease(self, request: LeaseRequest) -> LeaseGrant:
        grant: LeaseGrant = await self._calls.call(self._name, "lease", request, timeout_s=request.timeout_s + GRACE_S)
        return grant

    async def loaded(self, lease_id: int, timeout_s: float) -> LoadOutcome:
        outcome: LoadOutcome = await self._calls.call(self._name, "loaded", lease_id, timeout_s, timeout_s=timeout_s + GRACE_S)
        return outcome

    async def complete(self, lease_id: int, timeout_s: float) -> LoadOutcome:
        outcome: LoadOutcome = await self._calls.call(self._name, "complete", lease_id, timeout_s, timeout_s=timeout_s + GRACE_S)
        return outcome

    async def deliver(self, delivery: Delivery) -> LoadOutcome:
        outcome: LoadOutcome = await self._calls.call(self._name, "deliver", delivery, timeout_s=delivery.timeout_s + GRACE_S)
        return outcome

    async def withdraw(self, request_id: str) -> None:
        await self._calls.call(self._name, "withdraw", request_id)

    async def release(self, lease_id: int, persist: tuple[PersistBlock, ...] = ()) -> None:
        await self._calls.call(self._name, "release", lease_id, persist)


class PrefillProxy:
    """A prefill actor as `dualpath_ray.decode_calls.PrefillCalls`."""

    def __init__(self, calls: ActorCalls, engine_id: str) -> None:
        self._calls, self._name = calls, engine_id

    async def prefill(self, task: PrefillTask) -> PrefillOutcome:
        outcome: PrefillOutcome = await self._calls.call(self._name, "prefill", task, timeout_s=task.timeout_s + GRACE_S)
        return outcome

    async def cancel(self, request_id: str, epoch: int) -> None:
        await self._calls.call(self._name, "cancel", request_id, epoch)


class RayDirectory:
    """The cluster's processes by name, for a decode engine."""

    def __init__(self, calls: ActorCalls) -> None:
        self._calls = calls

    def gateway(self, node_id: str) -> GatewayProxy:
        return GatewayProxy(self._calls, node_id)

    def prefill(self, engine_id: str) -> PrefillProxy:
        return PrefillProxy(self._calls, engine_id)
