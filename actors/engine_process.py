"""What the engine and gateway actors have in common when they start."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import ray

from actors.calls import ActorCalls
from actors.messages import ModelFacts, Registration
from actors.reporter import Reporter, end_process
from dualpath_ray.config import Settings
from dualpath_ray.engine.fingerprint import model_fingerprint
from dualpath_ray.kv.geometry import KVGeometry
from dualpath_ray.kv.residency import ResidencyChanges
from dualpath_ray.models.shape import read_shape
from dualpath_ray.rdma.sysfs import read_machine
from dualpath_ray.telemetry import logs, tracing
from dualpath_ray.telemetry.metrics import Metrics
from dualpath_ray.traffic.classes import TrafficClass
from dualpath_ray.transfer.endpoint import Endpoint
from dualpath_ray.transfer.endpoint_settings import EndpointSettings
from dualpath_ray.transfer.memory import PeerInfo
from dualpath_ray.transfer.transports import Transports, choose_transports, own_accelerator
from policies.vocabulary import EngineLoad, NodeLoad, Role

log = logging.getLogger(__name__)

START_AGAIN_S = 1.0


@dataclass(frozen=True, slots=True)
class Identity:
    """Which process of the cluster this is. `engine_id` is how the scheduler calls it, `model_path` the resolved model directory."""

    engine_id: str
    node_id: str
    actor_name: str
    namespace: str
    model_path: str


class ClusterProcess:
    """An actor that Ray may restart at any time: every incarnation brings itself up and introduces itself, nobody has to tell it to."""

    role: Role | None = None  # None: a gateway

    def __init__(self, settings: Settings, identity: Identity) -> None:
        self._made_at = time.monotonic()
        service = self.role or "gateway"
        logs.setup(settings.telemetry, service, identity.engine_id)
        tracing.setup(settings.telemetry, service, identity.engine_id)
        self._settings, self._identity = settings, identity
        self._transports: Transports
        self._facts = facts_of(settings, identity)
        self._metrics = Metrics()
        self._calls = ActorCalls(identity.namespace)
        self._start_lock = asyncio.Lock()
        self._agent_name = ""
        context = ray.get_runtime_context()
        actor = context.current_actor
        # Queued behind this constructor. Ray refuses the call when it hears that this actor is restarting before it hears that it lives.
        begin = actor.come_back if context.was_current_actor_reconstructed else actor.start
        begin.options(max_task_retries=-1).remote()

    async def start(self) -> str:
        """Bring this incarnation up, once. Returns its agent name. Raises what went wrong; the next call tries again."""
        async with self._start_lock:
            if not self._agent_name:
                try:
                    self._transports = prepare_transfers(self._settings)
                    self._agent_name = await self._bring_up()
                except Exception as error:
                    log.error("start failed: %s", error)
                    raise
        return self._agent_name

    async def come_back(self) -> None:
        """`start`, for an incarnation that Ray has started: nobody waits for it. If it cannot come up (a link is down, the store does not
        answer), it ends, and Ray tries again with a new process."""
        try:
            await self.start()
        except Exception:
            await asyncio.sleep(START_AGAIN_S)
            end_process()

    async def _bring_up(self) -> str:
        """Make the service and its reporter; returns the agent name."""
        raise NotImplementedError

    def _load(self) -> EngineLoad | NodeLoad:
        raise NotImplementedError

    def _figures(self) -> dict[str, float]:
        """What goes with every load report: counters since start, and levels that no policy needs."""
        raise NotImplementedError

    def _count_pushes(self, endpoint: Endpoint, **kinds: str) -> None:
        """Bring the metrics of the process's end of the network up to date; `kinds` maps a metric's `kind` to a pair of regions."""
        metrics, stats = self._metrics, endpoint.stats
        for kind, regions in kinds.items():
            metrics.advance(metrics.pushed_bytes, stats.pushed_bytes[regions], kind=kind)
        metrics.advance(metrics.push_failures, stats.failed_pushes)
        metrics.advance(metrics.refused_pushes, stats.refused_pushes)
        metrics.advance(metrics.damaged_pushes, stats.mismatched_pushes)
        metrics.advance(metrics.cnic_busy, endpoint.busy_seconds())

    def _reporter(
        self,
        info: PeerInfo,
        active: Callable[[], frozenset[str]] = frozenset,
        scan: Callable[[], Awaitable[list[tuple[bytes, bytes]]]] | None = None,
        residency: ResidencyChanges | None = None,
    ) -> Reporter:
        """A reporter for the service that `info` addresses; start it when the service can serve."""
        identity = self._identity
        registration = Registration(
            identity.engine_id,
            identity.node_id,
            self.role,
            identity.actor_name,
            info,
            self._facts,
            os.getpid(),
            ray.get_runtime_context().get_node_id(),
            time.monotonic() - self._made_at,
        )
        interval_s, health_s = self._settings.scheduling.report_interval_s, self._settings.cluster.health_timeout_s
        return Reporter(self._calls, registration, self._load, interval_s, active, scan, self._figures, residency, health_s)


def facts_of(settings: Settings, identity: Identity) -> ModelFacts:
    """The model's facts from its files, without loading weights."""
    shape = read_shape(identity.model_path)
    geometry = KVGeometry(shape.layers, shape.kv_heads, shape.head_dim, settings.model.kv_type, settings.model.block_tokens)
    context = min(settings.model.max_context or shape.max_context, shape.max_context)
    return ModelFacts(model_fingerprint(shape.path, settings.model.dtype), geometry, context, identity.model_path, settings.model.name)


def prepare_transfers(settings: Settings) -> Transports:
    """Choose this process's transports and tell UCX, which reads its environment when NIXL loads it. Raises ConfigError.

    Actors get no `runtime_env` for this: Ray would have to start a worker process for each, where one that it has started before takes over
    at once when an actor dies.
    """
    machine = read_machine()
    same_machine = settings.cluster.placement == "logical"
    transports = choose_transports(settings.transfer, machine, same_machine, own_accelerator(machine, os.environ), os.environ)
    os.environ.update(settings.transfer.environment() | transports.environment())
    log.info("transfers by %s on %s", ",".join(transports.tls), ",".join(transports.ports) or "any device")
    return transports


def endpoint_settings(settings: Settings, transports: Transports, *classes: TrafficClass) -> EndpointSettings:
    """For a process that pushes in these classes."""
    transfer, traffic = settings.transfer, settings.traffic
    return EndpointSettings(
        transfer.progress_thread_delay_us,
        transfer.busy_poll_s,
        transfer.idle_poll_s,
        transfer.push_timeout_s,
        int(transfer.max_post_bytes),
        {each: traffic.of(each).marking for each in classes} if traffic.enabled else {},
        transports.ports if transports.rdma else None,
        int(transports.copied) if transfer.copy_threads is None else transfer.copy_threads,
        transfer.verify,
    )


def device_of(settings: Settings) -> str:
    """`auto` is the GPU that Ray gave this actor, if it gave one."""
    if settings.model.device != "auto":
        return settings.model.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
