"""The way in: from a request's headers to its caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from deploy.access.api_keys import ApiKey, ApiKeys
from deploy.access.tenant_limits import TenantLimits
from deploy.openai_api.caller import Caller
from deploy.openai_api.errors import ApiError


class Access:
    """Checks API keys, if there are any, and their tenants' limits. One per HTTP replica."""

    def __init__(self, key_file: Path | None = None, replicas: Callable[[], int] = lambda: 1) -> None:
        """`replicas`: see TenantLimits. Raises ConfigError for an unusable file."""
        self._keys = ApiKeys(key_file) if key_file else None
        self._limits = TenantLimits(replicas)

    def caller(self, headers: Mapping[str, str], request_id: str) -> Caller:
        """Who calls. Raises ApiError: 401 without a valid key, 403 for one that may not do this, 400 for unusable headers."""
        return self._identify(headers, request_id)[0]

    def enter(self, headers: Mapping[str, str], request_id: str) -> tuple[Caller, Callable[[], None]]:
        """The caller of a request that counts against its tenant's limits, and what to call at the request's end.

        Raises ApiError like `caller`, and 429.
        """
        caller, key = self._identify(headers, request_id)
        if key is None:
            return caller, lambda: None
        return caller, self._limits.enter(key.tenant, key.requests_per_minute, key.concurrency)

    def _identify(self, headers: Mapping[str, str], request_id: str) -> tuple[Caller, ApiKey | None]:
        caller = Caller.from_headers(headers, request_id)
        if self._keys is None:
            return caller, None
        key = self._keys.find(_bearer(headers))
        if key is None:
            raise ApiError(
                401,
                "no valid API key: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if key.disabled:
            raise ApiError(403, f"the API key dp-{key.id} is disabled", type="permission_error", code="disabled_api_key")
        if caller.tenant not in ("", key.tenant):
            raise ApiError(403, "X-Tenant names another tenant than the API key's", type="permission_error", code="wrong_tenant")
        return replace(caller, tenant=key.tenant, salt=key.salt, highest_priority=key.priority), key


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
