"""A request's body in, a JSON reply out."""

from __future__ import annotations

import asyncio

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from deploy.openai_api.errors import CLIENT_CLOSED_REQUEST, ApiError
from deploy.openai_api.reply import JsonReply


async def read_body(request: Request, limit: int, timeout_s: float) -> bytes:
    """The whole body. Stops reading past `limit` bytes and raises ApiError (413); 408 if it does not come within `timeout_s`."""
    declared = request.headers.get("content-length", "")
    size = int(declared) if declared.isdecimal() else 0
    parts: list[bytes] = []
    if size <= limit:
        size = 0
        try:
            async with asyncio.timeout(timeout_s):
                async for part in request.stream():
                    parts.append(part)
                    size += len(part)
                    if size > limit:
                        break
        except ClientDisconnect as error:
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client left before its body was complete", type="cancelled") from error
        except TimeoutError as error:
            message = f"the body was not complete after {timeout_s:g} s (serving.body_timeout_s)"
            raise ApiError(408, message, type="timeout_error", code="request_timeout") from error
    if size > limit:
        raise ApiError(413, f"the body is larger than {limit} bytes (serving.max_body_bytes)", code="request_too_large")
    return b"".join(parts)


def json_response(reply: JsonReply) -> Response:
    return Response(reply.body, reply.status, dict(reply.headers), media_type="application/json")
