"""A simulated cluster: agents, the scheduler core of `policies/`, storage NICs, prefill and decode groups (docs/simulator.md).

A turn: arrival -> scheduler queue -> assignment -> fetched by the prefill engine at the next boundary -> storage reads -> forward passes ->
first token -> copies to the decode engine -> decode steps -> end of the turn -> tool delay -> the agent's next turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

from dualpath_ray.errors import ConfigError
from dualpath_ray.simulation.cluster_spec import ClusterSpec
from dualpath_ray.simulation.decode_group import DecodeGroup
from dualpath_ray.simulation.events import EventLoop
from dualpath_ray.simulation.link import Link
from dualpath_ray.simulation.measurements import Measurements
from dualpath_ray.simulation.model_spec import ModelSpec
from dualpath_ray.simulation.network import make_network
from dualpath_ray.simulation.prefill_group import PrefillEngine, PrefillGroup
from dualpath_ray.simulation.round_state import RoundState
from dualpath_ray.simulation.workload import Trajectory
from policies.baselines import System
from policies.core import SchedulerCore
from policies.errors import Infeasible
from policies.settings import SchedulingSettings
from policies.vocabulary import EngineLoad, NodeLoad, RequestDemand

NEVER = inf
WINDOW_S = 1.0
NOWHERE: Mapping[str, range] = {}  # no block is kept in DRAM


class DoesNotFit(ConfigError):
    """The model, or one of the trace's contexts, is larger than the cluster's memory."""


class Simulator:
    """One run. `arrivals[i]` is when agent i starts; `scale` multiplies appended and generated tokens (paper section 7, sensitivity).

    `scheduling` overrides settings of the decision core, e.g. `{"recompute": True}`.
    """

    def __init__(
        self,
        model: ModelSpec,
        cluster: ClusterSpec,
        system: System,
        agents: Sequence[Trajectory],
        arrivals: Sequence[float] | None = None,
        append_scale: float = 1.0,
        generation_scale: float = 1.0,
        scheduling: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.cluster, self.system = model, cluster, system
        self.loop = EventLoop()
        self._network = make_network(cluster.sharing, self.loop)
        self.results = Measurements()
        self.agents_left = len(agents)
        self.finished_at = 0.0  # when the last turn so far ended
        self._agents = agents
        self._scheduling = scheduling or {}
        self._append_scale, self._generation_scale = append_scale, generation_scale
        self._context = [trajectory.context for trajectory in agents]
        self._started = list(arrivals) if arrivals is not None else [0.0] * len(agents)
        self._states: dict[str, RoundState] = {}
        self._build()
        for agent, start in enumerate(self._started):
            self.loop.at(start, self._arrive, (agent, 0))

    def run(self, until: float = float("inf")) -> float:
        """Run until all agents are done or `until`; returns the time reached (the job completion time, if all started at 0)."""
        self.loop.run(until)
        if self.agents_left and not self.loop.stopped and until == float("inf"):
            raise ConfigError(f"cluster: {len(self._states)} turns can never be placed; raise hbm_bytes or staging_bytes")
        return self.loop.now

    def oldest_waiting_s(self) -> float:
        """How long the oldest turn without a first token has waited."""
        waiting = [state.arrived for state in self._states.values() if not state.first_token]
        return self.loop.now - min(waiting) if waiting else 0.0

    @property
    def core(self) -> SchedulerCore:
        """The decision core; read it, do not change it."""
        return self._core

    @property
    def slots(self) -> int:
        """Staging slots of each node; 0 for systems that do not stage."""
        return self._slots

    @property
    def nodes(self) -> list[str]:
        return [*self._prefill_nodes, *self._decode_nodes]

    @property
    def snics(self) -> list[Link]:
        """The storage NIC of each node."""
        return [self._snic[node] for node in self.nodes]

    @property
    def snics_up(self) -> list[Link]:
        """The direction to storage of each node's storage NIC."""
        return list(self._snic_up.values())

    @property
    def decode_groups(self) -> list[DecodeGroup]:
        return list(dict.fromkeys(self._decode_group.values()))

    @property
    def prefill_groups(self) -> list[PrefillGroup]:
        return self._prefill_groups

    # --- construction -----------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        cluster, node, gpus = self.cluster, self.cluster.node, self.cluster.node.gpus
        self._prefill_nodes = [f"p{i}" for i in range(cluster.prefill_nodes)]
        self._decode_nodes = [f"d{i}" for i in range(cluster.decode_nodes)]
        nodes = (*self._prefill_nodes, *self._decode_nodes)
        self._snic = {n: Link(node.snic_bytes_per_s, WINDOW_S) for n in nodes}
        self._snic_up = {n: Link(node.snic_bytes_per_s) for n in nodes}
        self._dram = {n: Link(node.dram_bytes_per_s) for n in nodes}
        prefill_size = min(cluster.prefill_group_nodes, cluster.prefill_nodes)
        decode_size = min(cluster.decode_group_nodes, cluster.decode_nodes)
        prefill_room = self._kv_room(prefill_size * gpus, "prefill_nodes")
        decode_room = int(self._kv_room(decode_size * gpus, "decode_nodes"))
        self._core = SchedulerCore(self._settings())
        self._kv_bytes = self.model.kv_token_bytes
        self._cnic_token_s = self._kv_bytes / node.cnic_bytes_per_s
        self._last_layer_token_s = self._cnic_token_s / self.model.layers
        self._block = self.cluster.block_tokens
        block_bytes = self._block * self._kv_bytes
        staged = self.system.layerwise and not self.system.zero_io
        if staged and node.staging_bytes < block_bytes:
            raise DoesNotFit(
                f"cluster.node.staging_bytes: one block of {block_bytes / 1e6:.3g} MB does not fit into {node.staging_bytes:g} bytes"
            )
        self._slots = int(node.staging_bytes / block_bytes) if staged else 0
        self._reading = dict.fromkeys(nodes, 0)  # tokens being read or waiting for the storage NIC
        for n in nodes:
            self._core.update_node(self._node_load(n))
        self._prefill_engines: dict[str, PrefillEngine] = {}
        self._cnic_in: dict[str, Link] = {}  # of every engine; of prefill engines only used without layerwise prefill
        for n in self._prefill_nodes:
            for g in range(gpus):
                room = NEVER if self.system.layerwise else prefill_room
                self._cnic_in[f"{n}e{g}"] = Link(node.cnic_bytes_per_s)
                self._prefill_engines[f"{n}e{g}"] = PrefillEngine(f"{n}e{g}", n, Link(node.cnic_bytes_per_s), room)
                self._core.update_engine(EngineLoad(f"{n}e{g}", n, "prefill", 0, 0, 0, 0.0))
        for n in self._decode_nodes:
            for g in range(gpus):
                self._cnic_in[f"{n}e{g}"] = Link(node.cnic_bytes_per_s)
                self._core.update_engine(EngineLoad(f"{n}e{g}", n, "decode", 0, 0, decode_room, 0.0))
        self._prefill_groups = self._group_prefill(prefill_size)
        self._decode_group: dict[str, DecodeGroup] = {}
        for start in range(0, cluster.decode_nodes, decode_size):
            engines = [f"{n}e{g}" for n in self._decode_nodes[start : start + decode_size] for g in range(gpus)]
            group = DecodeGroup(engines, decode_room, self.model.decode, self.loop, self._end_turn)
            self._decode_group.update(dict.fromkeys(engines, group))

    def _kv_room(self, engines: int, field: str) -> float:
        """Tokens of KV that fit in one GPU's HBM beside its part of the weights."""
        model, node = self.model, self.cluster.node
        free = node.hbm_bytes - node.hbm_reserved_bytes - model.replicated_weight_bytes - model.expert_weight_bytes / engines
        if free < model.kv_token_bytes * self.cluster.block_tokens:
            raise DoesNotFit(f"{field}: {model.name} does not fit on {engines} GPUs of {node.hbm_bytes / 1e9:g} GB; use more nodes")
        return free / model.kv_token_bytes

    def _settings(self) -> SchedulingSettings:
        """Alpha and beta as in the paper: what a storage NIC reads, a GPU prefills in some seconds (batches of 4 mean turns)."""
        turns = [turn for trajectory in self._agents[:500] for turn in trajectory.turns]
        mean_append = sum(append for append, _ in turns) / len(turns) * self._append_scale
        mean_context = sum(t.context + sum(a + g for a, g in t.turns) / 2 for t in self._agents[:500]) / len(self._agents[:500])
        pass_s = self.model.prefill.seconds(4 * mean_append, 4 * mean_append, 4 * mean_append * mean_context)
        rate = 4 * (mean_context + mean_append) / pass_s
        unlimited = self.system.placement != "dualpath"
        curve = self.model.prefill
        settings: dict[str, Any] = {
            "read_mode": self.system.read_mode,
            "queue_view": self.system.queue_view,
            "placement": self.system.placement,
            "alpha_tokens": int(self.cluster.alpha_s * self.cluster.node.snic_bytes_per_s / self.model.kv_token_bytes),
            "beta_tokens": 1 << 60 if unlimited else max(1, int(self.cluster.beta_s * rate)),
            "max_queued_requests": 10_000_000,
            "report_timeout_s": NEVER,
            "min_split_blocks": self.cluster.min_split_blocks,
            "use_resident": False,
            "hbm_promise": "decode",
            "prefill_token_s": (curve.seconds(2000, 2000, 0) - curve.seconds(1000, 1000, 0)) / 1000,
            "prefill_pair_s": curve.per_pair_s,
            **self._scheduling,
        }
        return SchedulingSettings(**settings)

    def _group_prefill(self, size: int) -> list[PrefillGroup]:
        engines = list(self._prefill_engines.values())
        per_group = size * self.cluster.node.gpus if self.model.lockstep else 1
        copy_s = self._copy_seconds if self.system.layerwise and not self.system.zero_io else None
        self._group_of: dict[str, PrefillGroup] = {}
        self._idle: dict[PrefillGroup, None] = {}
        groups: list[PrefillGroup] = []
        for start in range(0, len(engines), per_group):
            members = engines[start : start + per_group]
            reporting = [*dict.fromkeys(e.node_id for e in members), *self._decode_nodes[len(groups) :: -(-len(engines) // per_group)]]
            c = self.cluster
            group = PrefillGroup(
                members,
                self.model.prefill,
                c.quota_s,
                c.batch_tokens,
                c.block_tokens,
                copy_s,
                self._collective_token_s(size),
                self.loop,
                partial(self._place, reporting),
                self._read,
                self._prefilled,
                self._idle,
            )
            self._group_of.update({engine.engine_id: group for engine in members})
            groups.append(group)
            self._idle[group] = None
        return groups

    def _collective_token_s(self, group_nodes: int) -> float:
        """Seconds a compute NIC is busy with one token's collectives: the part that goes to other nodes of the group."""
        return self.model.collective_token_bytes * (1 - 1 / group_nodes) / self.cluster.node.cnic_bytes_per_s

    # --- a turn's life -------------------------------------------------------------------------------------------------------

    def _arrive(self, what: tuple[int, int]) -> None:
        agent, index = what
        append, generate = self._agents[agent].turns[index]
        append = max(1, round(append * self._append_scale))
        generate = max(1, round(generate * self._generation_scale))
        context, request_id = self._context[agent], f"{agent}.{index}"
        hit = context - context % self._block
        state = self._states[request_id] = RoundState(agent, index, request_id, context + append, hit, generate, self.loop.now)
        self._submit(state)
        if self._idle:
            for group in list(self._idle):
                group.wake()

    def _submit(self, state: RoundState) -> None:
        block = self._block
        hit_blocks = 0 if self.system.zero_io else state.hit // block
        demand = RequestDemand(
            state.request_id, state.prompt, hit_blocks, block, state.generate, state.arrived, NEVER, 0, "", NOWHERE, block * self._kv_bytes
        )
        try:
            self._core.submit(demand)
        except Infeasible as error:
            raise DoesNotFit(f"cluster: {error}; raise node.hbm_bytes or node.staging_bytes") from error

    def _place(self, reporting: Sequence[str]) -> None:
        """Ask the scheduler core; what it assigns waits at its prefill engine for the group's next boundary.

        A group that fetches reports the read queues of its nodes (paper section 6), and those of its share of the decode nodes.
        """
        if self.system.queue_view == "reported":
            for node_id in reporting:
                self._core.update_node(self._node_load(node_id))
        if self._core.settings.rebalance:
            self._take_back()
        for assignment in self._core.decide(self.loop.now):
            state = self._states[assignment.request_id]
            state.assign(assignment, self._block)
            if not self.system.zero_io:
                state.load(sum(state.reads.values()))
            engine = self._prefill_engines[assignment.prefill_engine]
            engine.inbox.append(state)
            self._group_of[engine.engine_id].wake()

    def _take_back(self) -> None:
        """What an engine that fell behind has not fetched is placed again, as the live scheduler does."""
        for move in self._core.moves():
            state, engine = self._states[move.request_id], self._prefill_engines[move.source]
            if state in engine.inbox:
                engine.inbox.remove(state)
                self._core.finish(move.request_id)
                self._submit(state)
                self.results.moved += 1

    def _node_load(self, node_id: str) -> NodeLoad:
        node = self.cluster.node
        queue = self._reading[node_id]
        return NodeLoad(
            node_id,
            queue,
            queue * self._kv_bytes,
            node.snic_bytes_per_s,
            node.cnic_bytes_per_s,
            self._slots,
            self._slots,
            self.loop.now,
        )

    def _read(self, state: RoundState, engine: PrefillEngine) -> None:
        """The engine has fetched the request: its storage reads are queued now."""
        now = self.loop.now
        state.fetched = state.granted = now
        if not state.reads:
            self.loop.at(now, self._reads_complete, (state, engine))  # after this boundary
            return
        state.reads_left = len(state.reads)
        latency = self.cluster.node.read_latency_s
        for node_id, tokens in state.reads.items():
            route = (self._snic[node_id], self._dram[node_id])
            self._reading[node_id] += tokens
            self._network.transfer(route, tokens * self._kv_bytes, self._one_read, (state, engine, node_id), latency)

    def _one_read(self, what: tuple[RoundState, PrefillEngine, str]) -> None:
        state, engine, node_id = what
        self._reading[node_id] -= state.reads[node_id]
        self._core.reads_done(state.request_id, node_id)
        state.reads_left -= 1
        if state.reads_left:
            return
        if self.system.layerwise:
            self._reads_complete((state, engine))
        else:
            route = (self._dram[engine.node_id], self._cnic_in[engine.engine_id])
            self._network.transfer(route, state.hit * self._kv_bytes, self._reads_complete, (state, engine))

    def _reads_complete(self, what: tuple[RoundState, PrefillEngine]) -> None:
        state, engine = what
        state.ready = self.loop.now
        engine.ready.append(state)
        self._group_of[engine.engine_id].wake()

    def _copy_seconds(self, state: RoundState, chunk: int) -> float:
        """Time the prefill engine's compute NIC needs beside a forward pass: the larger of its two directions.

        In: hit KV (from either side) and KV of earlier chunks. Out: loop-back of what this node read, and what goes to the decode node:
        the whole prompt if this node read it, only new KV otherwise (paper sections 2.1, 2.2).
        """
        inward, outward = state.cached, 2 * state.prefill_read + chunk
        return (inward if inward > outward else outward) * self._cnic_token_s

    def _prefilled(self, state: RoundState, engine: PrefillEngine) -> None:
        """Prefill is complete and the first token exists; the KV goes to the decode engine."""
        now = self.loop.now
        state.first_token = now
        self._core.prefill_done(state.request_id)
        if state.assignment is None:
            raise ValueError(f"request {state.request_id} was prefilled without an assignment")
        if self.system.zero_io:
            self._in_hbm(state)
        elif self.system.layerwise:
            # All layers but the last have gone to the decode node during the pass.
            self._to_hbm(state, state.chunk * self._last_layer_token_s)
        else:
            route = (engine.cnic_out, self._cnic_in[state.assignment.decode_engine], self._dram[state.assignment.decode_node])
            self._network.transfer(route, state.prompt * self._kv_bytes, self._handed_over, (state, engine))

    def _handed_over(self, what: tuple[RoundState, PrefillEngine]) -> None:
        """Without layerwise prefill: the whole prompt's KV is on the decode node, and the prefill engine's memory is free."""
        state, engine = what
        engine.free_tokens += state.prompt
        if engine.inbox:
            self._group_of[engine.engine_id].wake()
        self._to_hbm(state)

    def _to_hbm(self, state: RoundState, latency: float = 0.0) -> None:
        if state.assignment is None:
            raise ValueError(f"request {state.request_id} was prefilled without an assignment")
        route = (self._dram[state.assignment.decode_node], self._cnic_in[state.assignment.decode_engine])
        self._network.transfer(route, state.prompt * self._kv_bytes, self._in_hbm, state, latency)

    def _in_hbm(self, state: RoundState) -> None:
        if state.generate == 1 or state.assignment is None:
            self._end_turn(state)
            return
        group = self._decode_group[state.assignment.decode_engine]
        group.join(state)

    def _end_turn(self, state: RoundState) -> None:
        now = self.loop.now
        self.finished_at = now
        self._core.finish(state.request_id)
        del self._states[state.request_id]
        self.results.turn(state, now)
        agent, index = state.agent, state.index + 1
        block, context = self._block, state.prompt + state.generate
        if state.assignment is not None and not self.system.zero_io:
            blocks = context // block - self._context[agent] // block
            self._persist(state.assignment.decode_node, blocks * block * self._kv_bytes)
        self._context[agent] = context
        trajectory = self._agents[agent]
        if index < len(trajectory.turns):
            if trajectory.delays and trajectory.delays[index - 1] > 0:
                self.loop.at(now + trajectory.delays[index - 1], self._arrive, (agent, index))
            else:
                self._arrive((agent, index))
        else:
            self.results.trajectory.append(now - self._started[agent])
            self.agents_left -= 1

    def _persist(self, node_id: str, size: int) -> None:
        """The decode node writes a turn's full blocks; nobody waits for them."""
        self.results.persisted_bytes += size
        if size:
            self._network.transfer((self._snic_up[node_id], self._dram[node_id]), size)
