"""Starting, joining and stopping a cluster: placement groups, actors, supervision by Ray's restarts.

A *node* is a gateway with the engines beside it, in one bundle of a placement group, so that they share a machine. With placement
`spread` every node gets a machine of its own (STRICT_SPREAD); with `logical` several nodes may share one, which is how a laptop runs.
"""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import SCHEDULER, forget_all, gateway_name
from actors.decode import DecodeActor
from actors.engine_process import Identity
from actors.gateway import StorageGatewayActor
from actors.node import Node
from actors.prefill import PrefillActor
from actors.scheduler import SchedulerActor
from dualpath_ray.config import Settings
from dualpath_ray.environment import set_ray_defaults
from dualpath_ray.errors import ConfigError, DualPathError
from dualpath_ray.models.resolve import resolve_model
from policies.vocabulary import Role

if TYPE_CHECKING:
    from actors.autoscaler import Autoscaler

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
            _init_ray(address=address, **options)
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
            _init_ray(**local)
            return True
        except Exception as error:  # Ray gives a node 30 s to start, however busy the machine is, and raises a bare Exception then
            ray.shutdown()
            if attempt + 1 == LOCAL_START_ATTEMPTS:
                raise ConfigError(f"a local Ray could not start: {' '.join(str(error).split())}") from error
    raise AssertionError("unreachable")


def _init_ray(**options: Any) -> None:
    """`ray.init`, after which SIGTERM does what it did before: Ray's own handler aborts the process where it stands."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _engines(settings: Settings) -> int:
    return sum(_nodes_at_most(settings)) * settings.cluster.engines_per_node


def _nodes_at_most(settings: Settings) -> tuple[int, int]:
    """Prefill and decode nodes that there may ever be."""
    cluster, scaling = settings.cluster, settings.autoscaling
    if not scaling.enabled:
        return cluster.prefill_nodes, cluster.decode_nodes
    return max(cluster.prefill_nodes, scaling.most_prefill_nodes), max(cluster.decode_nodes, scaling.most_decode_nodes)


def _custom_resources(settings: Settings) -> dict[str, float]:
    """What the nodes' bundles ask for, so that a local Ray can be all of them at once."""
    cluster = settings.cluster
    total: dict[str, float] = {}
    prefill_nodes, decode_nodes = _nodes_at_most(settings)
    for resources, nodes in ((cluster.prefill_resources, prefill_nodes), (cluster.decode_resources, decode_nodes)):
        for name, amount in resources.items():
            total[name] = total.get(name, 0.0) + amount * nodes
    return total


@dataclass
class Cluster:
    """Handles of a running cluster. Made by `start`; whoever made it must `stop` it."""

    settings: Settings
    namespace: str
    nodes: dict[str, Node] = field(default_factory=dict)
    actors: dict[str, ActorHandle[Any]] = field(default_factory=dict)
    _model_path: str = ""
    _named: Counter[Role] = field(default_factory=Counter)
    _autoscaler: Autoscaler | None = None

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
            cluster._model_path = str(resolve_model(settings.model.spec))
            cluster._start_actors()
        except BaseException:
            cluster.stop()
            raise
        if settings.autoscaling.enabled:
            from actors.autoscaler import Autoscaler  # which changes clusters

            cluster._autoscaler = Autoscaler(cluster)
            cluster._autoscaler.start()
        return cluster

    @functools.cached_property
    def engine_gpus(self) -> float:
        """GPUs (or the share of one) that each engine gets: as configured, or else an even share of what a single machine has."""
        settings = self.settings
        if settings.cluster.engine_gpus or settings.cluster.placement != "logical" or settings.model.device == "cpu":
            return settings.cluster.engine_gpus
        resources: Any = ray.cluster_resources  # untyped
        return min(1.0, float(resources().get("GPU", 0.0)) / _engines(settings))

    # ---- nodes

    @property
    def switchable(self) -> bool:
        """Whether a machine may serve either role: the bundles of both ask for the same."""
        settings = self.settings.cluster
        return settings.prefill_resources == settings.decode_resources and settings.prefill_labels == settings.decode_labels

    def request_node(self, role: Role) -> Node:
        """Ask for a machine for one more node, in a group of its own. Returns at once; `Node.placed` says when it is there."""
        group = self._group([role])
        node = Node(self._name(role), role, group, 0)
        self.nodes[node.node_id] = node
        return node

    def start_node(self, node: Node) -> None:
        """Start the processes of a placed node and wait until they serve. Raises ConfigError when one cannot."""
        self._wait(self._create_node(node))

    def start_engines(self, node: Node, role: Role) -> None:
        """Give a node whose engines were stopped engines of a role. Raises ConfigError when one cannot start."""
        node.role = role
        self._wait(self._create_engines(node))

    def stop_engines(self, node: Node) -> None:
        """End a node's engines, and nothing else of it."""
        for name in node.engine_ids:
            self._kill(name)
        node.engine_ids.clear()

    def stop_node(self, node: Node) -> None:
        """End a node's processes and give its machine back. Only for nodes with a group of their own. Idempotent."""
        node.state = "gone"
        self.stop_engines(node)
        self._kill(gateway_name(node.node_id))
        if self.nodes.pop(node.node_id, None) is not None:
            remove_placement_group(node.group)

    def _name(self, role: Role) -> str:
        """p0, p1, ... and d0, d1, ...; never one that was used before."""
        self._named[role] += 1
        return f"{role[0]}{self._named[role] - 1}"

    def _group(self, roles: Sequence[Role]) -> PlacementGroup:
        """A placement group with a bundle per role."""
        settings = self.settings.cluster
        bundles: list[dict[str, float]] = []
        labels: list[dict[str, str]] = []
        for role in roles:
            bundle = {"CPU": max(0.01, settings.engine_cpus * settings.engines_per_node)}
            if self.engine_gpus:
                bundle["GPU"] = self.engine_gpus * settings.engines_per_node
            bundle |= settings.prefill_resources if role == "prefill" else settings.decode_resources
            bundles.append(bundle)
            labels.append(settings.prefill_labels if role == "prefill" else settings.decode_labels)
        spread = settings.placement == "spread" and len(bundles) > 1
        selector: dict[str, Any] = {"bundle_label_selector": labels} if any(labels) else {}
        group: PlacementGroup = placement_group(bundles, strategy="STRICT_SPREAD" if spread else "PACK", **selector)
        return group

    def _place(self) -> None:
        """Place all nodes: in one group, so that they come together or not at all; if they may go singly, each in its own."""
        settings = self.settings.cluster
        counts: list[tuple[Role, int]] = [("prefill", settings.prefill_nodes), ("decode", settings.decode_nodes)]
        roles = [role for role, count in counts for _ in range(count)]
        parts: list[list[Role]] = [[role] for role in roles] if self.settings.autoscaling.enabled else [roles]
        for part in parts:
            group = self._group(part)
            for bundle, role in enumerate(part):
                node = Node(self._name(role), role, group, bundle)
                self.nodes[node.node_id] = node
        deadline = time.monotonic() + settings.start_timeout_s
        for node in self.nodes.values():
            if not node.group.wait(max(0.1, deadline - time.monotonic())):
                state = placement_group_table(node.group).get("state")
                labels = settings.prefill_labels if node.role == "prefill" else settings.decode_labels
                raise ConfigError(
                    f"placement group {state} after {settings.start_timeout_s:.0f} s: no machines for bundles {node.group.bundle_specs}"
                    f"{f' with labels {labels}' if labels else ''}; add machines, or set cluster.placement=logical to share them"
                )

    def _start_actors(self) -> None:
        scheduler = self._create(SCHEDULER, SchedulerActor, (self.settings, self.namespace), None)
        started = {SCHEDULER: scheduler.start.remote()}
        for node in self.nodes.values():
            started |= self._create_node(node)
            node.state = "serving"
        self._wait(started)

    def _create_node(self, node: Node) -> dict[str, Any]:
        """Create a node's processes. Returns, by name, what ends when each serves."""
        identity = Identity(node.node_id, node.node_id, gateway_name(node.node_id), self.namespace, self._model_path)
        gateway = self._create(identity.actor_name, StorageGatewayActor, (self.settings, identity), node)
        return {identity.actor_name: gateway.start.remote(), **self._create_engines(node)}

    def _create_engines(self, node: Node) -> dict[str, Any]:
        """The same for its engines only."""
        kind = PrefillActor if node.role == "prefill" else DecodeActor
        started: dict[str, Any] = {}
        for index in range(self.settings.cluster.engines_per_node):
            engine_id = f"{node.role}-{node.node_id}-{index}"
            identity = Identity(engine_id, node.node_id, engine_id, self.namespace, self._model_path)
            node.engine_ids.append(engine_id)
            started[engine_id] = self._create(engine_id, kind, (self.settings, identity), node, engine=True).start.remote()
        return started

    def _wait(self, started: Mapping[str, Any]) -> None:
        for name, reference in started.items():
            try:
                ray.get(reference, timeout=self.settings.cluster.start_timeout_s)
            except RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, DualPathError):
                    raise cause from None
                raise ConfigError(f"{name} could not start: {str(error).strip().splitlines()[-1]}") from error

    # ---- actors

    def _create(self, name: str, kind: type, arguments: tuple[Any, ...], node: Node | None, engine: bool = False) -> ActorHandle[Any]:
        """A named actor that Ray restarts for ever."""
        strategy: Any = "DEFAULT"
        if node is not None:
            strategy = PlacementGroupSchedulingStrategy(placement_group=node.group, placement_group_bundle_index=node.bundle)
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
        ).remote(*arguments)
        self.actors[name] = handle
        return handle

    def _kill(self, name: str) -> None:
        handle = self.actors.pop(name, None)
        if handle is not None:
            ray.kill(handle, no_restart=True)

    def stop(self) -> None:
        """End all actors and give the placement groups back. Idempotent. A gateway that does not answer is killed all the same."""
        if self._autoscaler is not None:
            self._autoscaler.stop()
            self._autoscaler = None
        self._stop_collecting()
        for name in list(self.actors):
            self._kill(name)
        if ray.is_initialized():
            forget_all(self.namespace)
        for group in {node.group.id: node.group for node in self.nodes.values()}.values():
            remove_placement_group(group)
        self.nodes.clear()

    def _stop_collecting(self) -> None:
        """Let gateways that keep a store within its budget finish or give up what they are removing from it."""
        gateways = [self.actors[name] for name in map(gateway_name, self.nodes) if name in self.actors]
        if gateways and self.settings.storage.capacity_bytes is not None and ray.is_initialized():
            ray.wait([gateway.close.remote() for gateway in gateways], num_returns=len(gateways), timeout=CLOSE_TIMEOUT_S)
