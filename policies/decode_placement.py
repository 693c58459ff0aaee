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
        self.seen: dict[str, tuple[int, int, int]] = {}
        self.tokens = 0
        self.requests = 0
        self.free_hbm_tokens = 0
        self.last_chosen = 0

    def refresh(self, engine: EngineAccount, available: bool) -> None:
        engine_id = engine.load.engine_id
        old = self.seen.pop(engine_id, (0, 0, 0))
        new = (engine.tokens, engine.requests, max(0, engine.free_hbm_tokens)) if available else (0, 0, 0)
        if available:
            self.engines[engine_id] = engine
            self.seen[engine_id] = new
        else:
            self.engines.pop(engine_id, None)
        self.tokens += new[0] - old[0]
        self.requests += new[1] - old[1]
        self.free_hbm_tokens += new[2] - old[2]

    @property
    def largest_free(self) -> int:
        return max((free for _, _, free in self.seen.values()), default=0)


class DecodeIndex:
    """All groups, ordered by load and by the largest free pool."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self._settings = settings
        self._groups: dict[str, DecodeGroup] = {}
        self._by_load = IndexedHeap()
        self._by_memory = IndexedHeap()

    def refresh(self, engine: EngineAccount, available: bool) -> None:
        """Take note of a changed engine."""
        group_id = engine.load.group or engine.load.node_id
        group = self._groups.get(group_id)
        if group is None:
            group = self._groups[group_id] = DecodeGroup(group_id)
        group.refresh(engine, available)
        self._refresh_group(group)

    def chosen(self, engine: EngineAccount, turn: int) -> None:
        """Remember whose turn it was (round robin)."""
        group = self._groups.get(engine.load.group or engine.load.node_id)
        if group is not None:
            group.last_chosen = turn
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
        length = request.kv_tokens
        fitting = [
            engine
            for engine in group.engines.values()
            if engine.free_hbm_tokens >= length and nodes[engine.load.node_id].free_slots >= request.prompt_blocks
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
        load = {"round_robin": 0, "least_requests": group.requests}.get(self._settings.placement, group.tokens)
        self._by_load.set(group.group_id, (load, group.last_chosen))
        self._by_memory.set(group.group_id, -group.largest_free)
