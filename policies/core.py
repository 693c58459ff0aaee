"""The scheduler's decision core: turns waiting requests into assignments, for the live scheduler and the simulator alike.

It has no clock, no randomness and does no I/O: the same calls give the same assignments. policies/admission.py says which request is
the head of the queue; it waits until a prefill engine (policies/prefill_placement.py) and a decode engine
(policies/decode_placement.py) can take it, then its reads are planned (policies/load_or_recompute.py, policies/read_plan.py). Every
assignment is accounted at once; policies/accounts.py says how accounts and load reports are combined. What an engine has not begun may be
placed again (policies/rebalancing.py).

Tokens accounted to a prefill engine: computed tokens + hit_token_weight * hit tokens. The default weight 1 is the paper's rule ("total
tokens"). With 95-99 % hits, most of a request's attention and all of its I/O scale with its context, so the total is the better proxy of
what a GPU and its NICs have to do; computed tokens alone would call a 64K-context turn as light as a 4K one.
A decode engine is accounted prompt + max_new tokens in whole blocks, as load at once and as promised HBM from when `hbm_promise` says.

Cost: O(log engines) per event and per decision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf

from policies.accounts import UNLIMITED_SLOTS, EngineAccount, NodeAccount
from policies.admission import AdmissionQueue
from policies.batch_quota import AttentionTimeModel
from policies.decode_placement import DecodeIndex
from policies.errors import Infeasible, PolicyError
from policies.indexed_heap import IndexedHeap
from policies.load_or_recompute import with_loaded_prefix
from policies.prefill_placement import PrefillIndex
from policies.read_plan import ReadCandidate, plan_reads, reading_sides
from policies.read_queues import ReadQueues
from policies.rebalancing import Move, rebalance
from policies.settings import SchedulingSettings
from policies.vocabulary import Assignment, EngineLoad, NodeLoad, RequestDemand, Role


@dataclass(slots=True)
class _Running:
    """What an assigned request is still accounted for."""

    demand: RequestDemand
    assignment: Assignment
    prefill: EngineAccount
    decode: EngineAccount
    kv_tokens: int
    prefill_tokens: int
    prefill_s: float  # predicted
    reads: dict[str, int]  # node -> tokens still to read from storage
    slots: dict[str, int]  # node -> staging slots
    prefilling: bool = True
    asked_back: bool = False

    def needs(self, node_id: str) -> bool:
        """The node's gateway still has a part in this request, beside the engines it may host."""
        return self.prefilling and (node_id in self.slots or any(s.node_id == node_id for s in self.assignment.read_plan.segments))


class SchedulerCore:
    """All scheduling state of a cluster."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self.settings = settings
        self._engines: dict[str, EngineAccount] = {}
        self._nodes: dict[str, NodeAccount] = {}
        self._prefill = PrefillIndex(settings)
        self._decode = DecodeIndex(settings)
        self._prefill_s = AttentionTimeModel(settings.prefill_pair_s, settings.prefill_token_s)
        self._queue = AdmissionQueue(settings.max_queued_requests, settings.tenant_quantum_tokens)
        self._deadlines = IndexedHeap()
        self._waiting: dict[str, RequestDemand] = {}
        self._waiting_tokens = 0
        self._running: dict[str, _Running] = {}
        self._engine_reports = IndexedHeap()
        self._node_reports = IndexedHeap()
        self._read_queues = ReadQueues()
        self._pool_sizes = IndexedHeap()
        self._staging_sizes = IndexedHeap()
        self._draining: set[str] = set()
        self._turn = 0
        self.blocked_on: Role | None = None
        """The role for lack of which the head of the queue waits, as of the last decision."""

    # --- load reports ---------------------------------------------------------------------------------------------------

    def update_engine(self, load: EngineLoad) -> None:
        """Take an engine's report; the first one registers it. An engine that changed node or role is a new engine."""
        engine = self._engines.get(load.engine_id)
        if engine is None:
            engine = EngineAccount(load, self._node(load.node_id), turn=len(self._engines))
            self._engines[load.engine_id] = engine
        elif (engine.load.node_id, engine.load.role, engine.load.group) != (load.node_id, load.role, load.group):
            raise PolicyError(f"engine {load.engine_id} reports another node, role or group; remove it first")
        self._decode.withdraw(engine)  # its account is about to change; _refresh_engine puts it back
        engine.report(load)
        engine.node.engine_ids[load.engine_id] = None
        self._engine_reports.set(load.engine_id, load.reported_at)
        if load.role == "decode":
            self._pool_sizes.set(load.engine_id, -engine.capacity_tokens)
        self._refresh_engine(engine)

    def update_node(self, load: NodeLoad) -> None:
        """Take a gateway's report; the first one makes the node's engines available."""
        node = self._node(load.node_id)
        newly_known = load.node_id not in self._node_reports
        node.report(load)
        self._staging_sizes.set(load.node_id, -(load.total_slots or UNLIMITED_SLOTS))
        self._node_reports.set(load.node_id, load.reported_at)
        self._refresh_node(node)
        if newly_known:
            for engine_id in node.engine_ids:
                self._refresh_engine(self._engines[engine_id])

    def remove_engine(self, engine_id: str) -> list[str]:
        """Forget a dead engine. Returns the requests it was serving: they are no longer accounted and need a new plan."""
        engine = self._engines.get(engine_id)
        if engine is None:
            return []
        lost = list(engine.request_ids)
        for request_id in lost:
            self.finish(request_id)
        self._engine_reports.discard(engine_id)
        self._pool_sizes.discard(engine_id)
        self._refresh_engine(engine)
        del engine.node.engine_ids[engine_id]
        del self._engines[engine_id]
        return lost

    def remove_node(self, node_id: str) -> list[str]:
        """Forget a dead node with its gateway and engines. Returns all requests it took part in, reads included."""
        node = self._nodes.get(node_id)
        if node is None:
            return []
        lost = [request_id for request_id, running in self._running.items() if running.needs(node_id)]
        for request_id in lost:
            self.finish(request_id)
        for engine_id in list(node.engine_ids):
            lost += self.remove_engine(engine_id)
        self._node_reports.discard(node_id)
        self._read_queues.discard(node_id)
        self._staging_sizes.discard(node_id)
        self._draining.discard(node_id)
        del self._nodes[node_id]
        return lost

    def drain_node(self, node_id: str) -> None:
        """Give a node nothing new, reads included; what it serves goes on (`node_requests`)."""
        self._draining.add(node_id)
        self._refresh_whole_node(node_id)

    def resume_node(self, node_id: str) -> None:
        """End `drain_node`."""
        self._draining.discard(node_id)
        self._refresh_whole_node(node_id)

    def is_draining(self, node_id: str) -> bool:
        return node_id in self._draining

    def node_requests(self, node_id: str) -> int:
        """Requests that run on a node's engines or still need its gateway."""
        node = self._nodes.get(node_id)
        if node is None:
            return 0
        served = {request_id for engine_id in node.engine_ids for request_id in self._engines[engine_id].request_ids}
        return len(served | {request_id for request_id, running in self._running.items() if running.needs(node_id)})

    # --- requests ----------------------------------------------------------------------------------------------------------

    def submit(self, demand: RequestDemand) -> None:
        """Queue a request. Raises QueueFull, or Infeasible if no known decode engine could ever hold it."""
        if demand.request_id in self._waiting or demand.request_id in self._running:
            raise PolicyError(f"request {demand.request_id} is already scheduled")
        if demand.hit_tokens >= demand.prompt_tokens:
            raise Infeasible(f"request {demand.request_id}: at least one prompt token must be computed, so hits must leave one")
        self._check_capacity(demand)
        service_s = self._prefill_s(demand.hit_tokens, demand.computed_tokens)
        tokens = demand.kv_tokens
        self._queue.push(demand.request_id, demand.tenant, tokens, demand.priority, demand.deadline, service_s, demand.arrived_at)
        self._waiting[demand.request_id] = demand
        self._waiting_tokens += tokens
        if demand.deadline < inf:
            self._deadlines.set(demand.request_id, demand.deadline)

    def adopt(self, demand: RequestDemand, assignment: Assignment) -> None:
        """Account a request that is running already (after a restart of the scheduler); its engines must have reported."""
        if assignment.prefill_engine not in self._engines or assignment.decode_engine not in self._engines:
            raise PolicyError(f"request {demand.request_id}: its engines have not reported yet")
        if demand.request_id not in self._running:
            self._account(demand, assignment)

    def cancel(self, request_id: str) -> bool:
        """Forget a request, waiting or running. False if it is not known."""
        return self._withdraw(request_id) is not None or self.finish(request_id)

    def reads_done(self, request_id: str, node_id: str | None = None) -> bool:
        """The storage reads of a request (on one node, or all of them) are complete. False if nothing was accounted."""
        running = self._running.get(request_id)
        if running is None:
            return False
        ended = (node_id,) if node_id is not None else tuple(running.reads)
        released = False
        for ended_node in ended:
            tokens = running.reads.pop(ended_node, 0)
            if tokens:
                node = self._nodes[ended_node]
                node.read(-tokens)
                self._refresh_node(node)
                released = True
        return released

    def prefill_done(self, request_id: str) -> bool:
        """Prefill is complete: the prefill engine and all staging slots are free of this request. False if that was known."""
        running = self._running.get(request_id)
        if running is None or not running.prefilling:
            return False
        running.prefilling = False
        if running.reads:
            self.reads_done(request_id)
        running.prefill.drop(request_id, running.prefill_tokens, running.prefill_s)
        for node_id, slots in running.slots.items():
            self._nodes[node_id].lease(-slots)
        running.slots.clear()
        self._prefill.refresh(running.prefill)
        if self.settings.hbm_promise == "decode":
            running.decode.promise(running.kv_tokens)
            self._decode.change(running.decode, 0, 0, -running.kv_tokens)
        return True

    def finish(self, request_id: str) -> bool:
        """The request has ended, in whatever way; nothing of it is accounted any more. False if it was not running."""
        running = self._running.get(request_id)
        if running is None:
            return False
        if running.prefilling:
            self.prefill_done(request_id)
        del self._running[request_id]
        decode, tokens = running.decode, running.kv_tokens
        decode.promise(-tokens)  # was promised at the latest by prefill_done
        decode.drop(request_id, tokens)
        self._decode.change(decode, -tokens, -1, tokens)
        return True

    def expire(self, now: float) -> list[str]:
        """Drop waiting requests whose deadline has passed, earliest first."""
        expired: list[str] = []
        while (head := self._deadlines.peek()) is not None and self._deadlines.key(head) < now:
            self._withdraw(head)
            expired.append(head)
        return expired

    # --- decisions -----------------------------------------------------------------------------------------------------------

    def decide(self, now: float) -> list[Assignment]:
        """Place waiting requests in order until the head cannot be placed. Each assignment is accounted before the next is made."""
        self._retire_silent(now)
        settings = self.settings
        made: list[Assignment] = []
        self.blocked_on = None
        while (request_id := self._queue.peek()) is not None:
            demand = self._waiting[request_id]
            prefill_id = self._prefill.best_engine()
            if prefill_id is None:
                self.blocked_on = "prefill"
                break
            decode = self._decode.best_engine(demand, self._waiting_tokens, self._nodes)
            if decode is None:
                self.blocked_on = "decode"
                break
            prefill = self._engines[prefill_id]
            node, decode_node = prefill.node, decode.node
            self._queue.pop()
            self._forget_waiting(demand)
            if demand.resident:
                demand = self._without_lost_nodes(demand)
            if settings.recompute:
                demand = self._with_loaded_prefix(demand, prefill, decode)
            plan = plan_reads(
                demand,
                self._candidate(node),
                self._candidate(decode_node),
                self._pool() if settings.read_mode == "pool" else (),
                settings.read_mode,
                settings.min_split_blocks,
                settings.use_resident,
                decode.turn,
            )
            assignment = Assignment(request_id, prefill_id, node.node_id, decode.engine_id, decode_node.node_id, plan)
            self._account(demand, assignment)
            made.append(assignment)
        return made

    def moves(self) -> list[Move]:
        """Requests to take back from the prefill engine that fell behind most, if it has not begun them.

        Whoever runs the engine takes back what it can and submits it again with its arrival time; it is placed on a lighter engine then.
        The same engine is asked again only when all of these have been given back or prefilled.
        """
        fullest, target = self._prefill.fullest_engine(), self._prefill.best_engine()
        if fullest is None or target is None or target == fullest:
            return []
        source = self._engines[fullest]
        queue = [(request_id, self._running[request_id]) for request_id in source.request_ids]
        if any(running.asked_back for _, running in queue):
            return []
        movable = [(request_id, float(running.prefill_tokens)) for request_id, running in queue[1:]]  # the first has begun
        load = {fullest: float(source.tokens), target: float(self._engines[target].tokens)}
        found = rebalance(load, {fullest: movable}, 0.0, self.settings.rebalance_hysteresis)
        for move in found:
            self._running[move.request_id].asked_back = True
        return found

    # --- what the core believes -------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Requests that wait for engines."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests assigned and not finished."""
        return len(self._running)

    def engine_account(self, engine_id: str) -> EngineAccount:
        """Live view of one engine's account; read it, do not change it."""
        return self._engines[engine_id]

    def node_account(self, node_id: str) -> NodeAccount:
        """Live view of one node's account; read it, do not change it."""
        return self._nodes[node_id]

    # --- inside ---------------------------------------------------------------------------------------------------------------

    def _node(self, node_id: str) -> NodeAccount:
        node = self._nodes.get(node_id)
        if node is None:
            node = self._nodes[node_id] = NodeAccount(node_id)
        return node

    def _refresh_engine(self, engine: EngineAccount) -> None:
        """Bring the index of its role up to date with an engine's account, after a change in whether it is available too."""
        node_id = engine.node.node_id
        engine.available = engine.engine_id in self._engine_reports and node_id in self._node_reports and node_id not in self._draining
        if engine.load.role == "prefill":
            self._prefill.refresh(engine)
            return
        self._decode.withdraw(engine)
        if engine.available:
            self._decode.insert(engine)

    def _refresh_whole_node(self, node_id: str) -> None:
        node = self._nodes.get(node_id)
        if node is None:
            return
        self._refresh_node(node)
        for engine_id in node.engine_ids:
            self._refresh_engine(self._engines[engine_id])

    def _refresh_node(self, node: NodeAccount) -> None:
        self._prefill.refresh_node(node)
        if self.settings.read_mode != "pool":
            return
        if node.node_id not in self._node_reports or node.load is None or node.node_id in self._draining:
            self._read_queues.discard(node.node_id)
        else:
            self._read_queues.set(node.node_id, node.read_tokens, node.load.snic_bandwidth)

    def _retire_silent(self, now: float) -> None:
        """Engines and gateways whose report is too old get nothing new."""
        oldest = now - self.settings.report_timeout_s
        while (engine_id := self._engine_reports.peek()) is not None and self._engine_reports.key(engine_id) < oldest:
            self._engine_reports.discard(engine_id)
            self._refresh_engine(self._engines[engine_id])
        while (node_id := self._node_reports.peek()) is not None and self._node_reports.key(node_id) < oldest:
            self._node_reports.discard(node_id)
            node = self._nodes[node_id]
            self._refresh_node(node)
            for engine_id in node.engine_ids:
                self._refresh_engine(self._engines[engine_id])

    def _candidate(self, node: NodeAccount) -> ReadCandidate:
        if node.load is None:
            return ReadCandidate(node.node_id, node.read_tokens, 0.0, node.free_slots)
        queue = node.read_tokens if self.settings.queue_view == "accounted" else node.load.read_queue_tokens
        return ReadCandidate(node.node_id, queue, node.load.snic_bandwidth, node.free_slots)

    def _without_lost_nodes(self, demand: RequestDemand) -> RequestDemand:
        """Nodes whose DRAM held some of its blocks may have been lost, or be draining, since it was submitted."""
        usable = {node: at for node, at in demand.resident.items() if node in self._node_reports and node not in self._draining}
        return demand if len(usable) == len(demand.resident) else replace(demand, resident=usable)

    def _with_loaded_prefix(self, demand: RequestDemand, engine: EngineAccount, decode_engine: EngineAccount) -> RequestDemand:
        cost = self._cost(engine)
        if not (cost.per_token_s or cost.per_pair_s):
            return demand
        prefill, decode = self._candidate(engine.node), self._candidate(decode_engine.node)
        sources = reading_sides(self.settings.read_mode, prefill, decode, demand.hit_blocks, decode_engine.turn)
        return with_loaded_prefix(demand, sources, cost, engine.accounted_s)

    def _cost(self, engine: EngineAccount) -> AttentionTimeModel:
        return engine.load.prefill_cost or self._prefill_s

    def _pool(self) -> list[ReadCandidate]:
        """The nodes whose storage NICs drain first."""
        return [self._candidate(self._nodes[node_id]) for node_id in self._read_queues.first(self.settings.pool_width + 2)]

    def _check_capacity(self, demand: RequestDemand) -> None:
        if (largest := self._pool_sizes.peek()) is not None:
            tokens = -self._pool_sizes.key(largest)
            if demand.kv_tokens > tokens:
                raise Infeasible(
                    f"request {demand.request_id} may need {demand.kv_tokens} KV tokens; the largest decode pool holds {tokens}"
                )
        if (largest := self._staging_sizes.peek()) is not None:
            slots = -self._staging_sizes.key(largest)
            if demand.prompt_blocks > slots:
                raise Infeasible(f"request {demand.request_id} needs {demand.prompt_blocks} staging slots; the largest node has {slots}")

    def _withdraw(self, request_id: str) -> RequestDemand | None:
        """Take a request out of the waiting queue."""
        demand = self._waiting.get(request_id)
        if demand is not None:
            self._queue.remove(request_id)
            self._forget_waiting(demand)
        return demand

    def _forget_waiting(self, demand: RequestDemand) -> None:
        """What is known of a request that has left the admission queue."""
        del self._waiting[demand.request_id]
        self._waiting_tokens -= demand.kv_tokens
        self._deadlines.discard(demand.request_id)

    def _account(self, demand: RequestDemand, assignment: Assignment) -> None:
        request_id, hits, computed, kv_tokens = demand.request_id, demand.hit_tokens, demand.computed_tokens, demand.kv_tokens
        slots = assignment.read_plan.storage_blocks()
        reads: dict[str, int] = {}
        for node_id, blocks in slots.items():
            reads[node_id] = read_tokens = blocks * demand.block_tokens
            node = self._node(node_id)
            node.read(read_tokens)
            self._refresh_node(node)
        slots[assignment.decode_node] = demand.prompt_blocks
        for node_id, count in slots.items():
            self._node(node_id).lease(count)
        prefill, decode = self._engines[assignment.prefill_engine], self._engines[assignment.decode_engine]
        tokens = computed + round(self.settings.hit_token_weight * hits)
        seconds = self._cost(prefill)(hits, computed)
        self._running[request_id] = _Running(demand, assignment, prefill, decode, kv_tokens, tokens, seconds, reads, slots)
        self._turn += 1
        prefill.last_chosen = decode.last_chosen = self._turn
        prefill.add(request_id, tokens, seconds)
        decode.add(request_id, kv_tokens)
        decode.turn += 1
        promised = kv_tokens if self.settings.hbm_promise == "assignment" else 0
        decode.promise(promised)
        self._prefill.refresh(prefill)
        self._decode.change(decode, kv_tokens, 1, -promised)
