"""Nodes come and go with the load: demand for machines as placement groups, engines on machines that came, draining before a node goes.

Runs in the process that owns the cluster, so that everything it adds is stopped with it. Ray's autoscaler (cluster launcher, KubeRay)
sees a pending placement group and starts a machine for it; a machine whose group is gone is idle, and Ray takes it back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from ray.exceptions import RayError

from actors.calls import SCHEDULER
from actors.cluster import Cluster
from actors.node import Node
from actors.role_load import LoadWindow
from dualpath_ray.errors import ConfigError, DualPathError
from policies.scaling import RoleLoad, ScalingLimits, decide_scaling
from policies.vocabulary import Role

log = logging.getLogger(__name__)

CALL_TIMEOUT_S = 10.0
DRAIN_LOOK_S = 0.2
CHANGES_AT_ONCE = 16


class Autoscaler:
    """Started by `start`, ended by `stop`. Changes are made by threads of their own: a machine may take minutes to come."""

    def __init__(self, cluster: Cluster) -> None:
        settings = cluster.settings.autoscaling
        self._cluster, self._settings = cluster, settings
        self._window = LoadWindow(settings.looks, cluster.settings.decode.max_batch)
        self._stopping = threading.Event()
        self._keep: set[str] = set()  # draining nodes that are wanted again
        self._workers = ThreadPoolExecutor(CHANGES_AT_ONCE, thread_name_prefix="scaling")
        self._thread = threading.Thread(target=self._main, name="autoscaler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Make no more changes, and wait for those under way to notice."""
        self._stopping.set()
        self._thread.join()
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _main(self) -> None:
        while not self._stopping.wait(self._settings.interval_s):
            try:
                self.look()
            except (DualPathError, RayError) as error:
                log.warning("autoscaler: no decision now: %s", error)
            except Exception:
                log.exception("autoscaler: a decision failed")

    def switch(self, node: Node) -> None:
        """Begin to switch a serving node to the other role, as an operator may want it too. Raises ConfigError if it cannot be."""
        if not self._cluster.switchable:
            raise ConfigError("nodes cannot change their role: prefill and decode nodes ask for different resources or labels")
        if node.state != "serving":
            raise ConfigError(f"node {node.node_id} is {node.state}; only a serving one can change its role")
        node.state = "draining"
        self._begin(self._switch_node, node, "decode" if node.role == "prefill" else "prefill")

    # ---- deciding

    def look(self) -> None:
        """Take note of the load, and change the cluster if the policy wants it so."""
        self._window.add(self._ask("status"))
        if not self._window.full:
            return
        prefill = self._window.load("prefill", len(self._staying("prefill")))
        decode = self._window.load("decode", len(self._staying("decode")))
        decision = decide_scaling(prefill, decode, self._limits("prefill"), self._limits("decode"))
        changes = (decision.prefill_nodes - prefill.nodes, decision.decode_nodes - decode.nodes)
        if not any(changes):
            return
        self._window.reset()
        rows: list[tuple[Role, RoleLoad, int]] = [("prefill", prefill, decision.prefill_nodes), ("decode", decode, decision.decode_nodes)]
        for role, load, wanted in rows:
            if wanted != load.nodes:
                self._note(role, f"{wanted} nodes wanted, not {load.nodes}: queue {load.queue_s:.2f} s, utilisation {load.utilisation:.2f}")
        switched = self._switch(decision.switch)
        self._change("prefill", changes[0] + switched)
        self._change("decode", changes[1] - switched)

    def _limits(self, role: Role) -> ScalingLimits:
        settings = self._settings
        least, most = (
            (settings.least_prefill_nodes, settings.most_prefill_nodes)
            if role == "prefill"
            else (settings.least_decode_nodes, settings.most_decode_nodes)
        )
        return ScalingLimits(settings.queue_target_s, settings.target_utilisation, settings.high_utilisation, settings.looks, least, most)

    def _staying(self, role: Role) -> list[Node]:
        """Nodes that serve, or will as soon as they have a machine."""
        return [node for node in list(self._cluster.nodes.values()) if node.role == role and node.state not in ("draining", "gone")]

    def _switch(self, wanted: int) -> int:
        """Switch up to `wanted` prefill nodes to decode (negative: the other way). Returns how many, with the same sign."""
        giver: Role = "prefill" if wanted > 0 else "decode"
        if not wanted or not self._cluster.switchable:
            return 0
        nodes = [node for node in self._staying(giver) if node.state == "serving"][-abs(wanted) :]
        for node in nodes:
            self.switch(node)
        return len(nodes) if wanted > 0 else -len(nodes)

    def _change(self, role: Role, by: int) -> None:
        """Add nodes of a role, or let the newest ones go."""
        for _ in range(by):
            draining = [node for node in self._cluster.nodes.values() if node.role == role and node.state == "draining"]
            again = next((node for node in draining if node.node_id not in self._keep), None)
            if again is not None:
                self._keep.add(again.node_id)
            else:
                self._begin(self._add, self._cluster.request_node(role))
        for _ in range(-by):
            node = self._staying(role)[-1]
            waiting = node.state == "requested"
            node.state = "gone" if waiting else "draining"
            if not waiting:  # one that has no machine yet is given up by the thread that waits for it
                self._begin(self._remove, node)

    # ---- changing, in threads

    def _begin(self, change: Callable[..., None], node: Node, *arguments: Any) -> None:
        def guarded() -> None:
            try:
                change(node, *arguments)
            except (DualPathError, RayError) as error:
                log.error("autoscaler: node %s is given up: %s", node.node_id, error)
                self._end(node)
            except Exception:
                log.exception("autoscaler: node %s is given up", node.node_id)
                self._end(node)
            finally:
                self._window.reset()

        self._workers.submit(guarded)

    def _add(self, node: Node) -> None:
        """Wait for a machine as long as the node is wanted, then start the node's processes."""
        while not node.placed():
            if self._stopping.wait(DRAIN_LOOK_S) or node.state == "gone":
                self._cluster.stop_node(node)
                return
        self._cluster.start_node(node)
        if node.state == "gone":  # given up while it started
            self._remove(node)
        else:
            node.state = "serving"
            self._note(node.node_id, f"serves as {node.role} node")

    def _remove(self, node: Node) -> None:
        if self._drained(node):
            self._end(node)

    def _end(self, node: Node) -> None:
        names = [node.node_id, *node.engine_ids]
        with contextlib.suppress(DualPathError, RayError):  # a scheduler that is being restarted does not know them
            self._ask("leave", names)
        self._cluster.stop_node(node)
        with contextlib.suppress(DualPathError, RayError):
            self._ask("retire", names)

    def _switch_node(self, node: Node, role: Role) -> None:
        if self._drained(node):
            old = list(node.engine_ids)
            self._ask("leave", old)
            self._cluster.stop_engines(node)
            self._ask("retire", old)
            self._cluster.start_engines(node, role)
            self._ask("resume", node.node_id)
            node.state = "serving"
            self._note(node.node_id, f"serves as {role} node now")

    def _drained(self, node: Node) -> bool:
        """Let a node finish: no new requests, those it has come to their end, what is new becomes durable.

        False if it is wanted again meanwhile, or everything stops; then it goes on as before.
        """
        deadline = time.monotonic() + self._settings.drain_timeout_s
        while not self._quiet(node):
            if self._stopping.wait(DRAIN_LOOK_S) or node.node_id in self._keep:
                self._keep.discard(node.node_id)
                self._ask("resume", node.node_id)
                node.state = "serving"
                return False
            if time.monotonic() > deadline:
                self._note(node.node_id, f"not finished after {self._settings.drain_timeout_s:.0f} s: its requests go on elsewhere")
                break
        return True

    def _quiet(self, node: Node) -> bool:
        try:
            return not self._ask("drain", node.node_id) and self._idle(node)  # each time: a restarted scheduler knows nothing of it
        except (DualPathError, RayError):
            return False  # a process that died is restarted by Ray; one that hangs, by the scheduler

    def _idle(self, node: Node) -> bool:
        """Whether nothing is under way in the node's processes, nothing still to be stored either."""
        states: list[dict[str, Any]] = ray.get(
            [self._cluster.actors[name].inspect.remote() for name in node.actor_names], timeout=CALL_TIMEOUT_S
        )
        return all(state["idle"] for state in states)

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._cluster.actors[SCHEDULER], method).remote(*arguments), timeout=CALL_TIMEOUT_S)
        except KeyError:
            raise ConfigError("the cluster is stopped") from None

    def _note(self, who: str, text: str) -> None:
        log.info("autoscaler: %s: %s", who, text)
        self._ask("note", who, text)
