"""Who calls, from the request's headers."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field

from deploy.openai_api.errors import ApiError

REQUEST_ID_HEADER = "x-request-id"
TENANT_HEADER = "x-tenant"
TRACE_HEADERS = ("traceparent", "tracestate")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TENANT = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(given: str) -> str:
    """The client's X-Request-Id if it is fit for logs and names, otherwise a new one."""
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Caller:
    """`request_id` names the request in logs and traces; `tenant` is X-Tenant (tenants share no cached prompt) or empty.

    X-Tenant is not authenticated: a gateway in front of the service has to set it from what it knows about the client.
    """

    request_id: str
    tenant: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], request_id: str) -> Caller:
        """Header names are lower case, or looked up without regard to case. Raises ApiError for an unusable X-Tenant."""
        tenant = headers.get(TENANT_HEADER, "")
        if tenant and not _TENANT.fullmatch(tenant):
            raise ApiError(400, "X-Tenant must be 1 to 128 printable ASCII characters without spaces", code="invalid_header")
        return cls(request_id, tenant, {name: headers[name] for name in TRACE_HEADERS if name in headers})
