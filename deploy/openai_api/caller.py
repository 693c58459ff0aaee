"""Who calls, from the request's headers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.openai_api.errors import ApiError

REQUEST_ID_HEADER = "x-request-id"
TENANT_HEADER = "x-tenant"
SESSION_HEADER = "x-session-id"
TRACE_HEADERS = ("traceparent", "tracestate")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(given: str) -> str:
    """The client's X-Request-Id if it is fit for logs and names, otherwise a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Caller:
    """`request_id` names the request in logs and traces. Tenants share no cached prompt.

    With API keys, `tenant`, `salt` and `highest_priority` are the key's. Without, `tenant` is X-Tenant, which is not authenticated: a
    gateway in front of the service has to set it from what it knows about the client.
    """

    request_id: str
    tenant: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    session: str = ""
    salt: str = ""
    highest_priority: int | None = None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], request_id: str) -> Caller:
        """Header names are lower case, or looked up without regard to case. Raises ApiError for an unusable X-Tenant or X-Session-Id."""
        return cls(
            request_id,
            _printable(headers, TENANT_HEADER),
            {name: headers[name] for name in TRACE_HEADERS if name in headers},
            _printable(headers, SESSION_HEADER),
        )

    def priority(self, wanted: int | None) -> int:
        """A key's priority is the highest that its requests can have, and what they have unless they ask for less."""
        if self.highest_priority is None:
            return wanted or 0
        return self.highest_priority if wanted is None else min(wanted, self.highest_priority)


def _printable(headers: Mapping[str, str], name: str) -> str:
    value = headers.get(name, "")
    if value and not _PRINTABLE.fullmatch(value):
        raise ApiError(400, f"{name.title()} must be 1 to 128 printable ASCII characters without spaces", code="invalid_header")
    return value
