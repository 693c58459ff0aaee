"""Which prefill engine takes the next request (paper section 6, PE scheduling).

Intent: keep every storage NIC and every GPU busy without overloading either.
Inputs: `tok_e` of each engine, `read_q` of its node, alpha and beta.
Rule: engines with tok_e > beta get nothing. Of the others, those whose node has a short read queue (<= alpha; class C2) come
first, then the rest (C3); within a class the smallest tok_e wins. Classes are re-evaluated after each assignment, because every
change goes through `PrefillIndex`. Round robin and least requests use one class and another order.

Cost: O(log engines) per change of an engine. A changed read queue costs a comparison, and O(engines of the node * log engines) when it
crosses alpha.
"""

from __future__ import annotations

from policies.accounts import EngineAccount, NodeAccount
from policies.indexed_heap import IndexedHeap
from policies.settings import SchedulingSettings


class PrefillIndex:
    """Open prefill engines in the two classes of the paper."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self._placement = settings.placement
        self._alpha, self._beta = settings.alpha_tokens, settings.beta_tokens
        self._short = IndexedHeap()
        self._long = IndexedHeap()
        self._fullest = IndexedHeap() if settings.rebalance else None

    def refresh(self, engine: EngineAccount) -> None:
        """Take note of a changed engine."""
        engine_id, node, tokens = engine.engine_id, engine.node, engine.tokens
        heap = self._long if node.long_queue else self._short
        if engine.available and tokens <= self._beta:
            node.open_prefill[engine_id] = engine
            heap.set(engine_id, engine.order(self._placement))
        elif engine_id in node.open_prefill:
            del node.open_prefill[engine_id]
            heap.discard(engine_id)
        if self._fullest is not None:
            if engine.available:
                self._fullest.set(engine_id, -tokens)
            else:
                self._fullest.discard(engine_id)

    def refresh_node(self, node: NodeAccount) -> None:
        """Take note of a changed read queue."""
        long_queue = node.read_tokens > self._alpha and self._placement == "dualpath"
        if long_queue == node.long_queue:
            return
        node.long_queue = long_queue
        old, new = (self._short, self._long) if long_queue else (self._long, self._short)
        for engine_id, engine in node.open_prefill.items():
            old.discard(engine_id)
            new.set(engine_id, engine.order(self._placement))

    def best_engine(self) -> str | None:
        """The engine for the next request, or None if every engine is overloaded or silent."""
        best = self._short.peek()
        return best if best is not None else self._long.peek()

    def fullest_engine(self) -> str | None:
        """The engine with most tokens; kept for rebalancing only."""
        return self._fullest.peek() if self._fullest is not None else None
