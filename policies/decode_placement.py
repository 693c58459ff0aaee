"""Which decode engine takes the next request (paper section 6, DE scheduling).

Intent: even token load over groups and engines, without promising HBM or staging that is not there.
Inputs: `tok_e`, `seq_e` and free HBM of each engine, free staging slots of its node, the tokens waiting in the queue.

Phase 1: the group whose summed tok_e is smallest. Phase 2 inside the group, with

    Z = z_factor * (sum of len_r over R + sum of tok_e) / |E|

where R are the waiting requests that the group would take. Among engines with the memory, those with tok_e + len <= Z come first, by
smallest seq_e; if there are none, the smallest tok_e.

The paper binds all waiting requests to groups at once; here a request is bound when it is placed, so a group that fills up or dies
never holds requests another could serve. R is then the group's even share of the waiting tokens, at most what its free HBM holds, at least
the request itself: the same Z in expectation. If no engine of the least loaded groups fits, the group with most free HBM is tried.

Cost: O(1) per change of an engine; O(log groups) for each changed group and O(engines of a few groups) per decision.
"""

from __future__ import annotations

from operator import attrgetter

from policies.accounts import EngineAccount, NodeAccount
from policies.errors import PolicyError
from policies.indexed_heap import IndexedHeap
from policies.settings import SchedulingSettings
from policies.vocabulary import RequestDemand

GROUPS_TRIED = 4
FEWEST_REQUESTS = attrgetter("requests", "tokens", "last_chosen", "engine_id")
FEWEST_TOKENS = attrgetter("tokens", "last_chosen", "engine_id")


class DecodeGroup:
    """Available decode engines that are balanced together, with running sums."""

    __slots__ = ("_most_free", "engines", "free_hbm_tokens", "group_id", "last_chosen", "nodes", "requests", "tokens")

    def __init__(self, group_id: str) -> None:
        self.group_id = group_id
        self.engines: dict[str, EngineAccount] = {}
        self.nodes: dict[str, int] = {}  # engines on each node
        self.tokens = 0
        self.requests = 0
        self.free_hbm_tokens = 0
        self.last_chosen = 0
        self._most_free: int | None = None  # None: not known any more

    def insert(self, engine: EngineAccount) -> None:
        self.engines[engine.engine_id] = engine
        node_id = engine.node.node_id
        self.nodes[node_id] = self.nodes.get(node_id, 0) + 1
        self.last_chosen = max(self.last_chosen, engine.last_chosen)
        self._most_free = None
        self.change(engine.tokens, engine.requests, engine.free_hbm_tokens)

    def withdraw(self, engine: EngineAccount) -> None:
        del self.engines[engine.engine_id]
        self._most_free = None
        node_id = engine.node.node_id
        self.nodes[node_id] -= 1
        if not self.nodes[node_id]:
            del self.nodes[node_id]
        self.change(-engine.tokens, -engine.requests, -engine.free_hbm_tokens)

    def change(self, tokens: int, requests: int, free_hbm_tokens: int) -> None:
        self.tokens += tokens
        self.requests += requests
        if free_hbm_tokens:
            self.free_hbm_tokens += free_hbm_tokens
            self._most_free = None

    def most_free(self) -> int:
        """The largest free pool of one engine."""
        if self._most_free is None:
            self._most_free = max(engine.free_hbm_tokens for engine in self.engines.values())
        return self._most_free


class DecodeIndex:
    """All groups, ordered by load and by the largest free pool. The orders are brought up to date when a decision needs them: most
    groups change more than once between two decisions, and the largest pool matters only where the least loaded groups are full.
    """

    def __init__(self, settings: SchedulingSettings) -> None:
        self._z_factor, self._placement = settings.z_factor, settings.placement
        self._groups: dict[str, DecodeGroup] = {}
        self._group_of: dict[str, DecodeGroup] = {}
        self._by_load = IndexedHeap()
        self._by_memory = IndexedHeap()
        self._load_changed: dict[str, DecodeGroup] = {}
        self._memory_changed: dict[str, DecodeGroup] = {}

    def insert(self, engine: EngineAccount) -> None:
        """An engine may get requests from now on."""
        group = self._groups.get(engine.group)
        if group is None:
            group = self._groups[engine.group] = DecodeGroup(engine.group)
        self._group_of[engine.engine_id] = group
        group.insert(engine)
        self._load_changed[group.group_id] = self._memory_changed[group.group_id] = group

    def withdraw(self, engine: EngineAccount) -> None:
        """An engine gets nothing more. Must come before its account changes in another way than `change` says."""
        group = self._group_of.pop(engine.engine_id, None)
        if group is None:
            return
        group.withdraw(engine)
        self._load_changed[group.group_id] = self._memory_changed[group.group_id] = group
        if not group.engines:
            for order in (self._by_load, self._by_memory):
                order.discard(group.group_id)
            for known in (self._groups, self._load_changed, self._memory_changed):
                del known[group.group_id]

    def change(self, engine: EngineAccount, tokens: int, requests: int, free_hbm_tokens: int) -> None:
        """An engine's account has changed by so much. The group's turn is that of the engine chosen last (round robin)."""
        group = self._group_of.get(engine.engine_id)
        if group is None:
            return
        group.change(tokens, requests, free_hbm_tokens)
        if tokens:
            if engine.last_chosen > group.last_chosen:
                group.last_chosen = engine.last_chosen
            self._load_changed[group.group_id] = group
        if free_hbm_tokens:
            self._memory_changed[group.group_id] = group

    def best_engine(self, request: RequestDemand, waiting_tokens: int, nodes: dict[str, NodeAccount]) -> EngineAccount | None:
        """The engine for this request, or None if no engine has the memory now. `waiting_tokens`: KV tokens of all waiting requests."""
        if not self._groups:
            return None
        self._order_by_load()
        share = waiting_tokens // len(self._groups)
        length, slots = request.kv_tokens, request.prompt_blocks
        lightest = self._by_load.peek()
        if lightest is not None:
            engine = self._best_in_group(self._groups[lightest], length, slots, share, nodes)
            if engine is not None:
                return engine
        tried: list[str] = []
        for group_id in self._by_load.smallest(GROUPS_TRIED):
            engine = self._best_in_group(self._groups[group_id], length, slots, share, nodes)
            if engine is not None:
                return engine
            tried.append(group_id)
        fullest = self._most_memory()
        return None if fullest in tried else self._best_in_group(self._groups[fullest], length, slots, share, nodes)

    def _best_in_group(
        self, group: DecodeGroup, length: int, slots: int, share: int, nodes: dict[str, NodeAccount]
    ) -> EngineAccount | None:
        if group.most_free() < length:
            return None
        without_slots = [node_id for node_id in group.nodes if nodes[node_id].free_slots < slots]
        fitting = [engine for engine in group.engines.values() if engine.free_hbm_tokens >= length]
        if without_slots:
            fitting = [engine for engine in fitting if engine.node.node_id not in without_slots]
        if not fitting:
            return None
        if self._placement != "dualpath":
            return min(fitting, key=lambda e: (*e.order(self._placement), e.engine_id))
        taken = max(length, min(group.free_hbm_tokens, share))
        most = self._z_factor * (taken + group.tokens) / len(group.engines) - length
        low = [engine for engine in fitting if engine.tokens <= most]
        return min(low, key=FEWEST_REQUESTS) if low else min(fitting, key=FEWEST_TOKENS)

    def _order_by_load(self) -> None:
        for group_id, group in self._load_changed.items():
            load = group.tokens if self._placement == "dualpath" else group.requests if self._placement == "least_requests" else 0
            self._by_load.set(group_id, (load, group.last_chosen))
        self._load_changed.clear()

    def _most_memory(self) -> str:
        for group_id, group in self._memory_changed.items():
            self._by_memory.set(group_id, -group.most_free())
        self._memory_changed.clear()
        fullest = self._by_memory.peek()
        if fullest is None:
            raise PolicyError("decode groups without an order by memory")
        return fullest
