"""Every failure as OpenAI's error object and HTTP status."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from pydantic import ValidationError

from dualpath_ray import errors

logger = logging.getLogger(__name__)

RETRY_AFTER_S = 1
CLIENT_CLOSED_REQUEST = 499

_TYPE = re.compile(r"str|constrained-\w+|[A-Z]\w*|.*\[.*\]")


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
    """The first of pydantic's complaints; `param` is the field of the body that it is about.

    Where a value may have one of several types, pydantic complains once or more for each. Of these the one that is furthest inside is
    shown: it is of the type that fits best.
    """
    complaints = error.errors(include_url=False, include_context=False, include_input=False)
    first = complaints[0]["loc"]
    place = tuple(takewhile(_is_field, first))
    alike = complaints[:1] if place == first else [one for one in complaints if one["loc"][: len(place)] == place]
    shown = max(alike, key=lambda one: len(one["loc"]))
    where = ".".join(str(part) for part in shown["loc"] if _is_field(part)) or "body"
    more = f" (and {len(complaints) - len(alike)} more)" if len(complaints) > len(alike) else ""
    code = "missing_required_parameter" if shown["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{where}: {shown['msg']}{more}", param=str(place[0]) if place else None, code=code)


def _is_field(part: str | int) -> bool:
    """Whether a part of pydantic's path is a place in the body, and not the name of a type."""
    return not (isinstance(part, str) and _TYPE.fullmatch(part))
