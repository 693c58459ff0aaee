"""What Ray Serve's HTTP proxy answers by itself, in OpenAI's shape.

A request that Serve's queue has no room for, and one whose replica died, never reach the application, or do not come back from it. Serve
answers them with plain text, the latter with status 500. Its proxies call `middlewares` when they start if the environment of their Ray
says so, which `install` sees to for a Ray that starts here; deploy files for other clusters set the same variable.
"""

from __future__ import annotations

import json
import os

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.openai_api.caller import REQUEST_ID_HEADER, request_id
from deploy.openai_api.errors import RETRY_AFTER_S, ApiError, api_error
from dualpath_ray.errors import OverloadedError

VARIABLE, CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "deploy.http_api.proxy:middlewares"
OURS = ("/v1/", "/tokenize", "/detokenize")  # a proxy serves all applications of its cluster


def install() -> None:
    """Call before Ray starts; what the user has set wins."""
    os.environ.setdefault(VARIABLE, CALLBACK)


def middlewares() -> list[Middleware]:
    """Called by Serve, in each of its proxies."""
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """ASGI middleware around a proxy. Replaces what the proxy says in plain text, and what it does not say at all."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = MutableHeaders(scope=scope)
        # The proxy returns this header as it finds it, and hands it to the application.
        headers[REQUEST_ID_HEADER] = name = request_id(headers.get(REQUEST_ID_HEADER, ""))
        if not scope["path"].startswith(OURS):
            await self._app(scope, receive, send)
            return
        answer = _Answer(send)
        await self._app(scope, receive, answer.send)
        if not answer.started:
            await _refuse(send, _lost(), [(REQUEST_ID_HEADER.encode(), name.encode())])


class _Answer:
    """Passes an answer on, unless it is the proxy's own."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._replaced = False
        self.started = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = Headers(raw=message["headers"])
            error = _refusal(message["status"]) if headers.get("content-type", "").startswith("text/plain") else None
            if error is not None:
                self._replaced = True
                kept = [(name, value) for name, value in message["headers"] if name.lower() in (b"retry-after", b"x-request-id")]
                await _refuse(self._send, error, kept)
        if not self._replaced:
            await self._send(message)


def _refusal(status: int) -> ApiError | None:
    """The proxy's own answers: no room (429), no replica (503), too late (408)."""
    if status == 429:
        return api_error(
            OverloadedError("all HTTP replicas are busy and their queue is full; try again later (serving.max_queued_requests)")
        )
    if status == 503:
        return _unavailable("no HTTP replica is there")
    if status == 408:
        return ApiError(
            504, "the request was not done within the proxy's request_timeout_s", type="timeout_error", code="deadline_exceeded"
        )
    return None


def _lost() -> ApiError:
    return _unavailable("the HTTP replica of this request has died; send it again")


def _unavailable(message: str) -> ApiError:
    return ApiError(503, message, type="service_unavailable", code="unavailable", headers={"Retry-After": str(RETRY_AFTER_S)})


async def _refuse(send: Send, error: ApiError, kept: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps(error.body()).encode()
    headers = dict(kept) | {b"content-type": b"application/json", b"content-length": str(len(body)).encode()}
    for name, value in error.headers.items():
        headers.setdefault(name.lower().encode(), value.encode())
    await send({"type": "http.response.start", "status": error.status, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": body})
