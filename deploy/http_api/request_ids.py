"""X-Request-Id on every response."""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.openai_api.caller import REQUEST_ID_HEADER, request_id
from dualpath_ray.telemetry import logs


class RequestIds:
    """ASGI middleware: gives each request an id (the client's own, if usable) and returns it with the response.

    `returned`: whoever is in front returns it (Serve's proxies do), so that it would be there twice.
    """

    def __init__(self, app: ASGIApp, returned: bool = False) -> None:
        self._app = app
        self._returned = returned

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(Headers(scope=scope).get(REQUEST_ID_HEADER, ""))
        scope["state"] = {**scope.get("state", {}), "request_id": name}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).setdefault(REQUEST_ID_HEADER, name)
            await send(message)

        with logs.request(name):
            await self._app(scope, receive, send if self._returned else send_with_id)
