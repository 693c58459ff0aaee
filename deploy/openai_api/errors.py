"""Every failure as OpenAI's error object and HTTP status."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from dualpath_ray import errors

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499


class ApiError(Exception):
    """An answer that is an error. `body()` is what OpenAI's clients understand; `headers` go with it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


def api_error(error: Exception) -> ApiError:
    """The answer to a request that failed with `error`.

    What the package raises on purpose says what the caller can do and is passed on; anything else is a defect, which is logged and
    answered without its details.
    """
    match error:
        case ApiError():
            return error
        case ValidationError():
            return _invalid(error)
        case errors.InvalidRequestError():
            return ApiError(400, str(error))
        case errors.OverloadedError():
            return ApiError(429, str(error), type="rate_limit_error", code="overloaded", headers={"Retry-After": str(RETRY_AFTER_S)})
        case errors.DeadlineExceededError():
            return ApiError(504, str(error), type="timeout_error", code="deadline_exceeded")
        case errors.CancelledError():
            return ApiError(CLIENT_CLOSED_REQUEST, str(error), type="cancelled", code="cancelled")
        case errors.DualPathError(retryable=True):
            logger.warning("request failed, retryable: %s", error)
            return ApiError(503, str(error), type="service_unavailable", code="unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})
        case errors.DualPathError():
            logger.error("request failed: %s", error)
            return ApiError(500, str(error), type="server_error")
    logger.error("request failed unexpectedly", exc_info=error)
    return ApiError(500, "internal error; the server's log has the details", type="server_error", code="internal_error")


def _invalid(error: ValidationError) -> ApiError:
    """The first of pydantic's complaints; `param` is the field of the body that it is about."""
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = complaints[0]
    where = ".".join(str(part) for part in first["loc"]) or "body"
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{where}: {first['msg']}{more}", param=str(first["loc"][0]) if first["loc"] else None, code=code)
