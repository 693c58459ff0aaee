"""How much one tenant may do in one HTTP replica: requests per minute, and requests at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from deploy.openai_api.errors import ApiError

LONGEST_WAIT_S = 60


@dataclass(slots=True)
class _Use:
    tokens: float
    at: float
    active: int = 0


class TenantLimits:
    """A token bucket that holds one minute's requests, and a count of the active ones, per tenant."""

    def __init__(self, replicas: Callable[[], int] = lambda: 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`replicas`: how many there are now. Limits are the tenant's in all; each replica allows its share, at least one request."""
        self._replicas, self._clock = replicas, clock
        self._uses: dict[str, _Use] = {}

    def enter(self, tenant: str, requests_per_minute: float | None, concurrency: int | None) -> Callable[[], None]:
        """Count a request in; call the result, once, at its end. Raises ApiError (429) with the time after which it may fit."""
        now, replicas = self._clock(), self._replicas()
        use = self._uses.get(tenant)
        if use is None:
            self._uses[tenant] = use = _Use(float("inf"), now)
        if concurrency is not None and use.active >= max(1, concurrency // replicas):
            raise _refused(f"{use.active} requests of this tenant are being served, its limit in this replica", 1)
        if requests_per_minute is not None:
            size = max(1.0, requests_per_minute / replicas)
            rate = requests_per_minute / replicas / 60
            use.tokens = min(size, use.tokens + (now - use.at) * rate)
            if use.tokens < 1:
                use.at = now
                raise _refused(f"more than {requests_per_minute:g} requests in a minute", (1 - use.tokens) / rate)
            use.tokens -= 1
        use.at = now
        use.active += 1

        def leave() -> None:
            use.active -= 1
            if not use.active and len(self._uses) > 10_000:  # one-time tenants do not pile up
                self._uses.pop(tenant, None)

        return leave


def _refused(reason: str, wait_s: float) -> ApiError:
    retry = str(min(LONGEST_WAIT_S, max(1, int(wait_s + 0.999))))
    return ApiError(
        429, f"{reason}; try again in {retry} s", type="rate_limit_error", code="rate_limit_exceeded", headers={"Retry-After": retry}
    )
