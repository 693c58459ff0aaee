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

Cost: O(log groups + engines of a few groups).
"""

from __future__ import annotations

from policies.accounts import EngineAccount, NodeAccount
from policies.indexed_heap import IndexedHeap
from policies.settings import SchedulingSettings
from policies.vocabulary import RequestDemand

GROUPS_TRIED = 4


class DecodeGroup:
    """Available decode engines that are balanced together, with running sums."""

    def __init__(self, group_id: str) -> None:
        self.group_id = group_id
        self.engines: dict[str, EngineAccount] = {}
        self.seen: dict[str, tuple[int, int]] = {}
        self.free: dict[str, int] = {}
        self.tokens = 0
        self.requests = 0
        self.free_hbm_tokens = 0
        self.last_chosen = 0

    def refresh(self, engine: EngineAccount, available: bool) -> None:
        engine_id = engine.load.engine_id
        old_tokens, old_requests = self.seen.pop(engine_id, (0, 0))
        self.tokens -= old_tokens
        self.requests -= old_requests
        self.free_hbm_tokens -= self.free.pop(engine_id, 0)
        if not available:
            self.engines.pop(engine_id, None)
            return
        tokens, requests, free = engine.tokens, engine.requests, max(0, engine.free_hbm_tokens)
        self.engines[engine_id] = engine
        self.seen[engine_id] = (tokens, requests)
        self.free[engine_id] = free
        self.tokens += tokens
        self.requests += requests
        self.free_hbm_tokens += free


class DecodeIndex:
    """All groups, ordered by load and by the largest free pool."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self._settings = settings
        self._groups: dict[str, DecodeGroup] = {}
        self._by_load = IndexedHeap()
        self._by_memory = IndexedHeap()

    def refresh(self, engine: EngineAccount, available: bool) -> None:
        """Take note of a changed engine; the group's turn is that of the engine chosen last (round robin)."""
        group_id = engine.load.group or engine.load.node_id
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = DecodeGroup(group_id)
        group.refresh(engine, available)
        group.last_chosen = max(group.last_chosen, engine.last_chosen)
        self._refresh_group(group)

    def best_engine(self, request: RequestDemand, waiting_tokens: int, nodes: dict[str, NodeAccount]) -> EngineAccount | None:
        """The engine for this request, or None if no engine has the memory now. `waiting_tokens`: KV tokens of all waiting requests."""
        fullest = self._by_memory.peek()
        if fullest is None or -self._by_memory.key(fullest) < request.kv_tokens:
            return None
        tried = list(self._by_load.smallest(GROUPS_TRIED))
        if fullest not in tried:
            tried.append(fullest)
        share = waiting_tokens // len(self._groups)
        for group_id in tried:
            engine = self._best_in_group(self._groups[group_id], request, share, nodes)
            if engine is not None:
                return engine
        return None

    def _best_in_group(self, group: DecodeGroup, request: RequestDemand, share: int, nodes: dict[str, NodeAccount]) -> EngineAccount | None:
        length, slots = request.kv_tokens, request.prompt_blocks
        has_slots = {node_id: nodes[node_id].free_slots >= slots for node_id in {e.load.node_id for e in group.engines.values()}}
        fitting = [
            engine for engine_id, engine in group.engines.items() if group.free[engine_id] >= length and has_slots[engine.load.node_id]
        ]
        if not fitting:
            return None
        if self._settings.placement != "dualpath":
            return min(fitting, key=lambda e: (*e.order(self._settings.placement), e.load.engine_id))
        taken = max(length, min(group.free_hbm_tokens, share))
        threshold = self._settings.z_factor * (taken + group.tokens) / len(group.engines)
        low = [engine for engine in fitting if engine.tokens + length <= threshold]
        if low:
            return min(low, key=lambda e: (e.requests, e.tokens, e.last_chosen, e.load.engine_id))
        return min(fitting, key=lambda e: (e.tokens, e.last_chosen, e.load.engine_id))

    def _refresh_group(self, group: DecodeGroup) -> None:
        if not group.engines:
            self._by_load.discard(group.group_id)
            self._by_memory.discard(group.group_id)
            del self._groups[group.group_id]
            return
        placement = self._settings.placement
        load = group.tokens if placement == "dualpath" else group.requests if placement == "least_requests" else 0
        self._by_load.set(group.group_id, (load, group.last_chosen))
        self._by_memory.set(group.group_id, -max(group.free.values()))
