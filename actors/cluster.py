"""Starting, joining and stopping a cluster: placement groups, actors, supervision by Ray's restarts.

A *node* is a gateway with the engines beside it, in one bundle of a placement group, so that they share a machine. With placement
`spread` every node gets a machine of its own (STRICT_SPREAD); with `logical` several nodes may share one, which is how a laptop runs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import SCHEDULER, forget_all, gateway_name
from actors.decode import DecodeActor
from actors.engine_process import Identity
from actors.gateway import StorageGatewayActor
from actors.prefill import PrefillActor
from actors.scheduler import SchedulerActor
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import ConfigError, DualPathError
from dualpath_ray.models.resolve import resolve_model

log = logging.getLogger(__name__)

LOCAL_OBJECT_STORE_BYTES = 100 << 20  # control messages only
LOCAL_START_ATTEMPTS = 2
CLOSE_TIMEOUT_S = 5.0
MAX_CONCURRENT_CALLS = 4096  # of one actor; bounds of its own refuse long before


def connect_ray(settings: Settings) -> bool:
    """Join the Ray cluster that the settings (or RAY_ADDRESS) name, or start a local one. Returns whether we started it.

    A process that is connected to Ray already stays where it is. Raises ConfigError when the cluster cannot be reached or started.
    """
    cluster = settings.cluster
    address = os.environ.get("RAY_ADDRESS", cluster.address)
    set_ray_defaults(address)
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"namespace": cluster.namespace, "log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        try:
            ray.init(address=address, **options)
        except (ValueError, ConnectionError) as error:
            raise ConfigError(f"there is no Ray cluster at {address!r}: {' '.join(str(error).split())}") from error
        return False
    local = options | {
        "address": "local",
        "include_dashboard": False,
        # Bookkeeping only: one machine plays several nodes.
        "num_cpus": max(os.cpu_count() or 1, 8 + int(_engines(settings) * cluster.engine_cpus)),
        "resources": _custom_resources(settings),
        "object_store_memory": LOCAL_OBJECT_STORE_BYTES,
    }
    for attempt in range(LOCAL_START_ATTEMPTS):
        try:
            ray.init(**local)
            return True
        except Exception as error:  # Ray gives a node 30 s to start, however busy the machine is, and raises a bare Exception then
            ray.shutdown()
            if attempt + 1 == LOCAL_START_ATTEMPTS:
                raise ConfigError(f"a local Ray could not start: {' '.join(str(error).split())}") from error
    raise AssertionError("unreachable")


def _engines(settings: Settings) -> int:
    cluster = settings.cluster
    return (cluster.prefill_nodes + cluster.decode_nodes) * cluster.engines_per_node


def _custom_resources(settings: Settings) -> dict[str, float]:
    """What the nodes' bundles ask for, so that a local Ray can be all of them at once."""
    cluster = settings.cluster
    total: dict[str, float] = {}
    for resources, nodes in ((cluster.prefill_resources, cluster.prefill_nodes), (cluster.decode_resources, cluster.decode_nodes)):
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + amount * nodes
    return total


@dataclass
class Cluster:
    """Handles of a running cluster. Made by `start`; whoever made it must `stop` it."""

    settings: Settings
    namespace: str
    group: PlacementGroup | None = None
    actors: dict[str, ActorHandle[Any]] = field(default_factory=dict)

    @classmethod
    def start(cls, settings: Settings) -> Cluster:
        """Place and start all actors, and wait until each serves. Ray must be connected (`connect_ray`).

        Raises ConfigError when the placement cannot be satisfied or an actor cannot start, saying why; nothing is left behind then.
        """
        cluster = cls(settings, settings.cluster.namespace)
        for warning in settings.cluster.warnings():
            log.warning("cluster: %s", warning)
        try:
            cluster._place()
            cluster._start_actors(str(resolve_model(settings.model.spec)))
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @functools.cached_property
    def engine_gpus(self) -> float:
        """GPUs (or the share of one) that each engine gets: as configured, or else an even share of what a single machine has."""
        settings = self.settings
        if settings.cluster.engine_gpus or settings.cluster.placement != "logical" or settings.model.device == "cpu":
            return settings.cluster.engine_gpus
        resources: Any = ray.cluster_resources  # untyped
        return min(1.0, float(resources().get("GPU", 0.0)) / _engines(settings))

    def _nodes(self) -> list[tuple[str, str]]:
        """(node id, role) of every node."""
        cluster = self.settings.cluster
        prefill = [(f"p{index}", "prefill") for index in range(cluster.prefill_nodes)]
        return prefill + [(f"d{index}", "decode") for index in range(cluster.decode_nodes)]

    def _place(self) -> None:
        settings = self.settings.cluster
        bundles: list[dict[str, float]] = []
        labels: list[dict[str, str]] = []
        for _, role in self._nodes():
            bundle = {"CPU": max(0.01, settings.engine_cpus * settings.engines_per_node)}
            if self.engine_gpus:
                bundle["GPU"] = self.engine_gpus * settings.engines_per_node
            bundle |= settings.prefill_resources if role == "prefill" else settings.decode_resources
            bundles.append(bundle)
            labels.append(settings.prefill_labels if role == "prefill" else settings.decode_labels)
        spread = settings.placement == "spread"
        selector: dict[str, Any] = {"bundle_label_selector": labels} if any(labels) else {}
        self.group = placement_group(bundles, strategy="STRICT_SPREAD" if spread else "PACK", **selector)
        if not self.group.wait(settings.start_timeout_s):
            state = placement_group_table(self.group).get("state")
            raise ConfigError(
                f"placement group {state} after {settings.start_timeout_s:.0f} s: no machines for bundles {bundles}"
                f"{f' with labels {labels}' if any(labels) else ''}; add machines, or set cluster.placement=logical to share them"
            )

    def _start_actors(self, model_path: str) -> None:
        settings = self.settings
        environment = self._environment()
        scheduler = self._create(SCHEDULER, SchedulerActor, (settings, self.namespace), environment, None)
        started = {SCHEDULER: scheduler.start.remote()}
        for bundle, (node_id, role) in enumerate(self._nodes()):
            name = gateway_name(node_id)
            gateway = self._create(
                name, StorageGatewayActor, (settings, Identity(node_id, node_id, name, self.namespace, model_path)), environment, bundle
            )
            started[name] = gateway.start.remote()
            for index in range(settings.cluster.engines_per_node):
                engine_id = f"{role}-{node_id}-{index}"
                kind = PrefillActor if role == "prefill" else DecodeActor
                identity = Identity(engine_id, node_id, engine_id, self.namespace, model_path)
                engine = self._create(engine_id, kind, (settings, identity), environment, bundle, engine=True)
                started[engine_id] = engine.start.remote()
        for name, reference in started.items():
            try:
                ray.get(reference, timeout=settings.cluster.start_timeout_s)
            except RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, DualPathError):
                    raise cause from None
                raise ConfigError(f"{name} could not start: {str(error).strip().splitlines()[-1]}") from error

    def _environment(self) -> dict[str, str]:
        """Environment of every actor: what UCX, NIXL and OpenMP read when they are loaded. What depends on the machine that an actor comes
        to lie on it finds out itself (engine_process.prepare_transfers)."""
        variables = {name: os.environ[name] for name in ("UCX_MODULES", "NIXL_LOG_LEVEL", "UCX_LOG_LEVEL") if name in os.environ}
        if self.settings.model.threads is not None:
            variables["OMP_NUM_THREADS"] = str(self.settings.model.threads)
        return variables | self.settings.transfer.environment()

    def _create(
        self, name: str, kind: type, arguments: tuple[Any, ...], environment: Mapping[str, str], bundle: int | None, engine: bool = False
    ) -> ActorHandle[Any]:
        """A named actor that Ray restarts for ever."""
        strategy: Any = "DEFAULT"
        if bundle is not None and self.group is not None:
            strategy = PlacementGroupSchedulingStrategy(placement_group=self.group, placement_group_bundle_index=bundle)
        remote: Any = ray.remote(kind)
        handle: ActorHandle[Any] = remote.options(
            name=name,
            namespace=self.namespace,
            num_cpus=self.settings.cluster.engine_cpus if engine else 0,
            num_gpus=self.engine_gpus if engine else 0,
            scheduling_strategy=strategy,
            max_restarts=-1,
            max_task_retries=0,
            max_concurrency=MAX_CONCURRENT_CALLS,
            runtime_env={"env_vars": dict(environment)},
        ).remote(*arguments)
        self.actors[name] = handle
        return handle

    def stop(self) -> None:
        """End all actors and give the placement group back. Idempotent. A gateway that does not answer is killed all the same."""
        self._stop_collecting()
        for handle in self.actors.values():
            ray.kill(handle, no_restart=True)
        self.actors.clear()
        if ray.is_initialized():
            forget_all(self.namespace)
        if self.group is not None:
            remove_placement_group(self.group)
            self.group = None

    def _stop_collecting(self) -> None:
        """Let gateways that keep a store within its budget finish or give up what they are removing from it."""
        names = [gateway_name(node_id) for node_id, _ in self._nodes()]
        gateways = [self.actors[name] for name in names if name in self.actors]
        if gateways and self.settings.storage.capacity_bytes is not None and ray.is_initialized():
            ray.wait([gateway.close.remote() for gateway in gateways], num_returns=len(gateways), timeout=CLOSE_TIMEOUT_S)
