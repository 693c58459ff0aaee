"""In which order waiting requests of several tenants are served.

Intent: no tenant starves another, urgent requests go first within a tenant, and the queue is bounded.
Inputs: tenant, size in tokens, priority, deadline, expected service time and arrival of each request.
Rule: deficit round robin (Shreedhar and Varghese, 1996) over tenants with `quantum` tokens per round; within a tenant higher
priority first, then least slack (deadline - now - expected service time, so deadline - service time orders it at any time), then arrival.
Bound: between two tenants that both keep waiting, served tokens differ by at most quantum + 2 * largest request.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from policies.errors import PolicyError, QueueFull
from policies.indexed_heap import IndexedHeap


@dataclass(slots=True)
class _Tenant:
    requests: IndexedHeap = field(default_factory=IndexedHeap)
    deficit: int = 0
    served_this_round: bool = False


class AdmissionQueue:
    """Bounded queue of request ids, fair between tenants. All operations are O(log n) amortised, if `quantum` is not much smaller than
    a request (a request of k quanta takes k rounds to be paid for).
    """

    def __init__(self, capacity: int, quantum: int) -> None:
        if capacity < 1 or quantum < 1:
            raise PolicyError("admission: capacity and quantum must be at least 1")
        self._capacity = capacity
        self._quantum = quantum
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()  # head: whose round it is
        self._known: dict[str, tuple[str, int]] = {}
        self._count = 0
        self._head: str | None = None  # the last answer of `peek`, while it is still right

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._known

    def push(
        self,
        request_id: str,
        tenant: str,
        tokens: int,
        priority: int = 0,
        deadline: float = float("inf"),
        service_s: float = 0.0,
        arrived_at: float = 0.0,
    ) -> None:
        """Queue a request; raises QueueFull."""
        if len(self._known) >= self._capacity:
            raise QueueFull(f"{self._capacity} requests wait for engines (max_queued_requests); retry later or add engines")
        if request_id in self._known:
            raise PolicyError(f"request {request_id} waits already")
        self._count += 1
        self._head = None
        self._known[request_id] = (tenant, max(1, tokens))
        queue = self._tenants.get(tenant)
        if queue is None:
            queue = self._tenants[tenant] = _Tenant()
        queue.requests.set(request_id, (-priority, deadline - service_s, arrived_at, self._count))

    def remove(self, request_id: str) -> bool:
        """Withdraw a request; False if it does not wait."""
        known = self._known.pop(request_id, None)
        if known is None:
            return False
        if request_id == self._head:
            self._head = None
        tenant = self._tenants[known[0]]
        tenant.requests.discard(request_id)
        if not len(tenant.requests):
            del self._tenants[known[0]]
        return True

    def peek(self) -> str | None:
        """The next request to serve, or None. It stays the next one until it is served or withdrawn, its tenant gets one that is more
        urgent, or that one is too large for what is left of the tenant's round.
        """
        if self._head is not None:
            return self._head
        while self._tenants:
            name, tenant = next(iter(self._tenants.items()))
            if not tenant.served_this_round:
                tenant.deficit += self._quantum
                tenant.served_this_round = True
            head = tenant.requests.peek()
            if head is not None and self._known[head][1] <= tenant.deficit:
                self._head = head
                return head
            tenant.served_this_round = False
            self._tenants.move_to_end(name)
        return None

    def pop(self) -> str | None:
        """Serve the next request, or None."""
        head = self.peek()
        if head is not None:
            tenant, tokens = self._known[head]
            self._tenants[tenant].deficit -= tokens
            self.remove(head)
        return head
