"""Which prefill engine takes the next request (paper section 6, PE scheduling).

Intent: keep every storage NIC and every GPU busy without overloading either.
Inputs: `tok_e` of each engine, `read_q` of its node, alpha and beta.
Rule: engines with tok_e > beta get nothing. Of the others, those whose node has a short read queue (<= alpha; class C2) come
first, then the rest (C3); within a class the smallest tok_e wins. Classes are re-evaluated after each assignment, because every
change goes through `PrefillIndex.refresh`. Round robin and least requests use one class and another order.

Cost: O(log nodes + log engines per node) per change.
"""

from __future__ import annotations

from policies.accounts import EngineAccount, NodeAccount
from policies.indexed_heap import IndexedHeap
from policies.settings import SchedulingSettings


class PrefillIndex:
    """Nodes ordered by their best open prefill engine, in the two classes of the paper."""

    def __init__(self, settings: SchedulingSettings) -> None:
        self._settings = settings
        self._short = IndexedHeap()
        self._long = IndexedHeap()
        self._fullest = IndexedHeap()

    def refresh(self, engine: EngineAccount, node: NodeAccount, available: bool) -> None:
        """Take note of a changed engine. `available`: engine and gateway have reported recently."""
        engine_id = engine.load.engine_id
        if available and engine.tokens <= self._settings.beta_tokens:
            node.open_prefill.set(engine_id, engine.order(self._settings.placement))
        else:
            node.open_prefill.discard(engine_id)
        if self._settings.rebalance:
            if available:
                self._fullest.set(engine_id, -engine.tokens)
            else:
                self._fullest.discard(engine_id)
        self.refresh_node(node)

    def refresh_node(self, node: NodeAccount) -> None:
        """Take note of a changed read queue."""
        best = node.open_prefill.peek()
        short = self._settings.placement != "dualpath" or node.read_tokens <= self._settings.alpha_tokens
        chosen, other = (self._short, self._long) if short else (self._long, self._short)
        other.discard(node.node_id)
        if best is None:
            chosen.discard(node.node_id)
        else:
            chosen.set(node.node_id, node.open_prefill.key(best))

    def best_node(self) -> str | None:
        """Node of the best engine (its `open_prefill` names it), or None if every engine is overloaded or silent."""
        best = self._short.peek()
        return best if best is not None else self._long.peek()

    def fullest_engine(self) -> str | None:
        """The engine with most tokens; kept for rebalancing only."""
        return self._fullest.peek()
